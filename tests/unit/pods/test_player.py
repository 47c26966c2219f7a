"""Containers that end before the runtime has said that they started; pods that are played at once, or after one that has ended."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import any_pb2, empty_pb2
from grpclib import const
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from nixlet import errors
from nixlet.containerd import client, cri
from nixlet.containers import model
from nixlet.host import unixsocket
from nixlet.pods import criconfig, player, removal, undoing
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
    """Makes no pod as long as it is asked to.

    Attributes:
        pods: Those that it has.
        runs: Whether a container runs in them.
        asked: What it was asked for besides: "stop" and "remove", with a pod's ID.
        making: The names of pods that it was asked for.
        slices: The cgroups that they were to be in; as its configuration says, systemd makes them.
    """

    def __init__(self) -> None:
        self.pods: list[cri_pb2.PodSandbox] = []
        self.runs = False
        self.asked: list[str] = []
        self.making: asyncio.Queue[str] = asyncio.Queue()
        self.slices: set[str] = set()

    async def _status(self, stream: "server.Stream[cri_pb2.StatusRequest, object]") -> None:
        await server.request(stream)
        said = {"defaultRuntimeName": "runc", "runtimes": {"runc": {"options": {"SystemdCgroup": True}}}}
        await stream.send_message(cri_pb2.StatusResponse(info={"config": json.dumps({"containerd": said})}))

    async def _list(self, stream: "server.Stream[cri_pb2.ListPodSandboxRequest, object]") -> None:
        wanted = (await server.request(stream)).filter.label_selector.items()
        found = [each for each in self.pods if wanted <= dict(each.labels).items()]
        await stream.send_message(cri_pb2.ListPodSandboxResponse(items=found))

    async def _list_containers(self, stream: "server.Stream[cri_pb2.ListContainersRequest, object]") -> None:
        pod = (await server.request(stream)).filter.pod_sandbox_id
        found = [cri_pb2.Container(id=f"of-{pod}", pod_sandbox_id=pod)] if self.runs else []
        await stream.send_message(cri_pb2.ListContainersResponse(containers=found))

    async def _stop(self, stream: "server.Stream[cri_pb2.StopPodSandboxRequest, object]") -> None:
        self.asked.append(f"stop {(await server.request(stream)).pod_sandbox_id}")
        await stream.send_message(cri_pb2.StopPodSandboxResponse())

    async def _remove(self, stream: "server.Stream[cri_pb2.RemovePodSandboxRequest, object]") -> None:
        self.asked.append(f"remove {(await server.request(stream)).pod_sandbox_id}")
        await stream.send_message(cri_pb2.RemovePodSandboxResponse())

    async def _identify(self, stream: "server.Stream[object, introspection_pb2.ServerResponse]") -> None:
        await server.request(stream)
        await stream.send_message(introspection_pb2.ServerResponse(uuid="slow"))

    async def _run(self, stream: "server.Stream[cri_pb2.RunPodSandboxRequest, object]") -> None:
        request = await server.request(stream)
        self.slices.add(request.config.linux.cgroup_parent)
        self.making.put_nowait(request.config.metadata.name)
        await asyncio.Event().wait()

    def __mapping__(self) -> dict[str, const.Handler]:
        unary = const.Cardinality.UNARY_UNARY
        identifying = (empty_pb2.Empty, introspection_pb2.ServerResponse)
        answers = {
            "Status": self._status,
            "ListPodSandbox": self._list,
            "ListContainers": self._list_containers,
            "StopPodSandbox": self._stop,
            "RemovePodSandbox": self._remove,
            "RunPodSandbox": self._run,
        }
        types = {each: (getattr(cri_pb2, f"{each}Request"), getattr(cri_pb2, f"{each}Response")) for each in answers}
        return {
            "/containerd.services.introspection.v1.Introspection/Server": const.Handler(
                self._identify, unary, *identifying
            ),
            **{
                f"/runtime.v1.RuntimeService/{name}": const.Handler(answer, unary, *types[name])
                for name, answer in answers.items()
            },
        }


@contextlib.asynccontextmanager
async def playing_at(directory: Path, runtime: SlowRuntime) -> AsyncIterator[Callable[[str, int], "asyncio.Task[Any]"]]:
    """Gives what begins to play a pod of a name that offers a port."""
    path = str(directory / "run" / "c.sock")
    begun: list[asyncio.Task[Any]] = []
    async with server.serve(unixsocket.listen(path), [runtime]), channels.connect(path) as channel:
        connection = client.Containerd(channel, path)
        asked, pods_dir = cri.RuntimeClient(channel, path), str(directory / "pods")
        undoings = undoing.Undoings(asked, connection, pods_dir=pods_dir, leases="")
        removals = removal.Removals(asked, pods_dir)
        plays = player.Player(asked, connection, undoings, removals, pods_dir=pods_dir)

        async def obtain(_: model.Container) -> cri_pb2.Image:
            return cri_pb2.Image(id="x")

        def begin(name: str, port: int) -> "asyncio.Task[Any]":
            # Whether a program has a port of SCTP is not looked at.
            container = model.Container("c", "x", "Never", ports=(model.Port(80, port, protocol="SCTP"),))
            playing = plays.play(model.Pod(name, containers=(container,)), obtain, asyncio.Event())
            begun.append(asyncio.create_task(playing))
            return begun[-1]

        try:
            async with asyncio.timeout(30):
                yield begin
        finally:
            for each in begun:
                each.cancel()
            await asyncio.gather(*begun, return_exceptions=True)


async def test_pods_that_are_played_at_once_dont_get_the_same_port(tmp_path: Path) -> None:
    runtime = SlowRuntime()
    async with playing_at(tmp_path, runtime) as begin:
        # None waits for another: what is refused is refused before the runtime knows of any.
        playing = [begin("one", 7000), begin("two", 7000), begin("other", 7001)]
        assert {await runtime.making.get(), await runtime.making.get()} == {"one", "other"}
        assert runtime.slices == {"system.slice"}
        assert [each.done() for each in playing] == [False, True, False]
        with pytest.raises(errors.FailedPreconditionError, match=r"^port 7000 .* is offered for pod one already"):
            await playing[1]


def present(name: str, *, marked: bool) -> cri_pb2.PodSandbox:
    """A pod that nobody has seen the end of yet; it offers port 7000."""
    labels = {criconfig.POD_NAME: name, criconfig.POD_NAMESPACE: "default", **criconfig.MADE_BY}
    return cri_pb2.PodSandbox(
        id=name,
        metadata=cri_pb2.PodSandboxMetadata(name=name, namespace="default", uid="u"),
        labels={**labels, **(criconfig.AUTO_REMOVE if marked else {})},
        annotations={criconfig.PORTS: "0.0.0.0:7000->80/sctp"},
    )


@pytest.mark.parametrize("marked", [False, True])
async def test_a_pod_that_has_ended_gives_its_port_to_the_next(tmp_path: Path, marked: bool) -> None:
    runtime = SlowRuntime()
    runtime.pods = [present("old", marked=marked)]
    async with playing_at(tmp_path, runtime) as begin:
        begin("new", 7000)
        assert await runtime.making.get() == "new"
    assert runtime.asked == ["remove old" if marked else "stop old"]


async def test_a_pod_that_goes_when_it_has_ended_gives_its_name_to_the_next(tmp_path: Path) -> None:
    runtime = SlowRuntime()
    runtime.pods = [present("name", marked=True)]
    async with playing_at(tmp_path, runtime) as begin:
        begin("name", 7001)
        assert await runtime.making.get() == "name"
    assert runtime.asked == ["remove name"]


@pytest.mark.parametrize(
    ("marked", "runs", "name", "port", "reason"),
    [
        (True, True, "old", 7001, "there is a pod old already"),
        (False, False, "old", 7001, "there is a pod old already"),
        (True, True, "new", 7000, "port 7000 of the host is offered for pod old already"),
    ],
)
async def test_what_runs_or_stays_gives_nothing_away(
    tmp_path: Path, marked: bool, runs: bool, name: str, port: int, reason: str
) -> None:
    runtime = SlowRuntime()
    runtime.pods, runtime.runs = [present("old", marked=marked)], runs
    async with playing_at(tmp_path, runtime) as begin:
        with pytest.raises(errors.NixletError, match=reason):
            await begin(name, port)
    assert runtime.asked == []
