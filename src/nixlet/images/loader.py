"""Loading an image into containerd: content, record, and unpacked layers, over its own API.

Works with every containerd, since it needs neither the Transfer service nor a client that passes annotations on: each layer's
snapshot is prepared with the annotations as labels, applied by containerd's Diff service, and committed under its chain ID.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence

from nixlet import errors
from nixlet.containerd import imagestore
from nixlet.images import archive, model
from nixlet.store import closures
from nixlet.telemetry import progress

_CHUNK = 1 << 20

#: Annotations below this name become labels of the layer's snapshot, as containerd's own unpacker does.
_INHERITED = "containerd.io/snapshot/"
_SNAPSHOT_REF = "containerd.io/snapshot.ref"

#: The label by which CRI knows its images; it sets it by itself on what it sees appear.
_MANAGED = {"io.cri-containerd.image": "managed"}
PINNED = {"io.cri-containerd.pinned": "pinned"}


class Loader:
    """Loads images into one containerd for one snapshotter."""

    def __init__(self, containerd: imagestore.ImageStore, snapshotter: str) -> None:
        self._containerd = containerd
        self._snapshotter = snapshotter

    async def load(
        self,
        source: archive.Archive,
        image: archive.ArchiveImage,
        name: str,
        *,
        other_names: Sequence[str] = (),
        labels: Mapping[str, str] | None = None,
        sink: progress.ProgressSink = progress.ignore,
    ) -> str:
        """Load an image under a name; its ID, which is the digest of its configuration.

        ``other_names`` are what an archive calls the image itself. They are taken up only where they are free: an archive
        must not be able to take a name away from the image that has it.

        Raises:
            NixletError: A layer can't be read, realised or unpacked; nothing of it stays once containerd has collected.
        """
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
            await containerd.put_image(name, target, {**_MANAGED, **(labels or {})})
            for other in other_names:
                if await containerd.image(other) is None:
                    await containerd.put_image(other, target, _MANAGED)
            sink(progress.Progress("loading", total, total, "layers"))
        return manifest.config.digest

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
        elif closures.parse_annotations(annotations) is not None and not inherited.items() <= existing.labels.items():
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
