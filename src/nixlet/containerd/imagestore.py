"""containerd's image store: records of images, content, snapshots, applying layers; all that loading an image needs."""

import contextlib
import copy
import dataclasses
import datetime
import os
from collections.abc import AsyncIterable, AsyncIterator, Mapping, Sequence
from types import MappingProxyType

from nixlet import errors
from nixlet.containerd import client
from nixlet.rpc import channel as channels
from nixlet.rpc.gen import (
    containerd_content_grpc,
    containerd_content_pb2,
    containerd_diff_grpc,
    containerd_diff_pb2,
    containerd_images_grpc,
    containerd_images_pb2,
    containerd_leases_grpc,
    containerd_leases_pb2,
    containerd_snapshots_grpc,
    containerd_snapshots_pb2,
    containerd_types_pb2,
)

_CHUNK = 1 << 20

#: Leases that a crash leaves behind end by themselves (label containerd.io/gc.expire).
_LEASE_SECONDS = 24 * 3600


#: The label by which CRI knows images that must not be collected.
PINNED: Mapping[str, str] = MappingProxyType({"io.cri-containerd.pinned": "pinned"})


@dataclasses.dataclass(frozen=True, slots=True)
class Descriptor:
    """What a blob is, and what it is named by (OCI image specification, "Content Descriptors")."""

    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def message(self) -> containerd_types_pb2.Descriptor:
        """The form on the wire."""
        return containerd_types_pb2.Descriptor(
            media_type=self.media_type, digest=self.digest, size=self.size, annotations=self.annotations
        )


class ImageStore(client.Containerd):
    """A containerd's images, seen from one of its namespaces."""

    def __init__(self, channel: channels.Channel, address: str, namespace: str = client.CRI_NAMESPACE) -> None:
        super().__init__(channel, address, namespace)
        self._images = containerd_images_grpc.ImagesStub(channel)
        self._content = containerd_content_grpc.ContentStub(channel)
        self._snapshots = containerd_snapshots_grpc.SnapshotsStub(channel)
        self._diff = containerd_diff_grpc.DiffStub(channel)
        self._leases = containerd_leases_grpc.LeasesStub(channel)

    @contextlib.asynccontextmanager
    async def leased(self) -> AsyncIterator["ImageStore"]:
        """A client of its own, what it makes being kept from containerd's garbage collector for the time of the context."""
        name = f"nixlet-{os.urandom(8).hex()}"
        until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=_LEASE_SECONDS)
        labels = {"containerd.io/gc.expire": until.strftime("%Y-%m-%dT%H:%M:%SZ")}
        with self._translated():
            request = containerd_leases_pb2.CreateRequest(id=name, labels=labels)
            await self._leases.Create(request, metadata=self._metadata)
        holder = copy.copy(self)
        holder._metadata = {**self._metadata, "containerd-lease": name}  # noqa: SLF001 (its own copy)
        try:
            yield holder
        finally:
            # A lease that can't be deleted ends by itself, and must not hide why the work under it failed.
            with contextlib.suppress(errors.NixletError), self._translated():
                await self._leases.Delete(containerd_leases_pb2.DeleteRequest(id=name), metadata=self._metadata)

    # Images.

    async def image(self, name: str) -> containerd_images_pb2.Image | None:
        """An image's record, or None."""
        try:
            with self._translated():
                request = containerd_images_pb2.GetImageRequest(name=name)
                return (await self._images.Get(request, metadata=self._metadata)).image
        except errors.NotFoundError:
            return None

    async def images(self, *filters: str) -> Sequence[containerd_images_pb2.Image]:
        """The records of images that match one of the filters, in containerd's language; of all without."""
        with self._translated():
            request = containerd_images_pb2.ListImagesRequest(filters=filters)
            return (await self._images.List(request, metadata=self._metadata)).images

    async def untold_pins(self) -> frozenset[str]:
        """The names of pinned images that CRI's list doesn't tell as such: all of them before containerd 1.7, then none."""
        if await self.release() >= (1, 7):
            return frozenset()
        ((label, value),) = PINNED.items()
        return frozenset(image.name for image in await self.images(f'labels."{label}"=={value}'))

    async def label_image(self, record: containerd_images_pb2.Image, labels: Mapping[str, str]) -> None:
        """Set labels of an image; an empty value takes a label away.

        Raises:
            NotFoundError: It is gone.
        """
        # containerd 1.7 ends in a panic when the target is missing, although the mask says that it isn't looked at.
        image = containerd_images_pb2.Image(name=record.name, target=record.target, labels=labels)
        request = containerd_images_pb2.UpdateImageRequest(image=image)
        request.update_mask.paths.extend(f"labels.{label}" for label in labels)
        with self._translated():
            await self._images.Update(request, metadata=self._metadata)

    async def put_image(self, name: str, target: Descriptor, labels: Mapping[str, str]) -> None:
        """Make an image's record, or let an existing one point to a new target."""
        image = containerd_images_pb2.Image(name=name, labels=labels, target=target.message())
        try:
            with self._translated():
                await self._images.Create(
                    containerd_images_pb2.CreateImageRequest(image=image), metadata=self._metadata
                )
        except errors.AlreadyExistsError:
            with self._translated():
                await self._images.Update(
                    containerd_images_pb2.UpdateImageRequest(image=image), metadata=self._metadata
                )

    # Content.

    async def has_content(self, digest: str) -> bool:
        """Whether a blob is there."""
        try:
            with self._translated():
                await self._content.Info(containerd_content_pb2.InfoRequest(digest=digest), metadata=self._metadata)
        except errors.NotFoundError:
            return False
        return True

    async def read_content(self, digest: str) -> bytes:
        """A small blob, whole.

        Raises:
            NotFoundError: It is not there.
        """
        request = containerd_content_pb2.ReadContentRequest(digest=digest)
        chunks = []
        with self._translated():
            async with self._content.Read.open(metadata=self._metadata) as stream:
                await stream.send_message(request, end=True)
                chunks = [response.data async for response in stream]
        return b"".join(chunks)

    async def write_content(
        self, digest: str, size: int, chunks: AsyncIterable[bytes], labels: Mapping[str, str]
    ) -> None:
        """Write a blob; containerd checks its size and digest. One that is there already only gets the labels."""
        reference = f"nixlet-{digest}-{os.urandom(4).hex()}"
        write = containerd_content_pb2.WriteContentRequest
        try:
            with self._translated():
                async with self._content.Write.open(metadata=self._metadata) as stream:
                    offset = 0
                    async for chunk in chunks:
                        for start in range(0, len(chunk), _CHUNK):
                            part = chunk[start : start + _CHUNK]
                            await stream.send_message(
                                write(
                                    action=containerd_content_pb2.WRITE,
                                    ref=reference,
                                    offset=offset,
                                    data=part,
                                    total=size,
                                )
                            )
                            await stream.recv_message()
                            offset += len(part)
                    commit = write(
                        action=containerd_content_pb2.COMMIT,
                        ref=reference,
                        offset=offset,
                        total=size,
                        expected=digest,
                        labels=labels,
                    )
                    await stream.send_message(commit, end=True)
                    await stream.recv_message()
        except errors.AlreadyExistsError:
            await self.label_content(digest, labels)

    async def label_content(self, digest: str, labels: Mapping[str, str]) -> None:
        """Add labels to a blob."""
        request = containerd_content_pb2.UpdateRequest(info=containerd_content_pb2.Info(digest=digest, labels=labels))
        request.update_mask.paths.extend(f"labels.{label}" for label in labels)
        if labels:
            with self._translated():
                await self._content.Update(request, metadata=self._metadata)

    # Snapshots.

    async def snapshot(self, snapshotter: str, key: str) -> containerd_snapshots_pb2.Info | None:
        """What is known of a snapshot, or None."""
        try:
            with self._translated():
                request = containerd_snapshots_pb2.StatSnapshotRequest(snapshotter=snapshotter, key=key)
                return (await self._snapshots.Stat(request, metadata=self._metadata)).info
        except errors.NotFoundError:
            return None

    async def prepare_snapshot(
        self, snapshotter: str, key: str, parent: str, labels: Mapping[str, str]
    ) -> Sequence[containerd_types_pb2.Mount]:
        """Make an active snapshot."""
        request = containerd_snapshots_pb2.PrepareSnapshotRequest(
            snapshotter=snapshotter, key=key, parent=parent, labels=labels
        )
        with self._translated():
            return (await self._snapshots.Prepare(request, metadata=self._metadata)).mounts

    async def commit_snapshot(self, snapshotter: str, name: str, key: str, labels: Mapping[str, str]) -> None:
        """Commit an active snapshot."""
        request = containerd_snapshots_pb2.CommitSnapshotRequest(
            snapshotter=snapshotter, name=name, key=key, labels=labels
        )
        with self._translated():
            await self._snapshots.Commit(request, metadata=self._metadata)

    async def remove_snapshot(self, snapshotter: str, key: str) -> None:
        """Remove a snapshot; one that is not there is no error."""
        with contextlib.suppress(errors.NotFoundError), self._translated():
            request = containerd_snapshots_pb2.RemoveSnapshotRequest(snapshotter=snapshotter, key=key)
            await self._snapshots.Remove(request, metadata=self._metadata)

    async def label_snapshot(self, snapshotter: str, name: str, labels: Mapping[str, str]) -> None:
        """Add labels to a snapshot."""
        request = containerd_snapshots_pb2.UpdateSnapshotRequest(
            snapshotter=snapshotter, info=containerd_snapshots_pb2.Info(name=name, labels=labels)
        )
        request.update_mask.paths.extend(f"labels.{label}" for label in labels)
        with self._translated():
            await self._snapshots.Update(request, metadata=self._metadata)

    async def snapshot_mounts(self, snapshotter: str, key: str) -> Sequence[containerd_types_pb2.Mount]:
        """The mounts of an active snapshot."""
        request = containerd_snapshots_pb2.MountsRequest(snapshotter=snapshotter, key=key)
        with self._translated():
            return (await self._snapshots.Mounts(request, metadata=self._metadata)).mounts

    async def apply(self, layer: Descriptor, mounts: Sequence[containerd_types_pb2.Mount]) -> str:
        """Unpack a layer onto mounts; the digest of the uncompressed tar."""
        request = containerd_diff_pb2.ApplyRequest(diff=layer.message(), mounts=mounts)
        with self._translated():
            return (await self._diff.Apply(request, metadata=self._metadata)).applied.digest
