"""What a caller is told when its peer is away, goes away, doesn't answer, or speaks something else."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import empty_pb2
from grpclib import const
from grpclib.const import Cardinality

from nixlet import errors
from nixlet.host import unixsocket
from nixlet.rpc import channel as channels
from nixlet.rpc import server
from nixlet.rpc.gen import containerd_version_grpc
from nixlet.rpc.gen import containerd_version_pb2 as pb


async def ask(channel: channels.Channel, timeout: float | None = 10) -> str:
    with channels.translated("the peer"):
        return (await containerd_version_grpc.VersionStub(channel).Version(empty_pb2.Empty(), timeout=timeout)).version


class Version(containerd_version_grpc.VersionBase):
    """Answers with the number of the call, from the one on that it may."""

    def __init__(self, *, answers_from: int = 1) -> None:
        self.calls = 0
        self._answers_from = answers_from

    async def Version(self, stream: Any) -> None:  # noqa: N802 (as on the wire)
        await stream.recv_message()
        self.calls += 1
        if self.calls < self._answers_from:
            raise errors.UnavailableError("not yet")
        await stream.send_message(pb.VersionResponse(version=str(self.calls)))


class Silent:
    """Takes calls and never answers."""

    def __mapping__(self) -> dict[str, const.Handler]:
        async def wait(stream: Any) -> None:
            await asyncio.Event().wait()

        path = "/containerd.services.version.v1.Version/Version"
        return {path: const.Handler(wait, Cardinality.UNARY_UNARY, empty_pb2.Empty, pb.VersionResponse)}


@contextlib.contextmanager
def peer(path: Path, meet: Callable[[socket.socket], object]) -> Iterator[None]:
    """A peer below gRPC, in a thread of its own: accepts, does one thing, and closes."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()

        def run() -> None:
            with contextlib.suppress(OSError):
                while True:
                    with listening.accept()[0] as connection, contextlib.suppress(OSError):
                        meet(connection)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


async def test_an_absent_socket_is_unavailable(tmp_path: Path) -> None:
    async with channels.connect(str(tmp_path / "none.sock")) as channel:
        with pytest.raises(errors.UnavailableError, match="the peer can't be reached: No such file") as caught:
            await ask(channel)
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    assert caught.value.hint


async def test_a_socket_that_nobody_serves_is_unavailable(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "s.sock"))
    async with channels.connect(str(tmp_path / "s.sock")) as channel:
        with pytest.raises(errors.UnavailableError, match="can't be reached: Connection refused"):
            await ask(channel)


async def test_a_peer_that_closes_at_once_is_unavailable(tmp_path: Path) -> None:
    with peer(tmp_path / "p.sock", lambda _connection: None):
        # Whether the end is seen before, while or after the call is sent is a race: every way must end the same.
        for _ in range(100):
            async with channels.connect(str(tmp_path / "p.sock")) as channel:
                with pytest.raises(errors.UnavailableError, match="the peer"):
                    await ask(channel)


async def test_a_peer_that_breaks_the_protocol_is_unavailable(tmp_path: Path) -> None:
    def misbehave(connection: socket.socket) -> None:
        connection.recv(65536)
        # A frame of data on stream 0, which RFC 9113 (6.1) forbids; the connection itself stays open.
        connection.sendall(bytes(9))
        while connection.recv(65536):
            pass

    with peer(tmp_path / "p.sock", misbehave):
        for _ in range(20):
            async with channels.connect(str(tmp_path / "p.sock")) as channel:
                with pytest.raises(errors.UnavailableError, match="the peer ended the connection"):
                    await ask(channel)


async def test_a_peer_that_is_silent_exceeds_the_deadline(tmp_path: Path) -> None:
    path = str(tmp_path / "d" / "s.sock")
    async with server.serve(unixsocket.listen(path), [Silent()]), channels.connect(path) as channel:
        # Both ends keep the time; the peer's word for it may come first.
        with pytest.raises(errors.DeadlineExceededError, match=r"the peer did not answer in time|deadline"):
            await ask(channel, timeout=0.1)


async def test_a_method_that_the_peer_lacks_is_unimplemented(tmp_path: Path) -> None:
    path = str(tmp_path / "d" / "s.sock")
    async with server.serve(unixsocket.listen(path), []), channels.connect(path) as channel:
        with pytest.raises(errors.UnimplementedError, match=r"unknown method /containerd.services.version.v1"):
            await ask(channel)


async def test_a_channel_finds_a_peer_that_came_back(tmp_path: Path) -> None:
    path = str(tmp_path / "d" / "s.sock")
    async with channels.connect(path) as channel:
        async with server.serve(unixsocket.listen(path), [Version()]):
            assert await ask(channel) == "1"
        with pytest.raises(errors.UnavailableError):
            await ask(channel)
        async with server.serve(unixsocket.listen(path), [Version()]):
            assert await ask(channel) == "1"


async def test_waiting_goes_on_until_the_peer_is_there_and_answers_well(tmp_path: Path) -> None:
    path = str(tmp_path / "d" / "s.sock")
    version = Version(answers_from=3)
    async with channels.connect(path) as channel:
        tries = 0

        async def call() -> None:
            nonlocal tries
            tries += 1
            await ask(channel)

        waiting = asyncio.create_task(channels.wait_until_answered(call))
        async with asyncio.timeout(10):
            while tries < 2:
                await asyncio.sleep(0.01)
        assert not waiting.done()
        async with server.serve(unixsocket.listen(path), [version]):
            await asyncio.wait_for(waiting, 10)
    assert version.calls == 3
    assert tries >= 5
