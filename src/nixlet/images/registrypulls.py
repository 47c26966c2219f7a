"""Pulls from registries, which are containerd's work: whether what it pulled sees its own closures.

containerd's unpacker takes a snapshot that is there already under the right chain ID, and asks nobody, whatever closure it has. So a
pull is looked at when it has succeeded, before the client learns of that. Where it can't stay, the records that it made are taken
away, and those that it changed lead again to where they led before.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

from nixlet import errors
from nixlet.containerd import imagestore
from nixlet.host import uncut
from nixlet.images import archive, closurecheck, model, platforms, reference, targets
from nixlet.rpc.gen import containerd_images_pb2

_log = logging.getLogger("nixlet.pulls")

#: The records that there were before a pull, by name.
_Before = dict[str, containerd_images_pb2.Image]


class RegistryPulls:
    """Looks at what one containerd pulls.

    Args:
        containerd: The containerd.
        check: Compares layers.
    """

    def __init__(self, containerd: imagestore.ImageStore, check: closurecheck.ClosureCheck) -> None:
        self._containerd = containerd
        self._check = check
        #: One for each pull that runs. What another pull made may be taken away by that one's check: then it is none of
        #: what was there before, either.
        self._running: list[_Before] = []
        self._changing = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def watched(self, text: str, elsewhere: str = "") -> AsyncIterator[Callable[[str], Awaitable[None]]]:
        """For the time of a pull; gives what is to be called with the image's ID once containerd has pulled it.

        That raises the errors of ``ClosureCheck.take_unpacked``, or that another snapshotter can't show store paths, and then
        nothing of the pull has stayed.

        Args:
            text: The reference that is pulled.
            elsewhere: Another snapshotter than ours, for which containerd unpacks it.
        """
        name = _canonical(text)
        async with self._changing:
            before = {record.name: record for record in await self._containerd.images()}
            self._running.append(before)
        checked = False

        async def check(image_id: str) -> None:
            nonlocal checked
            checked = True
            await uncut.to_its_end(self._look_at(name, image_id, elsewhere, before))

        try:
            yield check
        finally:
            try:
                # A pull that a client gave up may have been done all the same.
                if not checked:
                    await uncut.to_its_end(self._look_after(name, elsewhere, before))
            finally:
                self._running = [each for each in self._running if each is not before]

    async def _look_after(self, name: str, elsewhere: str, before: _Before) -> None:
        """Look at what a pull left that ended without an answer."""
        try:
            record = await self._containerd.image(name) if name else None
            if record is not None and (name not in before or before[name].target.digest != record.target.digest):
                await self._look_at(name, "", elsewhere, before)
        except errors.NixletError as error:
            _log.warning("%s", error, extra={"hint": error.hint})

    async def _look_at(self, name: str, image_id: str, elsewhere: str, before: _Before) -> None:
        """Check what a pull gave a name and an ID to; mostly both lead to the same."""
        found = [await self._containerd.image(each) for each in (name, image_id) if each]
        failed: errors.NixletError | None = None
        for digest in dict.fromkeys(record.target.digest for record in found if record is not None):
            manifest = await self._manifest(digest)
            # Whether an image is of ours is seen here, so that others cost nothing more.
            if manifest is None or not any(map(closurecheck.may_name_paths, manifest.layers)):
                continue
            try:
                if elsewhere:
                    raise closurecheck.not_shown_by(elsewhere, f"the image {name or image_id}")
                await self._check_layers(manifest)
            except errors.NixletError as error:
                await self._take_back(name, manifest.config.digest, digest, before)
                failed = failed or error
        if failed is not None:
            raise failed

    async def _manifest(self, digest: str) -> model.Manifest | None:
        try:
            return await targets.manifest_of(self._containerd, digest, platforms.host_platform())
        except errors.NotFoundError:
            return None
        except errors.InvalidArgumentError as error:
            # containerd takes more than we read, digests of other kinds for example.
            _log.warning("%s: whether it names store paths can't be told", error)
            return None

    async def _check_layers(self, manifest: model.Manifest) -> None:
        try:
            config = await targets.read_config(self._containerd, manifest)
        except errors.NotFoundError:
            return
        diff_ids = config.rootfs.diff_ids
        layers = map(archive.Layer, manifest.layers, diff_ids)
        for layer, chain_id in zip(layers, model.chain_ids(diff_ids), strict=False):
            await self._check.take_unpacked(self._containerd, layer, chain_id)

    async def _take_back(self, name: str, image_id: str, digest: str, before: _Before) -> None:
        """Undo what a pull did to records: CRI makes one by the name, one by its digest, one by the image's ID."""
        async with self._changing:
            for each in filter(None, (name, _by_digest(name, digest), image_id)):
                record, old = await self._containerd.image(each), before.get(each)
                led = "" if old is None else old.target.digest
                if record is None or record.target.digest != digest or led == digest:
                    continue
                await self._put_back(record, old)
                for other in self._running:
                    if each in other and other[each].target.digest == digest:
                        del other[each]
                        other.update({} if old is None else {each: old})

    async def _put_back(self, record: containerd_images_pb2.Image, old: containerd_images_pb2.Image | None) -> None:
        if old is not None:
            target = old.target
            with contextlib.suppress(errors.NotFoundError):
                await self._containerd.read_content(target.digest, 1)
                descriptor = imagestore.Descriptor(target.media_type, target.digest, target.size, target.annotations)
                await self._containerd.put_image(record.name, descriptor, old.labels)
                return
        await self._containerd.delete_image(record)


def _canonical(text: str) -> str:
    """The name that containerd records; empty where we can't tell."""
    with contextlib.suppress(errors.InvalidArgumentError):
        return reference.canonical(reference.parse(text))
    return ""


def _by_digest(name: str, digest: str) -> str:
    """The other name that CRI gives what is pulled by a tag."""
    if not name or reference.digest_in(name):
        return ""
    return f"{name.rpartition(':')[0]}@{digest}"
