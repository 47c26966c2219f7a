"""What a server tells of the calls that it answered."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from grpclib import const
from grpclib.const import Cardinality, Status
from grpclib.exceptions import GRPCError

from nixlet import errors
from nixlet.host import unixsocket
from nixlet.rpc import channel as channels
from nixlet.rpc import server
from nixlet.services import relay
from support import http2peer


class Backend:
    """Methods that end in every way."""

    async def good(self, stream: Any) -> None:
        await stream.recv_message()
        await stream.send_message(b"")

    async def refuse(self, stream: Any) -> None:
        await stream.recv_message()
        raise errors.FailedPreconditionError("it is not so")

    async def crash(self, stream: Any) -> None:
        await stream.recv_message()
        raise KeyError

    async def hang(self, stream: Any) -> None:
        await stream.recv_message()
        await asyncio.Event().wait()

    def __mapping__(self) -> dict[str, const.Handler]:
        methods = {"Good": self.good, "Refuse": self.refuse, "Crash": self.crash, "Hang": self.hang}
        return {
            f"/test.Backend/{name}": const.Handler(method, Cardinality.UNARY_UNARY, bytes, bytes)
            for name, method in methods.items()
        }


class Observer:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        self.seconds: list[float] = []

    def __call__(self, path: str, code: str, seconds: float) -> None:
        self.seen.append((path.rpartition("/")[2], code))
        self.seconds.append(seconds)


@contextlib.asynccontextmanager
async def serving(
    path: Path, observer: Observer, *handlers: Any, fallback: Any = None
) -> AsyncIterator[channels.Channel]:
    serve = server.serve(unixsocket.listen(str(path)), handlers, fallback=fallback, observe=observer)
    async with serve, channels.connect(str(path)) as channel:
        yield channel


async def call(channel: channels.Channel, method: str) -> None:
    path = f"/test.Backend/{method}"
    async with channel.request(path, Cardinality.UNARY_UNARY, bytes, bytes) as stream:
        await stream.send_message(b"", end=True)
        await stream.recv_message()
        await stream.recv_trailing_metadata()


@pytest.mark.parametrize(
    ("method", "code"),
    [
        ("Good", "OK"),
        ("Refuse", "FAILED_PRECONDITION"),
        ("Crash", "INTERNAL"),
        ("Missing", "UNIMPLEMENTED"),
    ],
)
async def test_each_call_is_told_with_its_status(tmp_path: Path, method: str, code: str) -> None:
    observer = Observer()
    async with serving(tmp_path / "s" / "s.sock", observer, Backend()) as channel:
        with contextlib.suppress(GRPCError):
            await call(channel, method)
    assert observer.seen == [(method, code)]
    assert 0 < observer.seconds[0] < 30


async def test_a_status_that_was_handed_on_is_told(tmp_path: Path) -> None:
    backend, front = Observer(), Observer()
    async with serving(tmp_path / "s" / "b.sock", backend, Backend()) as channel:
        handing_on = relay.Relay(channel, "the backend")

        async def fallback(path: str, stream: Any) -> None:
            await handing_on.answer(path, stream, await stream.recv_message())

        async with serving(tmp_path / "s" / "f.sock", front, fallback=fallback) as relayed:
            await call(relayed, "Good")
            with pytest.raises(GRPCError):
                await call(relayed, "Refuse")
    assert front.seen == backend.seen == [("Good", "OK"), ("Refuse", "FAILED_PRECONDITION")]


async def test_who_gave_up_and_whose_time_was_up(tmp_path: Path) -> None:
    observer, path = Observer(), tmp_path / "s" / "s.sock"
    # By a client that has no clock of its own, which could be a moment ahead.
    async with serving(path, observer, Backend()), http2peer.connected(str(path)) as peer:
        peer.send(http2peer.call(1, "/test.Backend/Hang", b"", ("grpc-timeout", "10m")))
        assert (await peer.answer(1)).status == Status.DEADLINE_EXCEEDED.value
        peer.send(http2peer.call(3, "/test.Backend/Hang"))
        await peer.settled()
        peer.send(http2peer.raw(3, 0, 3, b"\0\0\0\x08"))
        async with asyncio.timeout(10):
            while len(observer.seen) < 2:
                await asyncio.sleep(0.01)
    assert observer.seen == [("Hang", "DEADLINE_EXCEEDED"), ("Hang", "CANCELLED")]
