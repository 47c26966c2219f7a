"""How much a client may ask for, and how much it is sent: windows, limits, clients that don't read, writes per answer."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from grpclib import const
from grpclib.const import Cardinality, Status
from hyperframe import frame as frames

from nixlet.host import unixsocket
from nixlet.rpc import channel as channels
from nixlet.rpc import connection, receiving, server, transport
from support import http2peer
from support.http2peer import block, call, data, fields, headers, message, raw

ECHO, TIMES, HANG, SHIELD, COUNT = (f"/test.Limits/{name}" for name in ("Echo", "Times", "Hang", "Shield", "Count"))

REFUSED_STREAM, CANCEL = 7, 8


class Limits:
    """Methods that answer much, long, or count what they get.

    Attributes:
        running: Calls that are being answered, wanted or not.
        most: As many as there ever were at once.
        cancelled: Calls that were given up.
        release: Ends calls of Shield.
        metadata: What Echo was called with.
    """

    def __init__(self) -> None:
        self.running = 0
        self.most = 0
        self.cancelled = 0
        self.release = asyncio.Event()
        self.metadata: list[dict[str, Any]] = []

    async def echo(self, stream: Any) -> None:
        request = await server.request(stream)
        self.metadata.append(dict(stream.metadata))
        await stream.send_message(b"re:" + request)

    async def times(self, stream: Any) -> None:
        """As many bytes as the request says, in one message or several."""
        for size in (await server.request(stream)).split():
            await stream.send_message(b"x" * int(size))

    async def hang(self, stream: Any) -> None:
        self.running += 1
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def shield(self, stream: Any) -> None:
        """What goes on to its end whatever the client does."""
        self.running += 1
        self.most = max(self.most, self.running)
        work = asyncio.ensure_future(self.release.wait())
        try:
            while not work.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.shield(work)
        finally:
            self.running -= 1

    async def count(self, stream: Any) -> None:
        await stream.send_message(b"%d" % sum([len(each) async for each in stream]))

    def __mapping__(self) -> dict[str, const.Handler]:
        one, many = Cardinality.UNARY_UNARY, Cardinality.UNARY_STREAM
        return {
            ECHO: const.Handler(self.echo, one, bytes, bytes),
            TIMES: const.Handler(self.times, many, bytes, bytes),
            HANG: const.Handler(self.hang, one, bytes, bytes),
            SHIELD: const.Handler(self.shield, many, bytes, bytes),
            COUNT: const.Handler(self.count, Cardinality.STREAM_UNARY, bytes, bytes),
        }


@pytest.fixture
def limits() -> Limits:
    return Limits()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The transports of all connections that are made, each of which counts what is written to it."""
    transports: list[Any] = []
    connection_made = connection.Connection.connection_made

    class Counting:
        def __init__(self, counted: asyncio.Transport) -> None:
            self.counted = counted
            self.writes: list[bytes] = []

        def write(self, content: bytes) -> None:
            self.writes.append(content)
            self.counted.write(content)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.counted, name)

    def count(self: connection.Connection, counted: asyncio.BaseTransport) -> None:
        transports.append(Counting(counted))  # type: ignore[arg-type]  # a socket's, which can write
        connection_made(self, transports[-1])

    monkeypatch.setattr(connection.Connection, "connection_made", count)
    return transports


@pytest.fixture
async def path(tmp_path: Path, limits: Limits) -> AsyncIterator[str]:
    socket = str(tmp_path / "s" / "l.sock")
    async with server.serve(unixsocket.listen(socket), [limits]):
        yield socket
        limits.release.set()


async def settles(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def test_an_answer_is_one_write(made: list[Any], path: str) -> None:
    async with http2peer.connected(path) as peer:
        await peer.settled()
        for number in range(1, 21, 2):
            before = len(made[0].writes)
            peer.send(call(number, ECHO, b"x"))
            assert (await peer.answer(number)).messages == [b"re:x"]
            assert len(made[0].writes) == before + 1
        # An error is one as well, and so is a window that is given back for many calls.
        before = len(made[0].writes)
        peer.send(call(21, "/test.Limits/None"))
        assert (await peer.answer(21)).status == Status.UNIMPLEMENTED.value
        assert len(made[0].writes) == before + 1


async def test_what_many_calls_send_is_acknowledged_in_large_pieces(path: str) -> None:
    async with http2peer.connected(path) as peer:
        content = message(b"x" * 100_000)
        for number in range(1, 401, 2):
            peer.send(headers(number, block(fields(COUNT))))
            for begin in range(0, len(content), 16000):
                peer.send(data(number, content[begin : begin + 16000]))
            peer.send(data(number, b"", "END_STREAM"))
            assert (await peer.answer(number)).messages == [b"100000"]
        updates = [each for each in peer.seen if isinstance(each, frames.WindowUpdateFrame)]
        # One at the beginning, and two for the 20 MB of all calls together.
        assert {each.stream_id for each in updates} == {0}
        assert len(updates) == 3


async def test_a_large_request_gets_a_window(limits: Limits, path: str) -> None:
    content = message(b"y" * transport.MAX_MESSAGE)
    async with http2peer.connected(path) as peer:
        peer.send(headers(1, block(fields(COUNT))))
        window, sent, counted = receiving.WINDOW, 0, 0
        while sent < len(content):
            while sent < len(content) and window >= 16000:
                piece = content[sent : sent + 16000]
                peer.send(data(1, piece))
                sent, window = sent + len(piece), window - len(piece)
            await peer.settled()
            updates = [e for e in peer.seen if isinstance(e, frames.WindowUpdateFrame) and e.stream_id == 1]
            window += sum(each.window_increment for each in updates[counted:])
            counted = len(updates)
        peer.send(data(1, b"", "END_STREAM"))
        assert (await peer.answer(1)).messages == [b"%d" % transport.MAX_MESSAGE]
        assert counted <= 2 * transport.MAX_MESSAGE // receiving.WINDOW


async def test_what_nobody_reads_is_not_kept_without_end(path: str) -> None:
    async with http2peer.connected(path) as peer:
        peer.send(headers(1, block(fields(HANG))), data(1, bytes(16384)) * (receiving.WINDOW // 16384))
        await peer.settled()
        assert not peer.answers[0].ended
        assert 1 not in peer.answers
        # Other calls of the connection go on.
        peer.send(call(3, ECHO, b"x"))
        assert (await peer.answer(3)).messages == [b"re:x"]
        peer.send(data(1, b"x"))
        assert (await peer.answer(1)).reset == 3


async def test_padding_counts(path: str) -> None:
    async with http2peer.connected(path) as peer:
        peer.send(headers(1, block(fields(HANG))))
        peer.send(data(1, b"", "PADDED", pad_length=255) * (receiving.WINDOW // 256 + 1))
        assert (await peer.answer(1)).reset == 3


@pytest.mark.parametrize("method", [ECHO, TIMES])
async def test_nothing_is_sent_beyond_the_clients_windows(path: str, method: str) -> None:
    async with http2peer.connected(path, INITIAL_WINDOW_SIZE=0) as peer:
        request = b"5" if method == TIMES else b"12"
        peer.send(call(1, method, request))
        await peer.until(lambda: peer.answers.get(1) is not None and peer.answers[1].fields)
        await peer.settled()
        assert peer.answers[1].content == b""
        peer.send(raw(8, 0, 1, b"\0\0\0\3"))
        await peer.until(lambda: peer.answers[1].content)
        await peer.settled()
        assert peer.answers[1].content == b"\0\0\0"
        # Larger, and smaller again: as large as before.
        peer.send(raw(4, 0, 0, b"\0\4\0\0\0\1"), raw(4, 0, 0, b"\0\4\0\0\0\0"), raw(8, 0, 1, b"\0\0\0\1"))
        await peer.settled()
        assert len(peer.answers[1].content) == 4
        peer.send(raw(4, 0, 0, b"\0\4\0\0\x20\0"))
        answer = await peer.answer(1)
        assert answer.messages == [b"xxxxx" if method == TIMES else b"re:12"]
        assert answer.status == 0


async def test_windows_go_below_zero(path: str) -> None:
    async with http2peer.connected(path, INITIAL_WINDOW_SIZE=100) as peer:
        peer.send(call(1, TIMES, b"1000"))
        await peer.until(lambda: peer.answers.get(1) is not None and len(peer.answers[1].content) == 100)
        peer.send(raw(4, 0, 0, b"\0\4\0\0\0\0"), raw(8, 0, 1, (100).to_bytes(4, "big")))
        await peer.settled()
        assert len(peer.answers[1].content) == 100
        peer.send(raw(8, 0, 1, (905).to_bytes(4, "big")))
        assert (await peer.answer(1)).messages == [b"x" * 1000]


async def test_the_connections_window_is_shared(path: str) -> None:
    async with http2peer.connected(path, INITIAL_WINDOW_SIZE=2**31 - 1, MAX_FRAME_SIZE=2**24 - 1) as peer:
        peer.send(*(call(number, TIMES, b"300000 400000") for number in (1, 3, 5)))
        received = 65535
        await peer.until(lambda: sum(len(each.content) for each in peer.answers.values()) == received)
        peer.send(call(7, ECHO, b"x"))
        for _ in range(30):
            await peer.settled()
            assert sum(len(each.content) for each in peer.answers.values()) == min(received, 3 * 700_010 + 9)
            peer.send(raw(8, 0, 0, (100_000).to_bytes(4, "big")))
            received += 100_000
        for number in (1, 3, 5):
            assert [len(each) for each in (await peer.answer(number)).messages] == [300_000, 400_000]
        assert (await peer.answer(7)).messages == [b"re:x"]


async def test_a_client_that_does_not_read_holds_up_its_own_calls_only(
    made: list[Any], limits: Limits, path: str
) -> None:
    async with http2peer.connected(path, INITIAL_WINDOW_SIZE=2**31 - 1) as peer, channels.connect(path) as other:
        peer.writer.transport.pause_reading()  # type: ignore[attr-defined]  # a socket's can
        peer.send(raw(8, 0, 0, (2**30).to_bytes(4, "big")))
        peer.send(*(call(number, TIMES, b"8000000") for number in range(1, 21, 2)))
        # Its pings would be answered, if it read.
        peer.send(raw(6, 0, 0, bytes(8)) * 300_000)
        await settles(lambda: made and made[0].get_write_buffer_size() > 0)
        for _ in range(100):
            async with other.request(ECHO, Cardinality.UNARY_UNARY, bytes, bytes) as asked:
                await asked.send_message(b"x", end=True)
                assert await asked.recv_message() == b"re:x"
            assert made[0].get_write_buffer_size() < 1 << 20
        peer.writer.transport.resume_reading()  # type: ignore[attr-defined]  # as above
        for number in range(1, 21, 2):
            assert len((await peer.answer(number)).messages[0]) == 8_000_000


async def test_calls_of_a_client_that_is_gone_are_cancelled(limits: Limits, path: str) -> None:
    async with http2peer.connected(path) as peer:
        peer.send(*(call(number, HANG) for number in range(1, 21, 2)))
        await settles(lambda: limits.running == 10)
        peer.send(raw(3, 0, 1, CANCEL.to_bytes(4, "big")))
        await settles(lambda: limits.running == 9)
    await settles(lambda: limits.cancelled == 10)
    assert limits.running == 0


async def test_one_call_too_many_is_refused_and_may_be_tried_again(limits: Limits, path: str) -> None:
    last = 2 * connection.MAX_STREAMS - 1
    async with http2peer.connected(path) as peer:
        peer.send(*(call(number, HANG) for number in range(1, last + 4, 2)))
        assert (await peer.answer(last + 2)).reset == REFUSED_STREAM
        assert limits.running == connection.MAX_STREAMS
        peer.send(raw(3, 0, 1, CANCEL.to_bytes(4, "big")), call(last + 4, ECHO, b"x"))
        assert (await peer.answer(last + 4)).messages == [b"re:x"]


async def test_calls_that_are_begun_and_given_up_at_once_are_bounded(limits: Limits, path: str) -> None:
    async with http2peer.connected(path) as peer:
        for number in range(1, 20_001, 2):
            peer.send(call(number, SHIELD), raw(3, 0, number, CANCEL.to_bytes(4, "big")))
            if number % 100 == 1:
                await peer.writer.drain()
                await asyncio.sleep(0)
        await peer.settled()
        assert limits.most <= 2 * connection.MAX_STREAMS
        limits.release.set()
        await settles(lambda: limits.running == 0)
        peer.send(call(20_003, ECHO, b"x"))
        assert (await peer.answer(20_003)).messages == [b"re:x"]


@pytest.mark.parametrize(
    ("written", "read"),
    [("AAEC/w==", [b"\0\1\2\xff"]), ("AAEC/w", [b"\0\1\2\xff"]), ("", [b""]), ("AAE=,AAE", [b"\0\1", b"\0\1"])],
)
async def test_binary_metadata(limits: Limits, path: str, written: str, read: list[bytes]) -> None:
    async with http2peer.connected(path) as peer:
        peer.send(call(1, ECHO, b"", ("x-any-bin", written), ("x-text", "a b")))
        assert (await peer.answer(1)).status == 0
    assert limits.metadata == [{"x-any-bin": read[-1], "x-text": "a b"}]


async def test_binary_metadata_that_is_none(path: str) -> None:
    async with http2peer.connected(path) as peer:
        peer.send(call(1, ECHO, b"", ("x-any-bin", "!")))
        assert (await peer.answer(1)).status == Status.INTERNAL.value


async def test_a_server_that_stops_says_so_and_ends_what_runs(limits: Limits, tmp_path: Path) -> None:
    socket = str(tmp_path / "s" / "m.sock")
    async with contextlib.AsyncExitStack() as stack:
        async with server.serve(unixsocket.listen(socket), [limits]):
            peer = await stack.enter_async_context(http2peer.connected(socket))
            peer.send(call(1, SHIELD))
            await settles(lambda: limits.running == 1)
            asyncio.get_running_loop().call_later(0.1, limits.release.set)
        # The call was answered first; then the client was asked to go, and then it was closed, and knows what was not begun.
        await peer.end()
        farewells = [each for each in peer.seen if isinstance(each, frames.GoAwayFrame)]
        assert [(each.error_code, each.last_stream_id) for each in farewells] == [(0, 2**31 - 1), (0, 1)]
        assert peer.answers[1].status == 0
        order = [type(each) for each in peer.seen]
        assert order.index(frames.GoAwayFrame) > order.index(frames.HeadersFrame)


async def test_a_connection_keeps_nothing_of_calls_that_have_ended(made: list[Any], limits: Limits, path: str) -> None:
    async with http2peer.connected(path) as peer:
        for number in range(1, 101, 10):
            peer.send(
                call(number, ECHO, b"x"),
                call(number + 2, "/test.Limits/None"),
                call(number + 4, HANG, b"", ("grpc-timeout", "1m")),
                call(number + 6, TIMES, b"5 5"),
                call(number + 8, HANG),
                raw(3, 0, number + 8, CANCEL.to_bytes(4, "big")),
            )
            for each in range(number, number + 8, 2):
                await peer.answer(each)
        kept = made[0].get_protocol()
        await settles(lambda: kept._answering == 0)
        assert (kept._streams, kept._sender._calls) == ({}, {})
        assert len(kept._known) <= 64


async def test_what_comes_together_is_answered_together(made: list[Any], path: str) -> None:
    async with http2peer.connected(path) as peer:
        await peer.settled()
        before = len(made[0].writes)
        # As Go's clients do it: they measure the connection while they call.
        peer.send(raw(6, 0, 0, b"measured"), raw(4, 0, 0, b""), call(1, ECHO, b"x"))
        assert (await peer.answer(1)).messages == [b"re:x"]
        assert peer.seen[-5].opaque_data == b"measured"  # type: ignore[attr-defined]  # a ping's
        assert len(made[0].writes) == before + 1
        # A stream's answers, if there are several at once.
        peer.send(call(3, TIMES, b"1 2 3"))
        assert [len(each) for each in (await peer.answer(3)).messages] == [1, 2, 3]
        assert len(made[0].writes) == before + 2


@pytest.mark.parametrize("size", [100_000, 230_000, 1_000_000])
async def test_a_client_that_does_not_read_holds_up_no_end(
    tmp_path: Path, limits: Limits, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(server, "_GRACE", 0.1)
    socket = str(tmp_path / "s" / "m.sock")
    async with contextlib.AsyncExitStack() as stack:
        async with server.serve(unixsocket.listen(socket), [limits]):
            peer = await stack.enter_async_context(http2peer.connected(socket, INITIAL_WINDOW_SIZE=2**31 - 1))
            await peer.settled()
            peer.writer.transport.pause_reading()  # type: ignore[attr-defined]  # a socket's can
            peer.send(raw(8, 0, 0, (2**30).to_bytes(4, "big")), call(1, TIMES, b"%d" % size))
            async with http2peer.connected(socket) as other:
                await other.settled()
        # It has ended although this client is still there.
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_unix_connection(socket)
