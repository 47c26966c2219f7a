"""A peer that cuts the handshake at any byte, sends records in pieces, and announces what can't be."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixlet import errors
from nixlet.store.daemon import connection, wire

LAST = wire.integer(wire.STDERR_LAST)
HELLO = wire.integer(wire.SERVER_MAGIC) + wire.integer(1 << 8 | 35)
GREETING = HELLO + wire.string("fake 1.0") + wire.integer(2) + LAST
HUGE = wire.integer(1 << 63)

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def failure(message: str) -> bytes:
    head = wire.string("Error") + wire.integer(0) + wire.string("Error") + wire.string(message) + wire.integer(0)
    return wire.integer(wire.STDERR_ERROR) + head + wire.integer(0)


@contextlib.asynccontextmanager
async def peer(tmp_path: Path, serve: Serve) -> AsyncIterator[Callable[[], Awaitable[connection.Connection]]]:
    """A real socket with a fake daemon behind it; yields what connects, without the handshake."""
    opened: list[connection.Connection] = []
    serving: list[asyncio.Future[None]] = []

    async def connect() -> connection.Connection:
        opened.append(connection.Connection(*await asyncio.open_unix_connection(socket)))
        return opened[-1]

    async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        serving.append(ended)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await serve(reader, writer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        ended.set_result(None)

    socket = str(tmp_path / "socket")
    async with await asyncio.start_unix_server(served, socket), asyncio.timeout(10):
        try:
            yield connect
        finally:
            for each in opened:
                each.close()
            await asyncio.gather(*serving)


async def test_a_handshake_that_is_cut_at_any_byte(tmp_path: Path) -> None:
    lengths = iter(range(len(GREETING) + 1))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GREETING[: next(lengths)])
        writer.write_eof()
        await reader.read()

    async with peer(tmp_path, serve) as connect:
        for _ in range(len(GREETING)):
            conn = await connect()
            with pytest.raises(errors.UnavailableError, match=r"^the Nix daemon closed the connection$"):
                await conn.handshake()
        conn = await connect()
        await conn.handshake()
        assert conn.minor == 35


@pytest.mark.parametrize(
    ("greeting", "sentence", "hint"),
    [
        (
            wire.integer(wire.SERVER_MAGIC) + wire.integer(1 << 8 | 26),
            "the Nix daemon speaks protocol 1.26, older than 1.27",
            "update Nix to 2.4 or later",
        ),
        (
            wire.integer(wire.SERVER_MAGIC) + wire.integer(2 << 8 | 1),
            "the Nix daemon speaks protocol 2.1, which is newer than nixlet",
            "update nixlet",
        ),
        (
            wire.integer(wire.SERVER_MAGIC + 1) + wire.integer(1 << 8 | 35),
            "the Nix daemon's socket is served by something else",
            "",
        ),
        (HELLO + HUGE, f"the Nix daemon sent a string of {1 << 63} bytes, which can't be", ""),
    ],
)
async def test_a_peer_that_is_no_daemon_of_ours(tmp_path: Path, greeting: bytes, sentence: str, hint: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        await reader.read()

    async with peer(tmp_path, serve) as connect:
        with pytest.raises(wire.ProtocolError) as caught:
            await (await connect()).handshake()
    assert (caught.value.message, caught.value.hint) == (sentence, hint)


@pytest.mark.parametrize(
    "reply", [LAST + HUGE, wire.integer(wire.STDERR_NEXT) + HUGE, failure("")[:8] + HUGE], ids=["reply", "log", "error"]
)
async def test_a_length_of_two_to_the_63(tmp_path: Path, reply: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GREETING)
        await reader.readexactly(32 + 8)
        writer.write(reply)
        await reader.read()

    async with peer(tmp_path, serve) as connect:
        conn = await connect()
        await conn.handshake()
        with pytest.raises(wire.ProtocolError, match=f"a string of {1 << 63} bytes"):
            await conn.request(1, b"", wire.Reader.string)
        with pytest.raises(errors.UnavailableError, match="broke in an earlier request"):
            await conn.request(1, b"", wire.Reader.string)


async def test_an_error_in_the_middle_of_a_series_that_comes_byte_by_byte(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GREETING)
        await reader.readexactly(32 + 3 * 16)
        for byte in LAST + wire.string("one") + failure("error: no such path") + LAST + wire.string("three"):
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0)
        await reader.readexactly(8)
        writer.write(LAST + wire.string("four"))
        await reader.read()

    async with peer(tmp_path, serve) as connect:
        conn = await connect()
        await conn.handshake()
        bodies = [wire.integer(number) for number in range(3)]
        one, two, three = await conn.requests_in_a_row(26, bodies, wire.Reader.string)
        assert (one, three) == ("one", "three")
        assert isinstance(two, connection.DaemonError)
        assert two.message == "no such path"
        assert await conn.request(1, b"", wire.Reader.string) == "four"
        assert conn.requests == 4


async def test_giving_up_before_ones_turn_harms_nobody(tmp_path: Path) -> None:
    asked, answer = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GREETING)
        await reader.readexactly(32)
        for reply in ("first", "third"):
            await reader.readexactly(8)
            asked.set()
            await answer.wait()
            writer.write(LAST + wire.string(reply))
        assert await reader.read() == b""

    async with peer(tmp_path, serve) as connect:
        conn = await connect()
        await conn.handshake()
        first, second, third = (asyncio.create_task(conn.request(1, b"", wire.Reader.string)) for _ in range(3))
        await asked.wait()
        second.cancel()
        answer.set()
        assert (await first, await third) == ("first", "third")
        assert second.cancelled()
        assert conn.requests == 2


class Sink:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def line(self, text: str) -> None:
        self.told.append(("line", text))

    def started(self, number: int, kind: int, fields: list[int | str]) -> None:
        self.told.append(("started", number, kind, fields))

    def result(self, number: int, kind: int, fields: list[int | str]) -> None:
        self.told.append(("result", number, kind, fields))


NUMBERS = st.integers(0, (1 << 64) - 1)
FIELDS = st.lists(NUMBERS | st.text(max_size=20), max_size=4)
EVENTS = st.one_of(
    st.tuples(st.just("line"), st.text("abc ", max_size=20).map(connection.plain)),
    st.tuples(st.sampled_from(["started", "result"]), NUMBERS, NUMBERS, FIELDS),
)


def encoded(event: tuple[Any, ...]) -> bytes:
    if event[0] == "line":
        return wire.integer(wire.STDERR_NEXT) + wire.string(event[1])
    what, number, kind, fields = event
    data = wire.integer(len(fields))
    for field in fields:
        data += (
            wire.integer(0) + wire.integer(field) if isinstance(field, int) else wire.integer(1) + wire.string(field)
        )
    if what == "result":
        return wire.integer(wire.RESULT) + wire.integer(number) + wire.integer(kind) + data
    head = wire.integer(wire.START_ACTIVITY) + wire.integer(number) + wire.integer(3) + wire.integer(kind)
    return head + wire.string("text") + data + wire.integer(0) + wire.integer(wire.STOP_ACTIVITY) + wire.integer(number)


@given(st.lists(EVENTS, max_size=5), st.integers(1, 40))
def test_records_are_told_once_however_they_are_cut(events: list[tuple[Any, ...]], size: int) -> None:
    data = b"".join(map(encoded, events)) + LAST
    reader, sink, kind = wire.Reader(), Sink(), 0
    for start in range(0, len(data), size):
        assert kind != wire.STDERR_LAST
        reader.feed(data[start : start + size])
        with contextlib.suppress(wire.NeedMore):
            while kind != wire.STDERR_LAST:
                kind = reader.parse(lambda each: connection._record(each, sink))
    assert kind == wire.STDERR_LAST
    assert sink.told == events


KINDS = [wire.STDERR_NEXT, wire.STDERR_ERROR, wire.START_ACTIVITY, wire.STOP_ACTIVITY, wire.RESULT, wire.STDERR_LAST]


@given(st.sampled_from(KINDS) | NUMBERS, st.lists(st.integers(0, 3) | NUMBERS, max_size=12))
def test_no_garbage_is_worse_than_a_protocol_error(kind: int, numbers: list[int]) -> None:
    reader = wire.Reader()
    reader.feed(b"".join(map(wire.integer, [kind, *numbers])))
    with contextlib.suppress(wire.NeedMore, wire.ProtocolError, connection.DaemonError):
        reader.parse(lambda each: connection._record(each, Sink()))
