"""containerd's snapshots service (containerd.services.snapshots.v1) in front of the snapshotter.

The request's ``snapshotter`` is not looked at: a proxy plugin is one snapshotter. Keys come with containerd's namespace in them.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from google.protobuf import empty_pb2

from nixlet import errors
from nixlet.rpc import server
from nixlet.rpc.gen import containerd_snapshots_grpc, containerd_types_pb2
from nixlet.rpc.gen import containerd_snapshots_pb2 as pb
from nixlet.snapshots import model
from nixlet.snapshots import snapshotter as snapshotter_module

if TYPE_CHECKING:
    from google.protobuf.internal.containers import RepeatedCompositeFieldContainer

_NANOSECONDS = 10**9

_KINDS = {model.Kind.VIEW: pb.VIEW, model.Kind.ACTIVE: pb.ACTIVE, model.Kind.COMMITTED: pb.COMMITTED}


def _fill(message: pb.Info, info: model.Info) -> None:
    """Write a snapshot's info into a message where it stands: every message that is made apart is copied when it is put into another."""
    message.name = info.name
    message.parent = info.parent
    message.kind = _KINDS[info.kind]
    for stamp, nanoseconds in ((message.created_at, info.created), (message.updated_at, info.updated)):
        stamp.seconds, stamp.nanos = divmod(nanoseconds, _NANOSECONDS)
    message.labels.update(info.labels)


def _add(
    answered: "RepeatedCompositeFieldContainer[containerd_types_pb2.Mount]", mounts: Iterable[model.Mount]
) -> None:
    for mount in mounts:
        answered.add(type=mount.type, source=mount.source, target=mount.target, options=mount.options)


class SnapshotsService(containerd_snapshots_grpc.SnapshotsBase):
    """The service; its methods are named as on the wire."""

    def __init__(self, snapshotter: snapshotter_module.Snapshotter) -> None:
        self._snapshotter = snapshotter

    async def Prepare(self, stream: server.Stream[pb.PrepareSnapshotRequest, pb.PrepareSnapshotResponse]) -> None:
        """Make an active snapshot."""
        request = await server.request(stream)
        response = pb.PrepareSnapshotResponse()
        _add(response.mounts, await self._snapshotter.prepare(request.key, request.parent, dict(request.labels)))
        await stream.send_message(response)

    async def View(self, stream: server.Stream[pb.ViewSnapshotRequest, pb.ViewSnapshotResponse]) -> None:
        """Make a read-only snapshot."""
        request = await server.request(stream)
        response = pb.ViewSnapshotResponse()
        _add(response.mounts, await self._snapshotter.view(request.key, request.parent, dict(request.labels)))
        await stream.send_message(response)

    async def Mounts(self, stream: server.Stream[pb.MountsRequest, pb.MountsResponse]) -> None:
        """The mounts of an active or view snapshot."""
        request = await server.request(stream)
        response = pb.MountsResponse()
        _add(response.mounts, await self._snapshotter.mounts(request.key))
        await stream.send_message(response)

    async def Commit(self, stream: server.Stream[pb.CommitSnapshotRequest, empty_pb2.Empty]) -> None:
        """Turn an active snapshot into a committed one."""
        request = await server.request(stream)
        await self._snapshotter.commit(request.name, request.key, dict(request.labels))
        await stream.send_message(empty_pb2.Empty())

    async def Remove(self, stream: server.Stream[pb.RemoveSnapshotRequest, empty_pb2.Empty]) -> None:
        """Remove a snapshot."""
        request = await server.request(stream)
        await self._snapshotter.remove(request.key)
        await stream.send_message(empty_pb2.Empty())

    async def Stat(self, stream: server.Stream[pb.StatSnapshotRequest, pb.StatSnapshotResponse]) -> None:
        """What is known of a snapshot."""
        request = await server.request(stream)
        response = pb.StatSnapshotResponse()
        _fill(response.info, await self._snapshotter.stat(request.key))
        await stream.send_message(response)

    async def Update(self, stream: server.Stream[pb.UpdateSnapshotRequest, pb.UpdateSnapshotResponse]) -> None:
        """Change a snapshot's labels."""
        request = await server.request(stream)
        if not request.HasField("info"):
            raise errors.InvalidArgumentError("an update needs the snapshot's info")
        fields = list(request.update_mask.paths) if request.HasField("update_mask") else None
        response = pb.UpdateSnapshotResponse()
        _fill(response.info, await self._snapshotter.update(request.info.name, dict(request.info.labels), fields))
        await stream.send_message(response)

    async def List(self, stream: server.Stream[pb.ListSnapshotsRequest, pb.ListSnapshotsResponse]) -> None:
        """All snapshots, in pages."""
        request = await server.request(stream)
        async for page in self._snapshotter.pages(request.filters):
            response = pb.ListSnapshotsResponse()
            for info in page:
                _fill(response.info.add(), info)
            await stream.send_message(response)

    async def Usage(self, stream: server.Stream[pb.UsageRequest, pb.UsageResponse]) -> None:
        """What a snapshot takes of the disk."""
        request = await server.request(stream)
        usage = await self._snapshotter.usage(request.key)
        await stream.send_message(pb.UsageResponse(size=usage.size, inodes=usage.inodes))

    async def Cleanup(self, stream: server.Stream[pb.CleanupRequest, empty_pb2.Empty]) -> None:
        """Sweep what no snapshot needs."""
        await server.request(stream)
        await self._snapshotter.cleanup()
        await stream.send_message(empty_pb2.Empty())
