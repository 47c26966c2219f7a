"""Loading an image into containerd: content, record, and unpacked layers, over its own API.

Works with every containerd, since it needs neither the Transfer service nor a client that passes annotations on: each layer's
snapshot is prepared with the annotations as labels, applied by containerd's Diff service, and committed under its chain ID.
"""

import asyncio
import dataclasses
import os
from collections.abc import AsyncIterator, Mapping, Sequence

from nixlet import errors
from nixlet.containerd import imagestore
from nixlet.images import archive, model
from nixlet.store import closures, interface, paths, realiser
from nixlet.telemetry import progress

_CHUNK = 1 << 20

#: Annotations below this name become labels of the layer's snapshot, as containerd's own unpacker does.
_INHERITED = "containerd.io/snapshot/"
_SNAPSHOT_REF = "containerd.io/snapshot.ref"

#: The label by which CRI knows its images; it sets it by itself on what it sees appear.
_MANAGED = {"io.cri-containerd.image": "managed"}


@dataclasses.dataclass(frozen=True, slots=True)
class Loaded:
    """An image that was loaded.

    Attributes:
        image_id: Its ID, the digest of its configuration.
        closure_paths: How many store paths its layers name.
        took: What had to be fetched of them.
    """

    image_id: str
    closure_paths: int
    took: interface.Realised


class Loader:
    """Loads images into one containerd for one snapshotter.

    Args:
        containerd: The containerd.
        snapshotter: What it calls the snapshotter.
        realise: Brings the store paths that layers name; None where the snapshotter can't show them.
    """

    def __init__(
        self, containerd: imagestore.ImageStore, snapshotter: str, realise: realiser.Realiser | None = None
    ) -> None:
        self._containerd = containerd
        self._snapshotter = snapshotter
        self._realiser = realise

    async def load(
        self,
        source: archive.Archive,
        image: archive.ArchiveImage,
        names: Sequence[str],
        *,
        if_free: Sequence[str] = (),
        labels: Mapping[str, str] | None = None,
        sink: progress.ProgressSink = progress.ignore,
    ) -> Loaded:
        """Load an image under names, each taken from the image that has it now; realise first what its layers name.

        Args:
            source: The open archive that holds it.
            image: The image.
            names: As containerd records them.
            if_free: What a foreign archive calls the image itself: it must not be able to take a name away.
            labels: For the records under ``names``.
            sink: Gets the progress.

        Raises:
            NixletError: A layer can't be read, realised or unpacked; nothing of it stays once containerd has collected.
        """
        closure_paths, took = await self._realise(image, sink)
        manifest = image.manifest
        chain = model.chain_ids([layer.diff_id for layer in image.layers])
        async with self._containerd.leased() as containerd:
            total = len(image.layers)
            parent = ""
            for number, (layer, chain_id) in enumerate(zip(image.layers, chain, strict=True)):
                sink(progress.Progress("loading", number, total, "layers"))
                await self._copy(containerd, source, layer.descriptor, {})
                await self._unpack(containerd, layer, parent, chain_id)
                parent = chain_id
            # Labels tell containerd's garbage collector what a blob needs: the configuration its snapshots, the manifest
            # the configuration and the layers.
            config_labels = {f"containerd.io/gc.ref.snapshot.{self._snapshotter}": chain[-1]} if chain else {}
            await self._copy(containerd, source, manifest.config, config_labels)
            references = {"containerd.io/gc.ref.content.config": manifest.config.digest}
            for number, descriptor in enumerate(manifest.layers):
                references[f"containerd.io/gc.ref.content.l.{number}"] = descriptor.digest
            await self._copy(containerd, source, image.descriptor, references)
            target = imagestore.Descriptor(image.descriptor.media_type, image.descriptor.digest, image.descriptor.size)
            for name in names:
                await containerd.put_image(name, target, {**_MANAGED, **(labels or {})})
            for name in if_free:
                if await containerd.image(name) is None:
                    await containerd.put_image(name, target, _MANAGED)
            sink(progress.Progress("loading", total, total, "layers"))
        return Loaded(manifest.config.digest, closure_paths, took)

    async def _realise(
        self, image: archive.ArchiveImage, sink: progress.ProgressSink
    ) -> tuple[int, interface.Realised]:
        """Realise what the layers name, before containerd unpacks them: here is a channel for progress and exact errors."""
        members: set[paths.StorePath] = set()
        took = interface.Realised()
        for layer in image.layers:
            named = self._closure(layer)
            if named is None:
                continue
            if self._realiser is None:
                raise errors.FailedPreconditionError(
                    f"the image is made of store paths, which the snapshotter {self._snapshotter} can't run",
                    hint="start the node with --snapshotter nix",
                )
            realised = await self._realiser.realise_closure(named, sink=sink)
            members.update(realised.paths)
            took += realised.took
        return len(members), took

    def _closure(self, layer: archive.Layer) -> closures.ClosureReference | None:
        store_dir = self._realiser.store_dir if self._realiser is not None else paths.DEFAULT_STORE_DIR
        return closures.parse_annotations(layer.descriptor.annotations or {}, store_dir)

    @staticmethod
    async def _copy(
        containerd: imagestore.ImageStore, source: archive.Archive, blob: model.Descriptor, labels: Mapping[str, str]
    ) -> None:
        if await containerd.has_content(blob.digest):
            await containerd.label_content(blob.digest, labels)
        else:
            await containerd.write_content(blob.digest, blob.size, _chunks(source, blob.digest), labels)

    async def _unpack(self, containerd: imagestore.ImageStore, layer: archive.Layer, parent: str, name: str) -> None:
        annotations = layer.descriptor.annotations or {}
        inherited = {key: value for key, value in annotations.items() if key.startswith(_INHERITED)}
        existing = await containerd.snapshot(self._snapshotter, name)
        if existing is None:
            await self._unpack_anew(containerd, layer, parent, name, inherited)
        elif self._closure(layer) is not None and not inherited.items() <= existing.labels.items():
            # A client that passes no annotations on unpacked it before: its containers would see empty mount points.
            # The labels mend that.
            await containerd.label_snapshot(self._snapshotter, name, inherited)

    async def _unpack_anew(
        self,
        containerd: imagestore.ImageStore,
        layer: archive.Layer,
        parent: str,
        name: str,
        inherited: Mapping[str, str],
    ) -> None:
        labels = {**inherited, _SNAPSHOT_REF: name}
        key = f"extract-{os.urandom(8).hex()} {name}"
        mounts = await containerd.prepare_snapshot(self._snapshotter, key, parent, labels)
        try:
            blob = layer.descriptor
            applied = await containerd.apply(imagestore.Descriptor(blob.media_type, blob.digest, blob.size), mounts)
            if applied != layer.diff_id:
                raise errors.InvalidArgumentError(
                    f"the layer {blob.digest} unpacks to {applied}, but the image's configuration says {layer.diff_id}"
                )
            await containerd.commit_snapshot(self._snapshotter, name, key, labels)
        except errors.AlreadyExistsError:
            # Somebody else unpacked the same layer meanwhile.
            await containerd.remove_snapshot(self._snapshotter, key)
        except BaseException:
            await containerd.remove_snapshot(self._snapshotter, key)
            raise


async def _chunks(source: archive.Archive, digest: str) -> AsyncIterator[bytes]:
    with source.open_blob(digest) as blob:
        while chunk := await asyncio.to_thread(blob.read, _CHUNK):
            yield chunk
