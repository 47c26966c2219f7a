"""Logs that are put aside, when that is cut off or fails in the middle."""

import asyncio
import contextlib
import datetime
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from grpclib import const
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from nixlet.containerd import cri
from nixlet.containers import logs, logwriter
from nixlet.host import unixsocket
from nixlet.pods import rotation
from nixlet.rpc import channel as channels
from nixlet.rpc import server
from nixlet.rpc.gen import cri_pb2


class Runtime:
    """Has one container, which writes a log; its answer gets lost when ``fails`` is set."""

    def __init__(self, log: Path, state: "cri_pb2.ContainerState.ValueType", *, fails: bool = False) -> None:
        self._log = log
        self._state = state
        self._fails = fails
        self.asked = 0
        self.reopened = 0
        self.done = asyncio.Event()

    async def _list(self, stream: "server.Stream[object, cri_pb2.ListContainersResponse]") -> None:
        await server.request(stream)
        self.asked += 1
        await stream.send_message(
            cri_pb2.ListContainersResponse(containers=[cri_pb2.Container(id="c", state=self._state)])
        )

    async def _reopen(self, stream: "server.Stream[object, cri_pb2.ReopenContainerLogResponse]") -> None:
        await server.request(stream)
        self.reopened += 1
        self._log.write_text("new\n")
        self.done.set()
        if self._fails:
            raise GRPCError(Status.UNKNOWN, "it is lost")
        await stream.send_message(cri_pb2.ReopenContainerLogResponse())

    def __mapping__(self) -> dict[str, const.Handler]:
        unary = const.Cardinality.UNARY_UNARY
        listing = (cri_pb2.ListContainersRequest, cri_pb2.ListContainersResponse)
        reopening = (cri_pb2.ReopenContainerLogRequest, cri_pb2.ReopenContainerLogResponse)
        return {
            "/runtime.v1.RuntimeService/ListContainers": const.Handler(self._list, unary, *listing),
            "/runtime.v1.RuntimeService/ReopenContainerLog": const.Handler(self._reopen, unary, *reopening),
        }


@pytest.fixture
def log(tmp_path: Path) -> Path:
    directory = tmp_path / "pods" / "default_web_0aa0" / "main"
    directory.mkdir(parents=True)
    return directory / "0.log"


@contextlib.asynccontextmanager
async def rotating(tmp_path: Path, runtime: Runtime, ours: str = "") -> AsyncIterator[rotation.Rotator]:
    path = str(tmp_path / "run" / "c.sock")
    pods = str(tmp_path / "pods")
    async with server.serve(unixsocket.listen(path), [runtime]), channels.connect(path) as channel:
        yield rotation.Rotator(cri.RuntimeClient(channel, path), pods, lambda each: each == ours, limit=10, files=2)


async def test_a_rotation_that_was_cut_off_is_completed(
    tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = [datetime.datetime(2026, 1, 1, 0, 0, second, tzinfo=datetime.UTC) for second in range(2)]
    older, newer = (Path(logs.aside(str(log), moment)) for moment in moments)
    older.write_text("older\n")
    newer.write_text("newer\n")
    log.with_name("other.log.gz").write_text("nobody's\n")
    monkeypatch.setattr(rotation, "_INTERVAL", 0.01)
    runtime = Runtime(log, cri_pb2.CONTAINER_RUNNING)
    async with rotating(tmp_path, runtime) as rotator, asyncio.timeout(30), rotation.kept(rotator):
        await runtime.done.wait()
        while older.exists():
            await asyncio.sleep(0.01)
    assert (runtime.asked, log.read_text(), newer.read_text()) == (1, "new\n", "newer\n")


async def test_who_has_ended_is_asked_for_once(tmp_path: Path, log: Path) -> None:
    Path(logs.aside(str(log), datetime.datetime.now(datetime.UTC))).write_text("last words\n")
    runtime = Runtime(log, cri_pb2.CONTAINER_EXITED)
    async with rotating(tmp_path, runtime) as rotator:
        assert rotator._look() == (set(), {str(log)})
        await rotator._complete(str(log))
        assert rotator._look() == (set(), set())
    assert (runtime.asked, log.exists()) == (1, False)


async def test_a_rotation_that_fails_overwrites_no_new_log(tmp_path: Path, log: Path) -> None:
    log.write_text("all the words so far\n")
    async with rotating(tmp_path, Runtime(log, cri_pb2.CONTAINER_RUNNING, fails=True)) as rotator:
        with pytest.raises(Exception, match="it is lost"):
            await rotator._rotate(str(log))
    with logs.at(str(log)) as opened:
        names = opened.names()
    assert [log.with_name(each).read_text() for each in names] == ["all the words so far\n", "new\n"]


async def test_rotations_that_fail_keep_no_more_files_than_others(tmp_path: Path, log: Path) -> None:
    async with rotating(tmp_path, Runtime(log, cri_pb2.CONTAINER_RUNNING, fails=True)) as rotator:
        for number in range(5):
            log.write_text(f"{number}: more than the limit\n")
            with pytest.raises(Exception, match="it is lost"):
                await rotator._rotate(str(log))
    with logs.at(str(log)) as opened:
        names = opened.names()
    assert [log.with_name(each).read_text() for each in names] == ["4: more than the limit\n", "new\n"]


async def test_nobody_is_asked_for_a_log_that_the_node_writes(tmp_path: Path, log: Path) -> None:
    runtime = Runtime(log, cri_pb2.CONTAINER_RUNNING, fails=True)
    writer = logwriter.LogWriter(str(log))
    async with rotating(tmp_path, runtime, ours=str(log)) as rotator:
        for number in range(5):
            writer.write("stdout", b"%d\n" % number)
            await rotator._rotate(str(log))
            assert log.read_bytes() == b""
        writer.write("stdout", b"end\n")
        # One that was cut off between its two steps.
        log.rename(logs.aside(str(log), datetime.datetime.now(datetime.UTC)))
        assert rotator._look() == (set(), {str(log)})
        await rotator._complete(str(log))
        assert rotator._look() == (set(), set())
    assert (runtime.asked, runtime.reopened) == (0, 0)
    assert len(list(log.parent.iterdir())) == 2
    assert [each.text for each in logs.records(str(log))] == [b"end\n"]
    assert log.stat().st_mode & 0o777 == 0o640
