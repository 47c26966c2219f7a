"""What clients have in front of them: sizes and signals, for real processes behind a containerd that can be away."""

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import pytest
from google.protobuf import empty_pb2
from grpclib import const
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from nixlet import errors
from nixlet.cli import link
from nixlet.containerd import tasks
from nixlet.containers import endings
from nixlet.host import unixsocket
from nixlet.rpc import channel as channels
from nixlet.rpc import server as grpc_server
from nixlet.rpc.gen import containerd_tasks_pb2 as pb
from nixlet.services import executing, nodeaddress, running, sessions
from nixlet.varlink import server


class Tasks:
    """The Tasks service of a containerd with one container.

    Attributes:
        pid: Its first process.
        killed: The signals that it was sent.
        away: So many calls are not answered.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.killed: list[int] = []
        self.away = 0

    def _check(self) -> None:
        if self.away:
            self.away -= 1
            raise GRPCError(Status.UNAVAILABLE, "it is started again")

    async def _get(self, stream: "grpc_server.Stream[pb.GetRequest, pb.GetResponse]") -> None:
        await grpc_server.request(stream)
        self._check()
        response = pb.GetResponse()
        response.process.pid = self.pid
        await stream.send_message(response)

    async def _kill(self, stream: "grpc_server.Stream[pb.KillRequest, empty_pb2.Empty]") -> None:
        number = (await grpc_server.request(stream)).signal
        self._check()
        self.killed.append(number)
        try:
            os.kill(self.pid, number)
        except ProcessLookupError as error:
            raise GRPCError(Status.NOT_FOUND, "process already finished: not found") from error
        await stream.send_message(empty_pb2.Empty())

    def __mapping__(self) -> dict[str, const.Handler]:
        unary = const.Cardinality.UNARY_UNARY
        return {
            "/containerd.services.tasks.v1.Tasks/Get": const.Handler(self._get, unary, pb.GetRequest, pb.GetResponse),
            "/containerd.services.tasks.v1.Tasks/Kill": const.Handler(
                self._kill, unary, pb.KillRequest, empty_pb2.Empty
            ),
        }


@contextlib.asynccontextmanager
async def first_process(
    directory: Path, service: Tasks, clock: Callable[[], float] = time.monotonic
) -> AsyncIterator[sessions.FirstProcess]:
    path = str(directory / "run" / "c.sock")
    async with grpc_server.serve(unixsocket.listen(path), [service]), channels.connect(path) as channel:
        yield sessions.FirstProcess(tasks.Tasks(channel, path), "c", clock)


@pytest.fixture
def sleeping() -> Iterator["subprocess.Popen[bytes]"]:
    """A process that leaves all signals to their default effects."""
    with subprocess.Popen(["sleep", "1000"]) as process:
        try:
            yield process
        finally:
            process.kill()


async def test_a_signal_that_ends_nothing_elsewhere_ends_nothing(
    tmp_path: Path, sleeping: "subprocess.Popen[bytes]"
) -> None:
    harmless = [signal.SIGCHLD, signal.SIGURG, signal.SIGWINCH, signal.SIGTSTP, signal.SIGCONT]
    service = Tasks(sleeping.pid)
    async with first_process(tmp_path, service) as process:
        for number in harmless:
            await process.send_signal(number)
        assert (service.killed, sleeping.poll(), process.exit_code(5)) == (harmless, None, 5)
        await process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(sleeping.wait, 20) == -signal.SIGKILL
        assert process.exit_code(137) == 128 + signal.SIGTERM


async def test_a_signal_that_comes_too_late_is_not_what_ended_it(
    tmp_path: Path, sleeping: "subprocess.Popen[bytes]"
) -> None:
    sleeping.kill()
    sleeping.wait()
    async with first_process(tmp_path, Tasks(sleeping.pid)) as process:
        with pytest.raises(errors.NotFoundError):
            await process.send_signal(signal.SIGTERM)
        assert process.exit_code(5) == 5


@pytest.fixture
def heeding() -> Iterator["subprocess.Popen[bytes]"]:
    """A process that heeds SIGINT, and goes on."""
    argv = ["sh", "-c", "trap : INT; echo up; while :; do sleep 0.1; done"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"up\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("times", "sent"),
    [
        ((0, 1, 9), [signal.SIGINT, signal.SIGINT, signal.SIGKILL]),
        ((0, 6, 12, 18), [signal.SIGINT] * 4),
        ((0, 60, 3600, 3601), [signal.SIGINT] * 4),
        ((0, 60, 3600, 3601, 3602), [*[signal.SIGINT] * 4, signal.SIGKILL]),
    ],
)
async def test_who_asks_three_times_in_a_row_wants_an_end(
    tmp_path: Path, heeding: "subprocess.Popen[bytes]", times: Sequence[int], sent: Sequence[int]
) -> None:
    service, clock = Tasks(heeding.pid), iter(times)
    async with first_process(tmp_path, service, lambda: next(clock)) as process:
        for _ in times:
            await process.send_signal(signal.SIGINT)
    assert service.killed == sent


@contextlib.asynccontextmanager
async def in_front(directory: Path, process: sessions.Process) -> AsyncIterator[tuple[str, "asyncio.Future[int]"]]:
    """A node with a process in front of somebody, below a state directory: its session, and what is done when it has ended."""
    opened = sessions.Sessions()
    ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    listening = unixsocket.listen(str(directory / nodeaddress.SOCKET))
    async with server.serve(listening, [server.Interface(nodeaddress.INTERFACE, "", opened.methods())]):
        with opened.opened(process, ended) as session:
            yield session, ended


async def asked(directory: Path, method: str, **parameters: object) -> object:
    def ask() -> object:
        with link.connected(str(directory)) as node:
            return node.call(method, parameters)

    return await asyncio.wait_for(asyncio.to_thread(ask), 20)


async def test_a_signal_waits_for_a_containerd_that_is_started_again(
    tmp_path: Path, sleeping: "subprocess.Popen[bytes]", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endings, "RETRY", 0.01)
    service = Tasks(sleeping.pid)
    async with first_process(tmp_path, service) as process, in_front(tmp_path, process) as (session, _):
        service.away = 5
        assert await asked(tmp_path, "Signal", session=session, signal=signal.SIGINT) == {}
        assert await asyncio.to_thread(sleeping.wait, 20) == -signal.SIGKILL
    assert (service.away, service.killed, process.exit_code(137)) == (0, [signal.SIGKILL], 128 + signal.SIGINT)


async def test_who_has_ended_is_told_so_while_its_output_is_still_wanted(
    tmp_path: Path, sleeping: "subprocess.Popen[bytes]"
) -> None:
    service = Tasks(sleeping.pid)
    async with first_process(tmp_path, service) as process, in_front(tmp_path, process) as (session, ended):
        assert await asked(tmp_path, "Signal", session=session, signal=signal.SIGCONT) == {}
        ended.set_result(0)
        with pytest.raises(errors.NotFoundError, match="the process has ended"):
            await asked(tmp_path, "Signal", session=session, signal=signal.SIGTERM)
    assert service.killed == [signal.SIGCONT]


@pytest.mark.parametrize("cells", [-1, 65536, 2**40])
@pytest.mark.parametrize("kind", [running.RunParameters, executing.ExecParameters, executing.AttachParameters])
def test_a_terminal_has_a_size_that_a_terminal_can_have(kind: type[msgspec.Struct], cells: int) -> None:
    asked = {"container": "c", "command": ["x"], "directory": "/", "image": "i", "streams": {}}
    known = {name: asked[name] for name in kind.__struct_fields__ if name in asked}
    for size in ("columns", "rows"):
        assert getattr(msgspec.convert({**known, size: 65535}, kind), size) == 65535
        with pytest.raises(msgspec.ValidationError, match=rf"\$\.{size}"):
            msgspec.convert({**known, size: cells}, kind)
