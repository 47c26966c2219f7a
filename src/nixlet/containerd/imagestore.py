"""containerd's image store: records of images, content, snapshots, applying layers; all that loading an image needs."""

import contextlib
import copy
import dataclasses
import functools
import os
from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping, Sequence
from types import MappingProxyType

from grpclib import client as grpc_client
from grpclib import exceptions

from nixlet import errors
from nixlet.containerd import client, leases, namespaces
from nixlet.rpc import channel as channels
from nixlet.rpc.gen import (
    containerd_content_grpc,
    containerd_content_pb2,
    containerd_diff_grpc,
    containerd_diff_pb2,
    containerd_images_grpc,
    containerd_images_pb2,
    containerd_snapshots_grpc,
    containerd_snapshots_pb2,
    containerd_types_pb2,
)

_CHUNK = 1 << 20

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


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """What an image's record is to say; labels that it has besides don't matter."""

    target: Descriptor
    labels: Mapping[str, str]

    def is_met_by(self, image: containerd_images_pb2.Image) -> bool:
        """Whether a record says it."""
        return image.target == self.target.message() and self.labels.items() <= image.labels.items()


class ImageStore(client.Containerd):
    """A containerd's images, seen from one of its namespaces."""

    def __init__(self, channel: channels.Channel, address: str, namespace: str = namespaces.CRI) -> None:
        super().__init__(channel, address, namespace)
        self._images = containerd_images_grpc.ImagesStub(channel)
        self._content = containerd_content_grpc.ContentStub(channel)
        self._snapshots = containerd_snapshots_grpc.SnapshotsStub(channel)
        self._diff = containerd_diff_grpc.DiffStub(channel)
        self._leases = leases.Leases(channel, self._peer, self._metadata)

    @contextlib.asynccontextmanager
    async def leased(self) -> AsyncIterator["ImageStore"]:
        """A client of its own; what it makes, and what it finds made, is kept from containerd's garbage collector.

        That lasts for the time of the context.
        """
        async with self._leases.held() as name:
            holder = copy.copy(self)
            holder._metadata = {**self._metadata, "containerd-lease": name}  # noqa: SLF001 (its own copy)
            yield holder

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

    async def create_image(self, name: str, target: Descriptor, labels: Mapping[str, str]) -> bool:
        """Make an image's record; False if there is one of that name."""
        image = containerd_images_pb2.Image(name=name, labels=labels, target=target.message())
        try:
            with self._translated():
                request = containerd_images_pb2.CreateImageRequest(image=image)
                await self._images.Create(request, metadata=self._metadata)
        except errors.AlreadyExistsError:
            return False
        return True

    async def put_image(self, name: str, target: Descriptor, labels: Mapping[str, str]) -> None:
        """Make an image's record, or let an existing one point to a new target; labels that it has besides stay."""
        image = containerd_images_pb2.Image(name=name, labels=labels, target=target.message())
        update = containerd_images_pb2.UpdateImageRequest(image=image)
        update.update_mask.paths.extend(["target", *(f"labels.{label}" for label in labels)])
        record = Record(target, labels)
        while not await self.create_image(name, target, labels):
            there = await self.image(name)
            # Without a need nothing is written: each change is a commit to the disk.
            if there is not None and record.is_met_by(there):
                return
            # It may go between the two calls.
            with contextlib.suppress(errors.NotFoundError), self._translated():
                await self._images.Update(update, metadata=self._metadata)
                return

    async def delete_image(self, record: containerd_images_pb2.Image) -> None:
        """Delete an image's record; one that is gone is no error. containerd 2 spares one that leads elsewhere by now."""
        request = containerd_images_pb2.DeleteImageRequest(name=record.name, target=record.target)
        with contextlib.suppress(errors.NotFoundError), self._translated():
            await self._images.Delete(request, metadata=self._metadata)

    # Content.

    async def read_content(self, digest: str, most: int) -> bytes:
        """A small blob; of one that is larger the beginning, since whoever made an image chooses what its descriptors lead to.

        Args:
            digest: Its digest.
            most: How much is read at most (bytes).

        Raises:
            NotFoundError: It is not there.
        """
        request = containerd_content_pb2.ReadContentRequest(digest=digest)
        text = b""
        with self._translated():
            async with self._content.Read.open(metadata=self._metadata) as stream:
                await stream.send_message(request, end=True)
                async for response in stream:
                    text += response.data
                    if len(text) >= most:
                        await channels.hang_up(stream)
                        break
        return text[:most]

    async def write_content(
        self, digest: str, size: int, chunks: Callable[[], AsyncIterable[bytes]], labels: Mapping[str, str]
    ) -> None:
        """Have a blob; one that is there already isn't read again, but gets the labels, and is leased as a new one is.

        Args:
            digest: Its digest, which containerd checks.
            size: Its size in bytes, which containerd checks.
            chunks: Opens its content.
            labels: Its labels.
        """
        while True:
            try:
                if await self._write_content(digest, size, chunks, labels):
                    return
            except errors.AlreadyExistsError:
                # Somebody else wrote it meanwhile: only the answer to a first message means that it is leased, too.
                continue
            await self.label_content(digest, labels)
            return

    async def _write_content(
        self, digest: str, size: int, chunks: Callable[[], AsyncIterable[bytes]], labels: Mapping[str, str]
    ) -> bool:
        """Write a blob; False if it was there from the start.

        Raises:
            AlreadyExistsError: It appeared meanwhile.
        """
        reference = f"nixlet-{digest}-{os.urandom(4).hex()}"
        message = functools.partial(containerd_content_pb2.WriteContentRequest, ref=reference, total=size)
        begun = False
        try:
            with self._translated():
                async with self._content.Write.open(metadata=self._metadata) as stream:
                    first = message(action=containerd_content_pb2.STAT, expected=digest)
                    # Another namespace may have it all; the content is then only made known to ours.
                    offset = (await _exchanged(stream, first)).offset
                    begun = True
                    if offset < size:
                        async for part in _in_parts(chunks()):
                            write = message(action=containerd_content_pb2.WRITE, offset=offset, data=part)
                            await _exchanged(stream, write)
                            offset += len(part)
                    commit = message(
                        action=containerd_content_pb2.COMMIT, offset=offset, expected=digest, labels=labels
                    )
                    await _exchanged(stream, commit, end=True)
        except errors.AlreadyExistsError:
            if begun:
                raise
            return False
        return True

    async def content_labels(self, digest: str) -> Mapping[str, str] | None:
        """The labels of a blob; None: it is not there."""
        try:
            with self._translated():
                asked = containerd_content_pb2.InfoRequest(digest=digest)
                return (await self._content.Info(asked, metadata=self._metadata)).info.labels
        except errors.NotFoundError:
            return None

    async def label_content(self, digest: str, labels: Mapping[str, str]) -> None:
        """Add labels to a blob, as far as it lacks them."""
        with self._translated():
            asked = containerd_content_pb2.InfoRequest(digest=digest)
            there = (await self._content.Info(asked, metadata=self._metadata)).info.labels
            if labels.items() <= there.items():
                return
            info = containerd_content_pb2.Info(digest=digest, labels=labels)
            request = containerd_content_pb2.UpdateRequest(info=info)
            request.update_mask.paths.extend(f"labels.{label}" for label in labels)
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
        """Make an active snapshot.

        Raises:
            AlreadyExistsError: The committed snapshot that the label containerd.io/snapshot.ref names is there.
        """
        request = containerd_snapshots_pb2.PrepareSnapshotRequest(
            snapshotter=snapshotter, key=key, parent=parent, labels=labels
        )
        with self._translated():
            return (await self._snapshots.Prepare(request, metadata=self._metadata)).mounts

    async def hold_snapshot(self, snapshotter: str, name: str) -> containerd_snapshots_pb2.Info | None:
        """What is known of a snapshot, or None; in a lease's context it is leased, as one that was made there is.

        containerd 1.6 doesn't lease a snapshot when it answers that it exists, as later versions do.
        """
        lease = self._metadata.get("containerd-lease", "")
        if lease:
            await self._leases.add(lease, f"snapshots/{snapshotter}", name)
        return await self.snapshot(snapshotter, name)

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


async def _in_parts(chunks: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    async for chunk in chunks:
        for start in range(0, len(chunk), _CHUNK):
            yield chunk[start : start + _CHUNK]


async def _exchanged(
    stream: grpc_client.Stream[containerd_content_pb2.WriteContentRequest, containerd_content_pb2.WriteContentResponse],
    message: containerd_content_pb2.WriteContentRequest,
    *,
    end: bool = False,
) -> containerd_content_pb2.WriteContentResponse:
    await stream.send_message(message, end=end)
    answer = await stream.recv_message()
    if answer is None:
        # With this error the stream's end tells why.
        raise exceptions.StreamTerminatedError("the stream ended")
    return answer
