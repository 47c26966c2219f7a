"""Pulling ``nix:0`` images: from a reference to an image that CRI knows, with progress for whoever watches."""

import asyncio
import contextlib
import dataclasses
import os
import stat
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence

from nixlet import errors
from nixlet.containerd import cri, imagestore
from nixlet.images import admission, archive, expand, loader, opening, platforms, reference
from nixlet.store import interface, realiser
from nixlet.telemetry import progress

#: Seconds to wait until CRI has taken notice of a new image.
_CRI_TIMEOUT = 10.0


@dataclasses.dataclass(frozen=True, slots=True)
class Pulled:
    """An image that is ready for containers.

    Attributes:
        image_id: Its ID, the digest of its configuration.
        closure_paths: How many store paths its layers name.
        took: What had to be fetched.
        duration_ms: How long it took.
    """

    image_id: str
    closure_paths: int
    took: interface.Realised
    duration_ms: int


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """Something that happened in a pull: a step, or the end with a result or an error."""

    reference: str
    step: progress.Progress | None = None
    pulled: Pulled | None = None
    error: BaseException | None = None

    @property
    def finished(self) -> bool:
        """Whether this is a pull's last event."""
        return self.step is None


class Exchange:
    """Where pulls publish their events, for all who subscribe."""

    def __init__(self) -> None:
        self._subscribers: set[Callable[[Event], None]] = set()

    @contextlib.contextmanager
    def subscribed(self, subscriber: Callable[[Event], None]) -> Iterator[None]:
        """Have something called with each event, for the time of the context; it is called often, and must be quick."""
        self._subscribers.add(subscriber)
        try:
            yield
        finally:
            self._subscribers.discard(subscriber)

    def publish(self, event: Event) -> None:
        """Tell all subscribers."""
        for subscriber in tuple(self._subscribers):
            subscriber(event)


def _open_store_file(path: str, shown: str) -> int:
    """Open a store path that is a plain file. Its content is foreign: a link could lead anywhere on this host."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise errors.InvalidArgumentError(f"{shown} is not an image archive: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise errors.InvalidArgumentError(
            f"{shown} is not an image archive: it is no plain file", hint="name the output of buildImage"
        )
    return fd


async def wait_for_cri(images: cri.ImageClient, image_id: str, names: Iterable[str]) -> None:
    """Wait until CRI shows an image that was loaded, under all of its names.

    It learns of each record by an event: a container that is created before that would not find its image, or find the one that had
    the name before.

    Args:
        images: CRI's image service.
        image_id: The image's.
        names: As containerd records them. Those that CRI can't look for are found by the image's ID.

    Raises:
        UnavailableError: It doesn't show it in time.
    """
    asked = {name if reference.is_known_to_registries(name) else image_id for name in names}
    waiting = ""
    try:
        async with asyncio.timeout(_CRI_TIMEOUT):
            for waiting in sorted(asked):
                while (shown := await images.status(waiting)) is None or shown.id != image_id:
                    await asyncio.sleep(0.005)
    except TimeoutError as error:
        raise errors.UnavailableError(
            f"containerd does not show the image {waiting} although it was loaded", hint="look into containerd's log"
        ) from error


class Puller:
    """Pulls ``nix:0`` images for one node."""

    def __init__(
        self,
        store: interface.Store,
        realise: realiser.Realiser,
        containerd: imagestore.ImageStore,
        loads: loader.Loader,
        images: cri.ImageClient,
        opener: opening.Opener,
        *,
        archive_dirs: Sequence[str],
        exchange: Exchange,
    ) -> None:
        self._store = store
        self._realiser = realise
        self._containerd = containerd
        self._loader = loads
        self._images = images
        self._archive_dirs = archive_dirs
        self._opener = opener
        self._exchange = exchange
        # A lock lives as long as somebody holds or awaits it: references come from outside, in any number.
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    async def pull(self, text: str, elsewhere: str = "") -> Pulled:
        """Have an image ready for containers, under the very reference that was asked for.

        Args:
            text: The reference.
            elsewhere: Another snapshotter than ours, which its containers are to have.

        Raises:
            InvalidArgumentError: The reference is malformed, or what it names is no image for this machine.
            NotFoundError: There is no such archive or store path, or a path of its closure can't be had.
            FailedPreconditionError: It is of store paths, which that other snapshotter can't show.
        """
        try:
            wanted = reference.parse(text, self._store.store_dir)
            if not isinstance(wanted, reference.ArchiveReference):
                raise errors.InvalidArgumentError(f"{text} is not a nix:0 reference")
            # Pulls of one image come one after the other: the second finds all there and takes a few milliseconds.
            lock = self._locks.setdefault(wanted.path, asyncio.Lock())
            async with lock:
                pulled = await self._pull(
                    wanted, elsewhere, lambda step: self._exchange.publish(Event(text, step=step))
                )
        except admission.NotAdmittedError as error:
            # Whoever may create a pod gets one answer; whoever may watch the node's pulls, or read its log, gets the truth.
            self._exchange.publish(Event(text, error=error.reason))
            raise
        except BaseException as error:
            self._exchange.publish(Event(text, error=error))
            raise
        self._exchange.publish(Event(text, pulled=pulled))
        return pulled

    async def _pull(self, wanted: reference.ArchiveReference, elsewhere: str, sink: progress.ProgressSink) -> Pulled:
        start = time.monotonic()
        # Under the name that was asked for alone: what the archive calls itself is its maker's wish.
        name = reference.canonical(wanted)
        loads = loader.Loader(self._containerd, elsewhere) if elsewhere else self._loader
        async with contextlib.AsyncExitStack() as held:
            if wanted.store_path is not None:
                # Its file is read, whatever becomes of its name: the connection is free for the closures.
                async with self._realiser.holding([wanted.store_path], sink) as there:
                    fd = _open_store_file(f"{self._store.real_dir}/{wanted.store_path.name}", wanted.path)
                    held.callback(os.close, fd)
                took = there.took
                origin = there.infos[wanted.store_path].nar_hash
                loaded = await self._load_from_store(loads, fd, wanted.path, origin, name, sink)
            else:
                took = interface.Realised()
                loaded = await self._load_from_outside(loads, wanted.path, name, sink)
        await wait_for_cri(self._images, loaded.image_id, [name])
        took += loaded.took
        return Pulled(loaded.image_id, loaded.closure_paths, took, round((time.monotonic() - start) * 1000))

    async def _load_from_store(
        self, loads: loader.Loader, fd: int, path: str, origin: str, name: str, sink: progress.ProgressSink
    ) -> loader.Loaded:
        if not await asyncio.to_thread(expand.is_compressed, fd):
            async with self._opener.opened(fd, path, _only_image, sink) as (source, image):
                return await loads.load(source, image, [name], sink=sink)
        # To expand it again would take long, and be for nothing where containerd has it all.
        loaded = await loads.load_again(name, origin, sink)
        if loaded is not None:
            return loaded
        async with self._opener.opened(fd, path, _only_image, sink) as (source, image):
            labels = loader.came_from(origin, image.descriptor.digest)
            return await loads.load(source, image, [name], labels=labels, sink=sink)

    async def _load_from_outside(
        self, loads: loader.Loader, path: str, name: str, sink: progress.ProgressSink
    ) -> loader.Loaded:
        async with contextlib.AsyncExitStack() as held:
            allowed = admission.open_allowed_archive(path, self._archive_dirs, {0, os.geteuid()})
            fd = held.enter_context(allowed)
            try:
                source, image = await held.enter_async_context(self._opener.opened(fd, path, _only_image, sink))
            except errors.InvalidArgumentError as error:
                # What is no archive must look the same from outside as what isn't there.
                raise admission.NotAdmittedError(path, self._archive_dirs, error) from error
            return await loads.load(source, image, [name], sink=sink)


def _only_image(source: archive.Archive) -> archive.ArchiveImage:
    return source.image(platforms.host_platform())
