"""Signals that nobody takes end the verb: whoever reads the output of a process that has ended stands still, or the node does.

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
from nixlet.cli import ends, link, session
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


class Silent:
    """A node that is stopped, as far as its clients can tell: a listener of whom nothing comes but what a test sends.

    Attributes:
        connections: Those of the clients, in the order in which they were made.
    """

    def __init__(self, listening: socket.socket) -> None:
        self._listening = listening
        self._listening.settimeout(30)
        self.connections: list[socket.socket] = []

    def accept(self) -> socket.socket:
        self.connections.append(self._listening.accept()[0])
        return self.connections[-1]


@contextlib.contextmanager
def silent(directory: Path) -> Iterator[Silent]:
    with unixsocket.listen(str(directory / nodeaddress.SOCKET)) as listening:
        node = Silent(listening)
        try:
            yield node
        finally:
            for each in node.connections:
                each.close()


@contextlib.contextmanager
def verb(directory: Path, *arguments: str, stdout: int = subprocess.DEVNULL) -> Iterator["subprocess.Popen[bytes]"]:
    name, *rest = arguments
    words = name.split()
    argv = [sys.executable, "-P", "-m", "nixlet", *words, "--state-dir", str(directory), *rest]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


STARTED = {
    "parameters": {"started": {"session": "s", "tty": False, "interactive": False, "id": "i", "name": "n"}},
    "continues": True,
}


def called(connection: socket.socket, *, printing: bytes = b"") -> str:
    """The method that is called over a connection; what comes with the call is closed, and the first of it written to before."""
    data, descriptors, _, _ = socket.recv_fds(connection, 1 << 16, 8)
    if printing:
        os.write(descriptors[0], printing)
    for each in descriptors:
        os.close(each)
    return str(msgspec.json.decode(data.partition(b"\0")[0])["method"]).rpartition(".")[2]


def send(connection: socket.socket, message: Mapping[str, object]) -> None:
    connection.sendall(msgspec.json.encode(message) + b"\0")


@pytest.mark.parametrize(
    "arguments", [("exec", "c", "true"), ("attach", "c"), ("run", "image")], ids=lambda each: each[0]
)
async def test_a_verb_whose_node_never_answers_can_be_ended(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    with silent(tmp_path) as node, verb(tmp_path, *arguments) as process:
        assert called(node.accept()) == arguments[0].capitalize()
        assert await until_it_ends(process, signal.SIGTERM) == 128 + signal.SIGTERM
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()


@pytest.mark.parametrize(
    "arguments", [("exec", "c", "true"), ("attach", "c"), ("run", "image")], ids=lambda each: each[0]
)
async def test_a_process_whose_node_takes_no_signals_can_be_left(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    reader, writer = socket.socketpair()
    with reader, writer, silent(tmp_path) as node, verb(tmp_path, *arguments, stdout=writer.fileno()) as process:
        connection, control = node.accept(), node.accept()
        called(connection, printing=b"x")
        send(connection, STARTED)
        # Shown as soon as it is in front.
        assert reader.recv(1) == b"x"
        assert await until_it_ends(process, signal.SIGINT) == 128 + signal.SIGINT
        assert called(control) == "Signal"
        assert process.stderr is not None
        assert b"does not answer; what runs there is left alone" in process.stderr.read()


async def test_an_undoing_that_never_ends_can_be_left(tmp_path: Path) -> None:
    with (
        open("/dev/full", "wb") as full,
        silent(tmp_path) as node,
        verb(tmp_path, "run", "image", stdout=full.fileno()) as process,
    ):
        connection, control = node.accept(), node.accept()
        called(connection, printing=b"x")
        send(connection, STARTED)
        assert called(control) == "Withdraw"
        assert await until_it_ends(process, signal.SIGINT) == 128 + signal.SIGINT


async def test_a_call_that_the_node_does_not_take_can_be_ended(tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.yaml"
    manifest.write_bytes(b"#" * (1 << 20))
    with silent(tmp_path) as node, verb(tmp_path, "kube play", str(manifest)) as process:
        assert node.accept().recv(1) == b"{"
        assert await until_it_ends(process, signal.SIGTERM) == 128 + signal.SIGTERM


def test_of_many_sizes_the_last_one_is_told(tmp_path: Path) -> None:
    with silent(tmp_path) as stopped, link.connected(str(tmp_path)) as node, link.connected(str(tmp_path)) as control:
        stopped.accept()
        told = stopped.accept()
        with ends.Ends(stdin=False, stdout=False, stderr=False) as ours, session.Signals() as signals:
            process = session.Session(node, control, ours)
            # Also when they come before it has started.
            os.kill(os.getpid(), signal.SIGWINCH)
            send(stopped.connections[0], {**STARTED, "continues": False})
            process.reply(signals)
            send(stopped.connections[0], {"parameters": {"ended": {"exit_code": 7}}})
            signals.pending += [signal.SIGWINCH] * 5000
            os.kill(os.getpid(), signal.SIGWINCH)
            assert process.front(signals, "s", tty=True) == 7
        assert called(told) == "Resize"
