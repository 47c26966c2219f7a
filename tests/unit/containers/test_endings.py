"""Ending containers: a runtime that fails because one ended by itself at the same moment."""

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

    async def _stop(self, stream: "server.Stream[cri_pb2.StopContainerRequest, cri_pb2.StopContainerResponse]") -> None:
        await server.request(stream)
        self.asked += 1
        if self._failures:
            raise GRPCError(self._failures.pop(0), "failed to stop container: ttrpc: closed: unknown")
        await stream.send_message(cri_pb2.StopContainerResponse())

    def __mapping__(self) -> dict[str, const.Handler]:
        types = (cri_pb2.StopContainerRequest, cri_pb2.StopContainerResponse)
        handler = const.Handler(self._stop, const.Cardinality.UNARY_UNARY, *types)
        return {"/runtime.v1.RuntimeService/StopContainer": handler}


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
