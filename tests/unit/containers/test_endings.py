"""Ending containers: a runtime that fails because one ended by itself at the same moment, or that says late that one has ended."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from grpclib import const
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from nixlet import errors
from nixlet.containerd import cri
from nixlet.containers import endings
from nixlet.host import unixsocket
from nixlet.rpc import channel as channels
from nixlet.rpc import server
from nixlet.rpc.gen import cri_pb2


class Runtime:
    """Answers with these statuses, one after the other, and then without an error."""

    def __init__(self, *failures: Status) -> None:
        self._failures = list(failures)
        self.asked = 0
        self.states = [cri_pb2.CONTAINER_EXITED]

    async def _stop(self, stream: "server.Stream[cri_pb2.StopContainerRequest, cri_pb2.StopContainerResponse]") -> None:
        await server.request(stream)
        self.asked += 1
        if self._failures:
            raise GRPCError(self._failures.pop(0), "failed to stop container: ttrpc: closed: unknown")
        await stream.send_message(cri_pb2.StopContainerResponse())

    async def _status(
        self, stream: "server.Stream[cri_pb2.ContainerStatusRequest, cri_pb2.ContainerStatusResponse]"
    ) -> None:
        await server.request(stream)
        self.asked += 1
        if self._failures:
            raise GRPCError(self._failures.pop(0), "it is started again")
        state = self.states.pop(0) if self.states[1:] else self.states[0]
        await stream.send_message(cri_pb2.ContainerStatusResponse(status=cri_pb2.ContainerStatus(state=state)))

    def __mapping__(self) -> dict[str, const.Handler]:
        unary = const.Cardinality.UNARY_UNARY
        stopping = (cri_pb2.StopContainerRequest, cri_pb2.StopContainerResponse)
        asking = (cri_pb2.ContainerStatusRequest, cri_pb2.ContainerStatusResponse)
        return {
            "/runtime.v1.RuntimeService/StopContainer": const.Handler(self._stop, unary, *stopping),
            "/runtime.v1.RuntimeService/ContainerStatus": const.Handler(self._status, unary, *asking),
        }


@contextlib.asynccontextmanager
async def served(directory: Path, runtime: Runtime) -> AsyncIterator[cri.RuntimeClient]:
    path = str(directory / "run" / "c.sock")
    async with server.serve(unixsocket.listen(path), [runtime]), channels.connect(path) as channel:
        yield cri.RuntimeClient(channel, path)


async def test_the_next_try_finds_it_ended(tmp_path: Path) -> None:
    runtime = Runtime(Status.UNKNOWN, Status.UNKNOWN)
    async with served(tmp_path, runtime) as connected:
        await endings.stop_container(connected, "c", 10)
    assert runtime.asked == 3


async def test_what_lasts_is_told(tmp_path: Path) -> None:
    runtime = Runtime(*[Status.UNKNOWN] * 100)
    async with served(tmp_path, runtime) as connected:
        with pytest.raises(errors.NixletError, match="ttrpc: closed"):
            await endings.stop_container(connected, "c", 10)
    assert 1 < runtime.asked < 10


async def test_a_container_that_is_not_there_is_not_tried_again(tmp_path: Path) -> None:
    runtime = Runtime(Status.NOT_FOUND)
    async with served(tmp_path, runtime) as connected:
        with pytest.raises(errors.NotFoundError):
            await endings.stop_container(connected, "c", 10)
    assert runtime.asked == 1


async def test_an_end_is_told_when_the_runtime_says_it_too(tmp_path: Path) -> None:
    runtime = Runtime(Status.UNAVAILABLE)
    runtime.states = [cri_pb2.CONTAINER_RUNNING, cri_pb2.CONTAINER_RUNNING, cri_pb2.CONTAINER_EXITED]
    async with served(tmp_path, runtime) as connected:
        await endings.wait_until_said(connected, "c")
    assert (runtime.asked, runtime.states) == (4, [cri_pb2.CONTAINER_EXITED])


async def test_a_container_that_was_removed_has_ended(tmp_path: Path) -> None:
    runtime = Runtime(Status.NOT_FOUND)
    async with served(tmp_path, runtime) as connected:
        await endings.wait_until_said(connected, "c")
    assert runtime.asked == 1
