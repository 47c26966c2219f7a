"""Signals that come when a process has ended and whoever reads its output stands still: nobody else is there for them.

The verb runs as a process of its own, at a node of which a test says what it answers.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

import msgspec
import pytest

from nixlet import errors
from nixlet.host import unixsocket
from nixlet.services import nodeaddress
from nixlet.varlink import server


class Asked(msgspec.Struct):
    """The parameters of the calls that matter here."""

    session: str = ""
    streams: Mapping[str, int] = {}
    signal: int = 0


class Service:
    """Has started a process for everybody.

    Attributes:
        started: Set when somebody was told so.
        ends: The process ends at once and has printed so much (bytes, what a pipe holds at most); 0: it goes on.
        found: It takes signals.
        signals: Those that it was sent.
    """

    def __init__(self, *, ends: int, found: bool) -> None:
        self.started = asyncio.Event()
        self.ends = ends
        self.found = found
        self.signals: list[int] = []

    async def exec(self, call: server.Call[Asked]) -> Mapping[str, object]:
        await call.reply({"started": {"session": "s"}})
        self.started.set()
        if not self.ends:
            await call.gone.wait()
        fd = os.dup(call.descriptor(call.parameters.streams["stdout"]))
        try:
            os.write(fd, bytes(self.ends))
        finally:
            os.close(fd)
        return {"ended": {"exit_code": 7}}

    async def send_signal(self, call: server.Call[Asked]) -> None:
        self.signals.append(call.parameters.signal)
        if not self.found:
            raise errors.NotFoundError("the process has ended")


@contextlib.asynccontextmanager
async def serving(directory: Path, service: Service) -> AsyncIterator[None]:
    methods = {"Exec": server.Method(Asked, service.exec), "Signal": server.Method(Asked, service.send_signal)}
    interface = server.Interface(nodeaddress.INTERFACE, "", methods)
    async with server.serve(unixsocket.listen(str(directory / nodeaddress.SOCKET)), [interface]):
        yield


@contextlib.contextmanager
def executing(directory: Path, stdout: int) -> Iterator["subprocess.Popen[bytes]"]:
    argv = [sys.executable, "-P", "-m", "nixlet", "exec", "--state-dir", str(directory), "c", "true"]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=stdout) as process:
        try:
            yield process
        finally:
            process.kill()


async def until_it_ends(process: "subprocess.Popen[bytes]", number: int) -> int:
    """Send it a signal until it has ended: when it is ready for the first can't be seen."""
    async with asyncio.timeout(30):
        while (code := process.poll()) is None:
            process.send_signal(number)
            await asyncio.sleep(0.1)
    return code


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_that_the_process_can_not_get_any_more_ends_the_verb(tmp_path: Path, number: int) -> None:
    service = Service(ends=0, found=False)
    async with serving(tmp_path, service):
        with executing(tmp_path, subprocess.DEVNULL) as process:
            await asyncio.wait_for(service.started.wait(), 30)
            assert await until_it_ends(process, number) == 128 + number
    assert set(service.signals) == {number}


async def test_a_signal_after_the_end_ends_a_verb_whose_reader_stands_still(tmp_path: Path) -> None:
    service = Service(ends=1 << 16, found=True)
    reader, writer = socket.socketpair()
    with reader, writer:
        writer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 12)
        async with serving(tmp_path, service):
            with executing(tmp_path, writer.fileno()) as process:
                await asyncio.wait_for(service.started.wait(), 30)
                assert await until_it_ends(process, signal.SIGTERM) == 128 + signal.SIGTERM
