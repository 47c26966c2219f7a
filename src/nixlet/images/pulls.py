"""Pulling ``nix:0`` images: from a reference to an image that CRI knows, with progress for whoever watches."""

import asyncio
import contextlib
import dataclasses
import os
import stat
import time
import weakref
from collections.abc import Iterator, Sequence

from nixlet import errors
from nixlet.containerd import cri, imagestore
from nixlet.images import admission, archive, loader, model, platforms, reference
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
    error: str = ""

    @property
    def finished(self) -> bool:
        """Whether this is a pull's last event."""
        return self.step is None


class Board:
    """Where pulls post their events, for all who watch."""

    def __init__(self) -> None:
        self._watchers: set[asyncio.Queue[Event]] = set()

    @contextlib.contextmanager
    def watched_by(self, queue: "asyncio.Queue[Event]") -> Iterator[None]:
        """Put events into a queue for the time of the context; when it is full, steps are left out."""
        self._watchers.add(queue)
        try:
            yield
        finally:
            self._watchers.discard(queue)

    def post(self, event: Event) -> None:
        """Tell all watchers."""
        for queue in self._watchers:
            if queue.full() and event.finished:
                queue.get_nowait()
            with contextlib.suppress(asyncio.QueueFull):
                queue.put_nowait(event)


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


async def wait_for_cri(images: cri.ImageClient, image_id: str) -> None:
    """Wait until CRI shows an image that was loaded.

    It learns of new images by an event: a container that is created before that would not find its image.

    Raises:
        UnavailableError: It doesn't show it in time.
    """
    try:
        async with asyncio.timeout(_CRI_TIMEOUT):
            while await images.status(image_id) is None:
                await asyncio.sleep(0.005)
    except TimeoutError as error:
        raise errors.UnavailableError(
            f"containerd does not show the image {image_id} although it was loaded", hint="look into containerd's log"
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
        *,
        archive_dirs: Sequence[str],
        board: Board,
    ) -> None:
        self._store = store
        self._realiser = realise
        self._containerd = containerd
        self._loader = loads
        self._images = images
        self._archive_dirs = archive_dirs
        self._board = board
        # A lock lives as long as somebody holds or awaits it: references come from outside, in any number.
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    async def pull(self, text: str) -> Pulled:
        """Have an image ready for containers, under the very reference that was asked for.

        Raises:
            InvalidArgumentError: The reference is malformed, or what it names is no image for this machine.
            NotFoundError: There is no such archive or store path, or a path of its closure can't be had.
        """
        try:
            wanted = reference.parse(text, self._store.store_dir)
            if not isinstance(wanted, reference.ArchiveReference):
                raise errors.InvalidArgumentError(f"{text} is not a nix:0 reference")
            # Pulls of one image come one after the other: the second finds all there and takes a few milliseconds.
            lock = self._locks.setdefault(wanted.path, asyncio.Lock())
            async with lock:
                pulled = await self._pull(wanted, lambda step: self._board.post(Event(text, step=step)))
        except BaseException as error:
            self._board.post(Event(text, error=str(error) or type(error).__name__))
            raise
        self._board.post(Event(text, pulled=pulled))
        return pulled

    async def image_id(self, text: str) -> str | None:
        """The ID of an image that was pulled by this reference before, or None."""
        name = reference.canonical(reference.parse(text, self._store.store_dir))
        record = await self._containerd.image(name)
        if record is None:
            return None
        try:
            manifest = await self._containerd.read_content(record.target.digest)
        except errors.NotFoundError:
            return None
        return model.decode(manifest, model.Manifest, "the image's manifest").config.digest

    async def _pull(self, wanted: reference.ArchiveReference, sink: progress.ProgressSink) -> Pulled:
        start = time.monotonic()
        async with contextlib.AsyncExitStack() as held:
            stack = held.enter_context(contextlib.ExitStack())
            took = interface.Realised()
            if wanted.store_path is not None:
                took = await held.enter_async_context(self._realiser.holding([wanted.store_path], sink))
            source, image = await asyncio.to_thread(self._open, stack, wanted)
            # Under the name that was asked for alone: what the archive calls itself is its maker's wish.
            loaded = await self._loader.load(source, image, [reference.canonical(wanted)], sink=sink)
        await wait_for_cri(self._images, loaded.image_id)
        took += loaded.took
        return Pulled(loaded.image_id, loaded.closure_paths, took, round((time.monotonic() - start) * 1000))

    def _open(
        self, stack: contextlib.ExitStack, wanted: reference.ArchiveReference
    ) -> tuple[archive.Archive, archive.ArchiveImage]:
        machine = platforms.host_platform()
        if wanted.store_path is not None:
            fd = _open_store_file(f"{self._store.real_dir}/{wanted.store_path.name}", wanted.path)
            stack.callback(os.close, fd)
            source = stack.enter_context(archive.open_archive(fd, label=wanted.path))
            return source, source.image(machine)
        trusted = {0, os.geteuid()}
        fd = stack.enter_context(admission.open_allowed_archive(wanted.path, self._archive_dirs, trusted))
        try:
            source = stack.enter_context(archive.open_archive(fd, label=wanted.path))
            return source, source.image(machine)
        except errors.InvalidArgumentError as error:
            # What is no archive must look the same from outside as what isn't there.
            raise admission.no_archive(wanted.path, self._archive_dirs) from error
