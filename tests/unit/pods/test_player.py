"""Containers that end before the runtime has said that they started; pods that are played at once."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from google.protobuf import any_pb2, empty_pb2
from grpclib import const
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from nixlet import errors
from nixlet.containerd import client, cri
from nixlet.containers import model
from nixlet.host import unixsocket
from nixlet.pods import player, removal, undoing
from nixlet.rpc import channel as channels
from nixlet.rpc import server
from nixlet.rpc.gen import containerd_events_grpc, cri_pb2
from nixlet.rpc.gen import containerd_events_pb2 as events_pb2
from nixlet.rpc.gen import containerd_introspection_pb2 as introspection_pb2


class Runtime:
    """Loses the answer of a shim, as containerd does when a container ends while it is being started."""

    def __init__(self, events: "Events", reason: str) -> None:
        self._events = events
        self._reason = reason

    async def _start(self, stream: "server.Stream[cri_pb2.StartContainerRequest, object]") -> None:
        await server.request(stream)
        await self._events.subscribed.wait()
        self._events.ended.set()
        raise GRPCError(Status.UNKNOWN, self._reason)

    def __mapping__(self) -> dict[str, const.Handler]:
        unary = const.Cardinality.UNARY_UNARY
        types = (cri_pb2.StartContainerRequest, cri_pb2.StartContainerResponse)
        return {"/runtime.v1.RuntimeService/StartContainer": const.Handler(self._start, unary, *types)}


class Events(containerd_events_grpc.EventsBase):
    """Tells of the ends of two processes."""

    def __init__(self) -> None:
        self.subscribed = asyncio.Event()
        self.ended = asyncio.Event()

    async def Subscribe(  # noqa: N802
        self, stream: server.Stream[events_pb2.SubscribeRequest, events_pb2.Envelope]
    ) -> None:
        await server.request(stream)
        self.subscribed.set()
        await self.ended.wait()
        for container, process, status in (("other", "other", 1), ("c", "exec", 2), ("c", "c", 42)):
            event = events_pb2.TaskExit(container_id=container, id=process, exit_status=status)
            value = any_pb2.Any(type_url="containerd.events.TaskExit", value=event.SerializeToString())
            await stream.send_message(events_pb2.Envelope(topic="/tasks/exit", event=value))


@contextlib.asynccontextmanager
async def starting(directory: Path, reason: str) -> AsyncIterator[tuple[player.Player, client.Exits]]:
    path = str(directory / "run" / "c.sock")
    events = Events()
    async with (
        server.serve(unixsocket.listen(path), [events, Runtime(events, reason)]),
        channels.connect(path) as channel,
    ):
        containerd = client.Containerd(channel, path)
        async with containerd.exits("c") as exits:
            runtime = cri.RuntimeClient(channel, path)
            undoings = undoing.Undoings(runtime, containerd, pods_dir="", leases="")
            yield player.Player(runtime, containerd, undoings, removal.Removals(runtime, ""), pods_dir=""), exits


async def test_a_container_that_ends_at_once_has_started(tmp_path: Path) -> None:
    """The answer to its start is lost when containerd closes the connection to its shim for its end."""
    async with starting(tmp_path, "failed to start containerd task: ttrpc: closed") as (plays, exits):
        assert await plays._started("c", exits) == 42


async def test_other_failures_are_failures(tmp_path: Path) -> None:
    async with starting(tmp_path, "OCI runtime create failed") as (plays, exits):
        with pytest.raises(errors.NixletError, match="OCI runtime create failed"):
            await plays._started("c", exits)


class SlowRuntime:
    """Has no pods, and makes none as long as it is asked to."""

    def __init__(self) -> None:
        self.making: asyncio.Queue[str] = asyncio.Queue()

    async def _list(self, stream: "server.Stream[object, cri_pb2.ListPodSandboxResponse]") -> None:
        await server.request(stream)
        await stream.send_message(cri_pb2.ListPodSandboxResponse())

    async def _identify(self, stream: "server.Stream[object, introspection_pb2.ServerResponse]") -> None:
        await server.request(stream)
        await stream.send_message(introspection_pb2.ServerResponse(uuid="slow"))

    async def _run(self, stream: "server.Stream[cri_pb2.RunPodSandboxRequest, object]") -> None:
        request = await server.request(stream)
        self.making.put_nowait(request.config.metadata.name)
        await asyncio.Event().wait()

    def __mapping__(self) -> dict[str, const.Handler]:
        unary = const.Cardinality.UNARY_UNARY
        listing = (cri_pb2.ListPodSandboxRequest, cri_pb2.ListPodSandboxResponse)
        identifying = (empty_pb2.Empty, introspection_pb2.ServerResponse)
        running = (cri_pb2.RunPodSandboxRequest, cri_pb2.RunPodSandboxResponse)
        return {
            "/runtime.v1.RuntimeService/ListPodSandbox": const.Handler(self._list, unary, *listing),
            "/containerd.services.introspection.v1.Introspection/Server": const.Handler(
                self._identify, unary, *identifying
            ),
            "/runtime.v1.RuntimeService/RunPodSandbox": const.Handler(self._run, unary, *running),
        }


async def test_pods_that_are_played_at_once_dont_get_the_same_port(tmp_path: Path) -> None:
    path = str(tmp_path / "run" / "c.sock")
    runtime = SlowRuntime()
    async with server.serve(unixsocket.listen(path), [runtime]), channels.connect(path) as channel:
        connection = client.Containerd(channel, path)
        asked, pods_dir = cri.RuntimeClient(channel, path), str(tmp_path / "pods")
        undoings = undoing.Undoings(asked, connection, pods_dir=pods_dir, leases="")
        removals = removal.Removals(asked, pods_dir)
        plays = player.Player(asked, connection, undoings, removals, pods_dir=pods_dir)

        async def obtain(_: model.Container) -> cri_pb2.Image:
            return cri_pb2.Image(id="x")

        def begin(name: str, port: int) -> "asyncio.Task[player.RunningPod]":
            # Whether a program has a port of SCTP is not looked at.
            container = model.Container("c", "x", "Never", ports=(model.Port(80, port, protocol="SCTP"),))
            return asyncio.create_task(plays.play(model.Pod(name, containers=(container,)), obtain, asyncio.Event()))

        # None waits for another: what is refused is refused before the runtime knows of any.
        playing = [begin("one", 7000), begin("two", 7000), begin("other", 7001)]
        try:
            async with asyncio.timeout(30):
                assert {await runtime.making.get(), await runtime.making.get()} == {"one", "other"}
            assert [each.done() for each in playing] == [False, True, False]
            with pytest.raises(errors.FailedPreconditionError, match=r"^port 7000 .* is offered for pod one already"):
                await playing[1]
        finally:
            for each in playing:
                each.cancel()
            await asyncio.gather(*playing, return_exceptions=True)
