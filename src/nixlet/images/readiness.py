"""Whether containers of an image would see its closures, looked at before a client learns that the image is there.

An image of store paths can be there without them: imported by a client of containerd that passes no annotations on, or with its
snapshots removed, which containerd then unpacks again by itself. Before version 2, containerd passes no annotations on, either.
"""

import asyncio
import logging

from nixlet import errors
from nixlet.containerd import imagestore
from nixlet.images import archive, closurecheck, loader, model, platforms, reference, targets
from nixlet.rpc.gen import cri_pb2
from nixlet.store import paths

#: How many manifests are remembered: most are asked for again and again.
_REMEMBERED = 256

_log = logging.getLogger("nixlet.pulls")

#: The manifest and configuration of an image whose layers name closures, or None of an image of which none does.
_Found = tuple[model.Manifest, model.ImageConfig] | None


class Readiness:
    """Has the images of one containerd ready for containers.

    Args:
        containerd: The containerd.
        snapshotter: What it calls the snapshotter that shows store paths.
        check: Reads what layers and snapshots name.
        loads: Unpacks layers.
        store_dir: The store that references are of.
    """

    def __init__(
        self,
        containerd: imagestore.ImageStore,
        snapshotter: str,
        check: closurecheck.ClosureCheck,
        loads: loader.Loader,
        store_dir: str = paths.DEFAULT_STORE_DIR,
    ) -> None:
        self._containerd = containerd
        self._snapshotter = snapshotter
        self._check = check
        self._loader = loads
        self._store_dir = store_dir
        #: What was found under the digests that records lead to.
        self._known: dict[str, _Found] = {}

    async def ensure(self, text: str, shown: cri_pb2.Image, elsewhere: str = "") -> None:
        """Unpack an image's layers with their closures where they aren't; what is none of ours is left alone.

        Where that can't be, since a layer has another closure or its paths can't be had, the log says so.

        Args:
            text: By what it was asked for: a reference, or an image's ID.
            shown: What CRI says of it.
            elsewhere: Another snapshotter, which its containers are to have.

        Raises:
            FailedPreconditionError: It is of store paths, which that other snapshotter can't show.
            NixletError: containerd doesn't answer.
        """
        found = await self._found(text, shown)
        if found is None:
            return
        if elsewhere:
            raise closurecheck.not_shown_by(elsewhere, f"the image {text}")
        try:
            await self._ensure_unpacked(*found)
        except errors.NixletError as error:
            # Clients that remove an image ask for it first: it has to be there for them.
            _log.warning("the image %s can't have its store paths: %s", text, error, extra={"hint": error.hint})

    async def _found(self, text: str, shown: cri_pb2.Image) -> _Found:
        # CRI's answer is the same for whatever manifest an image's ID and names lead to: the record alone tells it.
        record = await self._containerd.image(self._name(text)) or await self._containerd.image(shown.id)
        return None if record is None else await self._look_up(record.target.digest)

    async def _ensure_unpacked(self, manifest: model.Manifest, config: model.ImageConfig) -> None:
        chain = model.chain_ids(config.rootfs.diff_ids)
        there = await asyncio.gather(*(self._containerd.snapshot(self._snapshotter, name) for name in chain))
        for layer, info in zip(map(archive.Layer, manifest.layers, config.rootfs.diff_ids), there, strict=True):
            if info is None or not self._check.is_named_alike(layer, info.labels):
                await self._loader.unpack(manifest, config)
                return

    async def _look_up(self, digest: str) -> _Found:
        if digest in self._known:
            return self._known[digest]
        try:
            manifest = await targets.manifest_of(self._containerd, digest, platforms.host_platform())
            of_paths = any(map(closurecheck.may_name_paths, manifest.layers))
            found = (manifest, await targets.read_config(self._containerd, manifest)) if of_paths else None
        except (errors.NotFoundError, errors.InvalidArgumentError):
            # containerd takes more than we read, and says itself what is missing.
            return None
        if found is not None and len(manifest.layers) != len(found[1].rootfs.diff_ids):
            found = None
        # The oldest goes.
        while len(self._known) >= _REMEMBERED:
            del self._known[next(iter(self._known))]
        self._known[digest] = found
        return found

    def _name(self, text: str) -> str:
        """The name that containerd records; an ID is one by itself."""
        try:
            return text if text.startswith("sha256:") else reference.canonical(reference.parse(text, self._store_dir))
        except errors.InvalidArgumentError:
            return text
