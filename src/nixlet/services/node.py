"""The node service (nixlet.v1.Node): how the command line asks the node about itself."""

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence

import nixlet
from nixlet import errors
from nixlet.images import pulls
from nixlet.pods import lifecycle
from nixlet.rpc import server, status
from nixlet.rpc.gen import node_grpc
from nixlet.rpc.gen import node_pb2 as pb
from nixlet.services import pods
from nixlet.snapshots import snapshotter as snapshotter_module

#: A watcher that reads slower than this many events behind misses some; progress is not history.
_BACKLOG = 256


@dataclasses.dataclass(frozen=True, slots=True)
class ChildStatus:
    """One of the node's children."""

    name: str
    pid: int
    version: str


@dataclasses.dataclass(frozen=True, slots=True)
class NodeStatus:
    """What the node is; see ``StatusResponse`` in node.proto."""

    snapshotter: str
    data_dir: str
    state_dir: str
    containerd_address: str
    containerd_config_version: int
    pod_log_dir: str
    resolv_conf: str


class NodeService(node_grpc.NodeBase):
    """The service; its methods are named as on the wire."""

    def __init__(
        self,
        status: NodeStatus,
        children: Callable[[], Sequence[ChildStatus]],
        exchange: pulls.Exchange,
        snapshotter: snapshotter_module.Snapshotter | None,
        plays: pods.Pods,
        kept: lifecycle.Pods,
    ) -> None:
        self._status = status
        self._children = children
        self._exchange = exchange
        self._snapshotter = snapshotter
        self._plays = plays
        self._pods = kept
        self._watches: set[asyncio.Task[None]] = set()

    def close(self) -> None:
        """End the watches, which would go on for ever."""
        for watch in self._watches:
            watch.cancel()

    async def Status(self, stream: server.Stream[pb.StatusRequest, pb.StatusResponse]) -> None:
        """What the node is."""
        await server.request(stream)
        children = [pb.Child(name=child.name, pid=child.pid, version=child.version) for child in self._children()]
        response = pb.StatusResponse(
            version=nixlet.__version__,
            pid=os.getpid(),
            strategy="" if self._snapshotter is None else (await self._snapshotter.strategy()).value,
            children=children,
            **dataclasses.asdict(self._status),
        )
        await stream.send_message(response)

    async def WatchPulls(self, stream: server.Stream[pb.WatchPullsRequest, pb.PullEvent]) -> None:
        """The pulls as they go on."""
        request = await server.request(stream)
        queue: asyncio.Queue[pulls.Event] = asyncio.Queue(_BACKLOG)

        def put(event: pulls.Event) -> None:
            if queue.full() and event.finished:
                queue.get_nowait()
            with contextlib.suppress(asyncio.QueueFull):
                queue.put_nowait(event)

        async def watch() -> None:
            while True:
                event = await queue.get()
                if request.reference in {"", event.reference}:
                    await stream.send_message(_event(event))

        with self._exchange.subscribed(put):
            # The watcher may pull when it knows that nothing will be missed: the headers tell it so.
            await stream.send_initial_metadata()
            watching = asyncio.create_task(watch(), name="watch pulls")
            self._watches.add(watching)
            try:
                await asyncio.wait({watching})
            finally:
                watching.cancel()
                self._watches.discard(watching)

    async def SnapshotClosure(
        self, stream: server.Stream[pb.SnapshotClosureRequest, pb.SnapshotClosureResponse]
    ) -> None:
        """The store paths of a snapshot."""
        request = await server.request(stream)
        if self._snapshotter is None:
            raise errors.FailedPreconditionError(f"the snapshotter {self._status.snapshotter} knows no closures")
        store_paths = self._snapshotter.closure_of(request.name)
        await stream.send_message(pb.SnapshotClosureResponse(store_paths=store_paths))

    async def PlayPod(self, stream: server.Stream[pb.PlayPodRequest, pb.PlayPodEvent]) -> None:
        """Make and start a pod."""
        await self._plays.play(stream)

    async def ReleasePod(self, stream: server.Stream[pb.ReleasePodRequest, pb.ReleasePodResponse]) -> None:
        """Give back what an ended pod holds."""
        self._pods.release((await server.request(stream)).pod_sandbox_id)
        await stream.send_message(pb.ReleasePodResponse())

    async def StopPod(self, stream: server.Stream[pb.StopPodRequest, pb.StopPodResponse]) -> None:
        """End a pod's container."""
        request = await server.request(stream)
        await self._pods.stop(request.pod_sandbox_id, request.container_id, request.grace_seconds)
        await stream.send_message(pb.StopPodResponse())

    async def RemovePod(self, stream: server.Stream[pb.RemovePodRequest, pb.RemovePodResponse]) -> None:
        """Remove a pod."""
        request = await server.request(stream)
        await self._pods.remove(request.pod_sandbox_id, request.grace_seconds)
        await stream.send_message(pb.RemovePodResponse())


def _event(event: pulls.Event) -> pb.PullEvent:
    message = pb.PullEvent(reference=event.reference, finished=event.finished)
    if event.error is not None:
        if isinstance(event.error, errors.NixletError):
            message.error = status.text_of(event.error)
        else:
            message.error = str(event.error) or type(event.error).__name__
    if event.step is not None:
        message.stage, message.done, message.total, message.unit, message.detail = event.step
    if event.pulled is not None:
        message.closure_paths = event.pulled.closure_paths
        message.fetched_paths = event.pulled.took.fetched_paths
        message.fetched_bytes = event.pulled.took.fetched_bytes
        message.duration_ms = event.pulled.duration_ms
    return message
