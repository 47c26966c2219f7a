"""Images for whoever asks the node: the methods ListImages and LoadImage."""

from collections.abc import Mapping

import msgspec

from nixlet.containerd import cri, imagestore
from nixlet.images import importing, loader, opening
from nixlet.services import images, pullprogress
from nixlet.telemetry import progress
from nixlet.varlink import server


class _Archive(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    archive: int
    label: str
    paths: tuple[str, ...]
    ref: str | None = None
    snapshotter: str | None = None


class ImagesService:
    """Answers for one node's images.

    Args:
        listing: Tells which there are.
        loads: Loads images for the node's snapshotter.
        opener: Opens archives.
        containerd: The containerd that they are loaded into.
        shown: CRI's image service there.
    """

    def __init__(
        self,
        listing: images.Listing,
        loads: loader.Loader,
        opener: opening.Opener,
        containerd: imagestore.ImageStore,
        shown: cri.ImageClient,
    ) -> None:
        self._listing = listing
        self._loader = loads
        self._opener = opener
        self._containerd = containerd
        self._shown = shown

    def methods(self) -> Mapping[str, server.Method]:
        """Its methods."""
        return {
            "ListImages": server.Method(server.Nothing, self._list),
            "LoadImage": server.Method(_Archive, self._load, several=True),
        }

    async def _list(self, _: server.Call[server.Nothing]) -> Mapping[str, object]:
        return {
            "images": [
                {
                    "id": image.id,
                    "tags": list(image.repo_tags),
                    "digests": list(image.repo_digests),
                    "size": image.size,
                    "pinned": image.pinned,
                }
                for image in await self._listing.images()
            ]
        }

    async def _load(self, call: server.Call[_Archive]) -> None:
        # Whoever interrupts it wants no more of it; what is recorded by then stays.
        await call.unless_gone(self._import(call))

    async def _import(self, call: server.Call[_Archive]) -> None:
        asked, loads = call.parameters, self._loader
        if asked.snapshotter not in {None, loads.snapshotter}:
            # What it can show is containerd's affair: of store paths nothing.
            loads = loader.Loader(self._containerd, asked.snapshotter)
        wanted = importing.Wanted(asked.paths, asked.ref, loads.store_dir)
        async with pullprogress.told(call) as tell:

            def sink(step: progress.Progress) -> None:
                tell(asked.label, step)

            descriptor = call.descriptor(asked.archive)
            opened = self._opener.opened(descriptor, asked.label, wanted.read, sink, piped=True)
            async with opened as (source, found):
                async for name in importing.load(loads, source, found, self._shown, sink):
                    await call.reply({"loaded": name})
