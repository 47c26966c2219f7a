"""Images that a node has before it is ready: archives in its directory are imported, lists of references are pulled.

What comes from there is pinned, so that kubelets don't collect it, and gets further names: by its digest, and in registries whose
place it takes on a node without a way to them. Afterwards the directory is watched.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Sequence

import msgspec

from nixlet import errors
from nixlet.containerd import cri, imagestore
from nixlet.encoding import unreadable
from nixlet.host import files, uncut
from nixlet.images import archive, loader, opening, platforms, pulls, reference
from nixlet.node.settings import trusted

_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz", ".tar.lz4", ".tar.zst", ".tzst")
_LIST = ".txt"

#: Remembers what was imported, if somebody made it: large archives needn't be read at every start.
_CACHE = ".cache.json"

#: A longer line is no reference (k3s's limit), in bytes.
_MAX_LINE = 65536

#: Seconds between looks at the directory, for which a file has to rest before it is read, until containerd is asked again, and
#: until it is looked whether there is room on the disk.
_INTERVAL, _REST, _RETRY, _RETRY_FULL = 1.0, 2.0, 10.0, 60.0

_OURS = "io.nixlet.pinned"
_PINS = {**imagestore.PINNED, _OURS: "pinned"}

#: The label of a record under a further name: what that is made of, and the image's digest, since a record that somebody lets lead
#: elsewhere keeps its labels.
_FURTHER = "io.nixlet.further"

_log = logging.getLogger("nixlet.preload")


class _State(msgspec.Struct, frozen=True):
    """What tells one state of a file from another, in bytes and nanoseconds.

    All files in a store are as old as each other: where a link leads to another one, only the inode need differ.
    """

    size: int
    mtime_ns: int
    inode: int


class _Imported(msgspec.Struct, frozen=True):
    """A file that was imported, and the names of its images."""

    state: _State
    images: tuple[str, ...]


def cache_file(directory: str) -> str:
    """Where it is remembered what was imported from a directory."""
    return os.path.join(directory, _CACHE)


class Preload:
    """Imports a directory's images.

    Args:
        directory: The directory; it need not exist.
        loads: Loads archives.
        containerd: The containerd that gets the images.
        shown: Its CRI, which learns of images late.
        opener: Opens archives.
        pulling: The image service that lists are pulled by.
        registries: What else the images are named after ("registry.example.com", "registry.example.com/mirror").
    """

    def __init__(
        self,
        directory: str,
        loads: loader.Loader,
        containerd: imagestore.ImageStore,
        shown: cri.ImageClient,
        opener: opening.Opener,
        pulling: cri.ImageClient,
        registries: Sequence[str],
    ) -> None:
        self._directory = directory
        self._loader = loads
        self._containerd = containerd
        self._shown = shown
        self._opener = opener
        self._pulling = pulling
        self._registries = registries
        self._cache_file = cache_file(directory)
        self._seen: dict[str, _State] = {}
        self._imported: dict[str, _Imported] = {}

    async def start(self) -> None:
        """Unpin what was imported before and import what is there now; what can't be imported is said, and left out."""
        for image in await self._containerd.images(f'labels."{_OURS}"==pinned'):
            with contextlib.suppress(errors.NotFoundError):
                await self._containerd.label_image(image, dict.fromkeys(_PINS, ""))
        self._imported = await asyncio.to_thread(self._read_cache)
        for path, state in (await asyncio.to_thread(self._scan)).items():
            await self._take(path, state)
        await self._write_cache()

    async def watch(self) -> None:
        """Import what appears or changes, for ever."""
        resting: dict[str, tuple[_State, float]] = {}
        while True:
            await asyncio.sleep(_INTERVAL)
            try:
                resting = await self._look_again(resting)
            except Exception:  # noqa: BLE001 (it is logged, and the watch goes on)
                _log.exception("%s can't be looked at", self._directory)
                await asyncio.sleep(_RETRY)

    async def _look_again(self, resting: dict[str, tuple[_State, float]]) -> dict[str, tuple[_State, float]]:
        """Import what has rested; what rests yet, and until when."""
        found = await asyncio.to_thread(self._scan)
        for gone in set(self._seen) - set(found):
            del self._seen[gone]
        changed = {path: state for path, state in found.items() if self._seen.get(path) != state}
        now = time.monotonic()
        resting = {
            path: resting[path] if path in resting and resting[path][0] == state else (state, now + _REST)
            for path, state in changed.items()
        }
        for path, (state, ripe) in resting.items():
            if now >= ripe and (delay := await self._take(path, state)):
                resting[path] = (state, time.monotonic() + delay)
        if changed:
            await self._write_cache()
        return resting

    async def _take(self, path: str, state: _State) -> float:
        """Import a file unless it was before; the seconds until that is worth another try, 0 when it ended."""
        known = self._imported.get(path)
        start = time.monotonic()
        try:
            if known is not None and known.state == state and await self._pin(known.images):
                _log.info("the images of %s are there", path)
            else:
                self._imported.pop(path, None)
                names = await (self._pull_list(path) if path.endswith(_LIST) else self._import(path))
                self._imported[path] = _Imported(state, tuple(names))
                _log.info("imported %s: %s, in %.1f s", path, ", ".join(names) or "nothing", time.monotonic() - start)
        except (errors.UnavailableError, errors.ResourceExhaustedError) as error:
            _log.warning("%s is imported later: %s", path, error, extra={"hint": error.hint})
            return _RETRY if isinstance(error, errors.UnavailableError) else _RETRY_FULL
        except (errors.NixletError, OSError) as error:
            hint = error.hint if isinstance(error, errors.NixletError) else ""
            _log.error("%s can't be imported: %s", path, error, extra={"hint": hint})
        except Exception:  # noqa: BLE001 (it is logged, and others are imported)
            _log.exception("%s can't be imported", path)
        self._seen[path] = state
        return 0

    async def _pin(self, names: Sequence[str]) -> bool:
        """Pin images; False if one of them is gone."""
        records = [await self._containerd.image(name) for name in names]
        present = [record for record in records if record is not None]
        if len(present) < len(names):
            return False
        try:
            for record in present:
                await self._containerd.label_image(record, _PINS)
        except errors.NotFoundError:
            return False
        return True

    async def _import(self, path: str) -> list[str]:
        async with contextlib.AsyncExitStack() as held:
            trusting = trusted.opened(path, "the image archive")
            file = await uncut.to_its_end(asyncio.to_thread(held.enter_context, trusting))
            source, found = await held.enter_async_context(self._opener.opened(file.fileno(), path, _images))
            names: list[str] = []
            places = [os.path.realpath(path), path]
            for image, own in zip(found, archive.recorded_names(found, places), strict=True):
                _tell_left_out(path, image, own)
                loaded = await self._loader.load(source, image, own, labels=_PINS)
                descriptor = image.descriptor
                target = imagestore.Descriptor(descriptor.media_type, descriptor.digest, descriptor.size)
                all_names = await self._name_further(own, target)
                await pulls.wait_for_cri(self._shown, loaded.image_id, all_names)
                names += all_names
            return names

    async def _name_further(self, own: Sequence[str], target: imagestore.Descriptor) -> list[str]:
        """Give an image its further names, but for those that others have; all names that it has then.

        Its own names have become its own before: what was made of another image's name yields to them.
        """
        for name in own:
            record = await self._containerd.image(name)
            if record is not None and record.labels.get(_FURTHER):
                # (where somebody has just removed it, CRI won't show it, and it is imported again)
                with contextlib.suppress(errors.NotFoundError):
                    await self._containerd.label_image(record, {_FURTHER: ""})
        names = list(own)
        for name, base in further_names(own, target.digest, self._registries).items():
            if await self._take_name(name, base, target):
                names.append(name)
            else:
                _log.warning("%s is another image's name: %s doesn't get it", name, base)
        return names

    async def _take_name(self, name: str, base: str, target: imagestore.Descriptor) -> bool:
        """Name an image unless the name is another's; whether it has it now.

        It isn't where it was made of the same name for an earlier image, or for one that isn't preloaded any more.
        """
        labels = {**loader.MANAGED, **_PINS, _FURTHER: f"{base} {target.digest}"}
        while not await self._containerd.create_image(name, target, labels):
            there = await self._containerd.image(name)
            if there is None:
                continue
            made_of, _, digest = there.labels.get(_FURTHER, "").partition(" ")
            if digest == there.target.digest and (made_of == base or not there.labels.get(_OURS)):
                await self._containerd.put_image(name, target, labels)
            elif there.target.digest == target.digest:
                try:
                    await self._containerd.label_image(there, _PINS)
                except errors.NotFoundError:
                    continue
            else:
                return False
            break
        return True

    async def _pull_list(self, path: str) -> list[str]:
        names: list[str] = []
        failed, later = "", ""
        for line in await asyncio.to_thread(references_in, path):
            try:
                names += await self._pull(line)
            except (errors.InvalidArgumentError, errors.NotFoundError) as error:
                failed = line
                _log.error("%s: %s can't be pulled: %s", path, line, error, extra={"hint": error.hint})
            except errors.NixletError as error:
                # A registry that can't be reached, for example, comes without a code of its own.
                later = line
                _log.warning("%s: %s can't be pulled yet: %s", path, line, error, extra={"hint": error.hint})
        if later:
            raise errors.UnavailableError(f"{later} and perhaps others could not be pulled")
        if failed:
            raise errors.NotFoundError(f"{failed} and perhaps others could not be pulled")
        return names

    async def _pull(self, text: str) -> list[str]:
        name = reference.canonical(reference.parse(text))
        if (image := await self._pulling.status(text)) is None:
            await self._pulling.pull(text)
            image = await self._pulling.status(text)
        record = await self._containerd.image(name)
        if record is None or image is None:
            # Another image service keeps its images where it likes.
            return []
        target = imagestore.Descriptor(record.target.media_type, record.target.digest, record.target.size)
        try:
            await self._containerd.label_image(record, _PINS)
        except errors.NotFoundError as error:
            raise errors.UnavailableError(f"{name} was pulled, and removed at once by somebody") from error
        names = await self._name_further([name], target)
        await pulls.wait_for_cri(self._shown, image.id, names)
        return names

    def _scan(self) -> dict[str, _State]:
        """The files that are to be imported, links to such files among them: NixOS puts images there as links."""
        found = {}
        for parent, _, names in os.walk(self._directory):
            for name in sorted(names):
                if name.endswith((*_ARCHIVES, _LIST)):
                    path = os.path.join(parent, name)
                    with contextlib.suppress(OSError):
                        status = os.stat(path)
                        found[path] = _State(status.st_size, status.st_mtime_ns, status.st_ino)
        return found

    def _read_cache(self) -> dict[str, _Imported]:
        if not os.path.exists(self._cache_file):
            return {}
        try:
            with open(self._cache_file, "rb") as file:
                return msgspec.json.decode(file.read() or b"{}", type=dict[str, _Imported])
        except (OSError, *unreadable.JSON) as error:
            _log.warning("%s is begun anew: %s", self._cache_file, error)
            return {}

    async def _write_cache(self) -> None:
        self._imported = {path: known for path, known in self._imported.items() if path in self._seen}
        if not os.path.exists(self._cache_file):
            return
        try:
            await asyncio.to_thread(files.write_atomically, self._cache_file, msgspec.json.encode(self._imported))
        except errors.NixletError as error:
            _log.warning("%s", error)


def further_names(names: Sequence[str], digest: str, registries: Sequence[str]) -> dict[str, str]:
    """The names that an image gets besides its own: by digest, and both forms in each of the registries.

    Returns each with the name that it is made of.

    Args:
        names: As containerd records them. What is no name in a registry gets no others.
        digest: The image's.
        registries: Hosts, perhaps with a path.
    """
    found: dict[str, str] = {}
    for name in names:
        parsed = reference.parse(name)
        if not isinstance(parsed, reference.ImageReference):
            continue
        tag = f":{parsed.tag}" if parsed.tag else ""
        by_digest = f"@{digest}"
        own = f"{parsed.domain}/{parsed.repository}"
        made = [own + by_digest]
        for registry in (each.rstrip("/") for each in registries):
            if not own.startswith(f"{registry}/"):
                made += [f"{registry}/{parsed.repository}{end}" for end in (tag, by_digest) if end]
        for each in made:
            found.setdefault(each, name)
    return {each: name for each, name in found.items() if each not in names}


def _tell_left_out(path: str, image: archive.ArchiveImage, names: Sequence[str]) -> None:
    if left_out := [name for name in image.names if name not in names]:
        shown = ", ".join(left_out)
        _log.warning("%s: names that are not those of %s are left out: %s", path, image.descriptor.digest, shown)


def _images(source: archive.Archive) -> Sequence[archive.ArchiveImage]:
    return source.images(platforms.host_platform())


def references_in(path: str) -> list[str]:
    """What stands in a list of references, one a line.

    Raises:
        InvalidArgumentError: A line is too long to be one.
    """
    found = []
    with trusted.opened(path, "the list of images") as file:
        while line := file.readline(_MAX_LINE + 1):
            if len(line) > _MAX_LINE and not line.endswith(b"\n"):
                raise errors.InvalidArgumentError(f"{path} has a line of more than {_MAX_LINE} bytes")
            found.append(line.decode(errors="replace").strip())
    return [each for each in found if each]


@contextlib.asynccontextmanager
async def kept(preload: Preload) -> AsyncIterator[None]:
    """Import what is there, and what comes during the context."""
    await preload.start()
    watching = asyncio.create_task(preload.watch(), name="preload")
    try:
        yield
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
