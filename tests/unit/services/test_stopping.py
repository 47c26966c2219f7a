"""Several containers stopped or removed at once, where one fails, all wait for each other, or the client goes: with a CRI that does that."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from grpclib import const
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from nixlet import errors
from nixlet.cli import link
from nixlet.containerd import cri
from nixlet.containers import model
from nixlet.host import signals, unixsocket
from nixlet.pods import begun, criconfig, listing, removal
from nixlet.rpc import channel as channels
from nixlet.rpc import server as grpc_server
from nixlet.rpc.gen import cri_pb2 as pb
from nixlet.services import nodeaddress, stopping
from nixlet.varlink import client, server


class Runtime:
    """A CRI of which a test says when changes are done.

    Attributes:
        containers: By ID: the pod's ID, and whether it runs.
        pods: Their IDs.
        together: Changes of containers are answered when so many are asked for at once.
        failing: IDs whose changes fail.
        asked: The changes that were asked for.
        held: Changes of pods wait for it.
    """

    def __init__(self, pods: dict[str, list[str]]) -> None:
        self.containers = {each: (pod, True) for pod, containers in pods.items() for each in containers}
        self.pods = set(pods)
        self.together = 1
        self.failing: set[str] = set()
        self.asked: list[str] = []
        self.held = asyncio.Event()
        self.held.set()
        self._waiting = 0
        self._all_there = asyncio.Event()

    async def _change(self, what: str) -> None:
        self.asked.append(what)
        self._waiting += 1
        if self._waiting == self.together:
            self._all_there.set()
        await self._all_there.wait()
        self._fail(what.split()[1])

    def _fail(self, changed: str) -> None:
        if changed in self.failing:
            raise GRPCError(Status.UNKNOWN, "it is broken")

    async def _list_pods(self, _: pb.ListPodSandboxRequest) -> pb.ListPodSandboxResponse:
        labels = {**criconfig.MADE_BY, criconfig.POD_NAME: ""}
        return pb.ListPodSandboxResponse(
            items=[
                pb.PodSandbox(
                    id=each, metadata=pb.PodSandboxMetadata(name=each), labels={**labels, criconfig.POD_NAME: each}
                )
                for each in sorted(self.pods)
            ]
        )

    async def _list(self, request: pb.ListContainersRequest) -> pb.ListContainersResponse:
        wanted, running = request.filter.pod_sandbox_id, request.filter.HasField("state")
        return pb.ListContainersResponse(
            containers=[
                pb.Container(
                    id=each,
                    pod_sandbox_id=pod,
                    metadata=pb.ContainerMetadata(name=each),
                    state=pb.CONTAINER_RUNNING if runs else pb.CONTAINER_EXITED,
                )
                for each, (pod, runs) in self.containers.items()
                if (not wanted or pod == wanted) and (runs or not running)
            ]
        )

    async def _stop(self, request: pb.StopContainerRequest) -> pb.StopContainerResponse:
        await self._change(f"stop {request.container_id} {request.timeout}")
        self.containers[request.container_id] = (self.containers[request.container_id][0], False)
        return pb.StopContainerResponse()

    async def _remove(self, request: pb.RemoveContainerRequest) -> pb.RemoveContainerResponse:
        await self._change(f"remove {request.container_id}")
        del self.containers[request.container_id]
        return pb.RemoveContainerResponse()

    async def _stop_pod(self, request: pb.StopPodSandboxRequest) -> pb.StopPodSandboxResponse:
        self.asked.append(f"stop-pod {request.pod_sandbox_id}")
        await self.held.wait()
        self._fail(request.pod_sandbox_id)
        return pb.StopPodSandboxResponse()

    async def _remove_pod(self, request: pb.RemovePodSandboxRequest) -> pb.RemovePodSandboxResponse:
        self.asked.append(f"remove-pod {request.pod_sandbox_id}")
        await self.held.wait()
        self._fail(request.pod_sandbox_id)
        self.pods.remove(request.pod_sandbox_id)
        self.containers = {each: at for each, at in self.containers.items() if at[0] != request.pod_sandbox_id}
        return pb.RemovePodSandboxResponse()

    def __mapping__(self) -> dict[str, const.Handler]:
        answers: dict[str, Callable[[Any], Awaitable[Any]]] = {
            "ListPodSandbox": self._list_pods,
            "ListContainers": self._list,
            "StopContainer": self._stop,
            "RemoveContainer": self._remove,
            "StopPodSandbox": self._stop_pod,
            "RemovePodSandbox": self._remove_pod,
        }

        def handler(name: str, answer: Callable[[Any], Awaitable[Any]]) -> const.Handler:
            async def handle(stream: "grpc_server.Stream[Any, Any]") -> None:
                await stream.send_message(await answer(await grpc_server.request(stream)))

            types = getattr(pb, f"{name}Request"), getattr(pb, f"{name}Response")
            return const.Handler(handle, const.Cardinality.UNARY_UNARY, *types)

        return {f"/runtime.v1.RuntimeService/{name}": handler(name, answer) for name, answer in answers.items()}


@contextlib.asynccontextmanager
async def node(directory: Path, runtime: Runtime) -> AsyncIterator[str]:
    """The state directory of a node that stops and removes there."""
    address = str(directory / "run" / "c.sock")
    place = str(directory / "state" / nodeaddress.SOCKET)
    async with (
        grpc_server.serve(unixsocket.listen(address), [runtime]),
        channels.connect(address) as channel,
    ):
        asked = cri.RuntimeClient(channel, address)
        removals = removal.Removals(asked, str(directory))
        interface = server.Interface(nodeaddress.INTERFACE, "", stopping.StoppingService(asked, removals).methods())
        async with server.serve(unixsocket.listen(place), [interface]):
            yield str(directory / "state")
        # As a node ends: what goes on behind an answer does so while containerd is there.
        await removals.close(signals.Ending())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def told(state_dir: str, method: str, **parameters: object) -> list[client.Reply]:
    def call() -> list[client.Reply]:
        with link.connected(state_dir) as connection:
            return list(connection.stream(method, parameters))

    return await asyncio.wait_for(asyncio.to_thread(call), 20)


async def test_all_are_stopped_at_once(tmp_path: Path) -> None:
    runtime = Runtime({"p": ["a", "b"], "q": ["c"]})
    runtime.together = 3
    async with node(tmp_path, runtime) as state_dir:
        replies = await told(state_dir, "StopContainers", containers=["c", "a", "b"], grace=7)
        # The pods' networks are given back when the last one has ended, and nobody waits for that.
        await until(lambda: {"stop-pod p", "stop-pod q"} <= set(runtime.asked))
    assert replies == [{"container": "c"}, {"container": "a"}, {"container": "b"}]
    assert sorted(runtime.asked)[:3] == ["stop a 7", "stop b 7", "stop c 7"]
    assert not any(runs for _, runs in runtime.containers.values())


@pytest.mark.parametrize(("grace", "seconds"), [(None, criconfig.DEFAULT_GRACE), (0, 0), (-5, 0), (10**30, 2**31 - 1)])
async def test_the_time_that_a_container_gets(tmp_path: Path, grace: int | None, seconds: int) -> None:
    runtime = Runtime({"p": ["a"]})
    async with node(tmp_path, runtime) as state_dir:
        assert await told(state_dir, "StopContainers", containers=["a"], grace=grace) == [{"container": "a"}]
    assert runtime.asked[0] == f"stop a {seconds}"


def noted(directory: Path, pod: str) -> Path:
    """The directory of a pod that has started."""
    place = criconfig.log_directory(str(directory), model.Pod(pod, ""), "")
    begun.begin(place, "containerd-1")
    begun.finish(place)
    return Path(place)


async def test_nobody_waits_for_a_network_that_is_being_given_back(tmp_path: Path) -> None:
    runtime = Runtime({"p": ["a"]})
    runtime.held.clear()
    place = noted(tmp_path, "p")
    (tmp_path / "run").mkdir()
    async with node(tmp_path, runtime) as state_dir:
        assert await told(state_dir, "StopContainers", containers=["a"], grace=0) == [{"container": "a"}]
        assert await told(state_dir, "RemoveContainers", containers=["a"], force=False) == [{"container": "a"}]
        # What a node that is killed now leaves is taken away by the next one.
        assert list(begun.unfinished(str(tmp_path), "containerd-1")) == [str(place)]
        for name in ("a", "p"):
            (missing,) = await told(state_dir, "RemoveContainers", containers=[name], force=True)
            assert missing["failure"]["kind"] == "NotFoundError"
        assert "remove-pod p" not in runtime.asked
        runtime.held.set()
        await until(lambda: not place.exists())
    assert runtime.asked == ["stop a 0", "stop-pod p", "remove a", "remove-pod p"]


async def test_a_removal_that_no_next_node_would_know_of_is_waited_for(tmp_path: Path) -> None:
    runtime = Runtime({"p": ["a"]})
    runtime.held.clear()
    async with node(tmp_path, runtime) as state_dir:
        assert await told(state_dir, "StopContainers", containers=["a"], grace=0) == [{"container": "a"}]
        removing = asyncio.create_task(told(state_dir, "RemoveContainers", containers=["a"], force=False))
        await until(lambda: "remove a" in runtime.asked)
        await asyncio.wait({removing}, timeout=0.1)
        assert not removing.done()
        runtime.held.set()
        assert await removing == [{"container": "a"}]
    assert runtime.asked == ["stop a 0", "stop-pod p", "remove a", "remove-pod p"]


async def test_who_has_a_network_given_back_hears_that_it_fails(tmp_path: Path) -> None:
    runtime = Runtime({"p": ["a"], "q": ["b"]})
    runtime.failing = {"p", "q"}
    runtime.containers["b"] = ("q", False)
    noted(tmp_path, "p")
    noted(tmp_path, "q")
    async with node(tmp_path, runtime) as state_dir:
        replies = await told(state_dir, "RemoveContainers", containers=["a", "b"], force=True)
    assert [each["failure"]["message"] for each in replies] == ["it is broken"] * 2
    assert runtime.pods == {"p", "q"}


async def test_a_failure_hides_nothing_of_the_others(tmp_path: Path) -> None:
    runtime = Runtime({"p": ["a"], "q": ["b"], "r": ["c"]})
    runtime.failing = {"a"}
    async with node(tmp_path, runtime) as state_dir:
        first, second, missing, third = await told(
            state_dir, "StopContainers", containers=["a", "b", "nobody", "c"], grace=0
        )
    assert first["failure"]["said_by"].startswith("containerd at")
    assert first["failure"]["message"] == "it is broken"
    assert (missing["container"], missing["failure"]["kind"]) == ("nobody", "NotFoundError")
    assert (second, third) == ({"container": "b"}, {"container": "c"})
    assert [runs for _, runs in runtime.containers.values()] == [True, False, False]


async def test_the_last_containers_of_a_pod_take_it_with_them_also_at_once(tmp_path: Path) -> None:
    runtime = Runtime({"p": ["a", "b", "c"], "q": ["d", "e"]})
    runtime.together = 4
    async with node(tmp_path, runtime) as state_dir:
        replies = await told(state_dir, "RemoveContainers", containers=["a", "b", "c", "d"], force=True)
    assert [each["container"] for each in replies if "failure" not in each] == ["a", "b", "c", "d"]
    assert (runtime.pods, set(runtime.containers)) == ({"q"}, {"e"})
    assert runtime.asked.count("remove-pod p") == 1


async def test_what_runs_is_removed_by_force_only(tmp_path: Path) -> None:
    runtime = Runtime({"p": ["a"], "q": ["b"]})
    runtime.containers["b"] = ("q", False)
    async with node(tmp_path, runtime) as state_dir:
        refused, removed = await told(state_dir, "RemoveContainers", containers=["a", "b"], force=False)
    assert refused["failure"]["message"] == "container a is running"
    assert "--force" in refused["failure"]["hint"]
    assert removed == {"container": "b"}
    assert runtime.pods == {"p"}


async def test_a_pod_without_a_container_is_removed_by_its_name(tmp_path: Path) -> None:
    runtime = Runtime({"p": []})
    async with node(tmp_path, runtime) as state_dir:
        assert await told(state_dir, "StopContainers", containers=["p"], grace=None) == [{"container": "p"}]
        assert await told(state_dir, "RemoveContainers", containers=["p"], force=False) == [{"container": "p"}]
    assert runtime.asked == ["stop-pod p", "remove-pod p"]


async def test_a_removal_goes_on_without_its_client(tmp_path: Path) -> None:
    runtime = Runtime({"p": ["a"]})
    runtime.held.clear()
    async with node(tmp_path, runtime) as state_dir:
        connection = link.connected(state_dir)
        connection.send("RemoveContainers", {"containers": ["a"], "force": True})
        await until(lambda: bool(runtime.asked))
        connection.close()
        await asyncio.sleep(0.05)
        runtime.held.set()
        await until(lambda: not runtime.pods)


async def test_several_are_not_changed_for_who_takes_one_reply(tmp_path: Path) -> None:
    runtime = Runtime({"p": ["a"], "q": ["b"]})

    def call(state_dir: str) -> None:
        with link.connected(state_dir) as connection:
            with pytest.raises(errors.UnimplementedError, match="ExpectedMore"):
                connection.call("StopContainers", {"containers": ["a", "b"]})
            with pytest.raises(errors.UnimplementedError, match="InvalidParameter"):
                connection.call("StopContainers", {"containers": []})
            assert connection.call("StopContainers", {"containers": ["a"], "grace": 0}) == {"container": "a"}

    async with node(tmp_path, runtime) as state_dir:
        await asyncio.wait_for(asyncio.to_thread(call, state_dir), 20)
        await until(lambda: len(runtime.asked) == 2)
    assert runtime.asked == ["stop a 0", "stop-pod p"]


async def test_a_pod_that_people_take_for_gone_is_not_seen_while_it_is_removed(tmp_path: Path) -> None:
    runtime = Runtime({"p": ["a"], "q": ["b"]})
    # No container goes before the other one does, and no pod for now.
    runtime.together = 2
    runtime.held.clear()
    address = str(tmp_path / "run" / "c.sock")
    async with grpc_server.serve(unixsocket.listen(address), [runtime]), channels.connect(address) as channel:
        asked = cri.RuntimeClient(channel, address)
        removals = removal.Removals(asked, str(tmp_path))

        async def seen() -> list[list[str]]:
            both = [await listing.entries(asked, removals, everything=each) for each in (True, False)]
            return [[each.id for each in entries] for entries in both]

        first, second = await asked.sandboxes()
        assert sorted((await seen())[0]) == sorted((await seen())[1]) == ["a", "b"]
        task = await removals.leave(first)
        await until(lambda: runtime.asked == ["remove a"])
        assert set(runtime.containers) == {"a", "b"}
        assert await seen() == [["b"], ["b"]]
        removing = asyncio.create_task(removals.remove(second))
        await until(lambda: {"remove-pod p", "remove-pod q"} <= set(runtime.asked))
        assert set(removals.leaving()) == {"p", "q"}
        # Somebody waits for the other.
        assert set(removals.gone()) == {"p"}
        runtime.held.set()
        await asyncio.wait_for(asyncio.gather(task, removing), 20)
        assert await seen() == [[], []]
        assert not removals.leaving()
    assert sorted(runtime.asked) == ["remove a", "remove b", "remove-pod p", "remove-pod q"]


async def test_a_pod_that_can_not_be_removed_is_seen_again(tmp_path: Path) -> None:
    runtime = Runtime({"p": ["a"]})
    runtime.failing = {"a", "p"}
    address = str(tmp_path / "run" / "c.sock")
    async with grpc_server.serve(unixsocket.listen(address), [runtime]), channels.connect(address) as channel:
        asked = cri.RuntimeClient(channel, address)
        removals = removal.Removals(asked, str(tmp_path))
        (pod,) = await asked.sandboxes()
        await asyncio.wait({await removals.leave(pod)}, timeout=20)
        assert not removals.leaving()
        assert [each.id for each in await listing.entries(asked, removals, everything=True)] == ["a"]
