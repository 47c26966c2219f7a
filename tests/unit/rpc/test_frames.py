"""What a server says to frames that break HTTP/2's rules, and to those that use all of them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from grpclib import const
from grpclib.const import Cardinality, Status
from hyperframe import frame as frames

from nixlet.host import unixsocket
from nixlet.rpc import connection, server
from support import http2peer
from support.http2peer import block, call, data, fields, headers, message, raw

ECHO, HANG, MANY = "/test.Frames/Echo", "/test.Frames/Hang", "/test.Frames/Many"

PROTOCOL_ERROR, FLOW_CONTROL_ERROR, STREAM_CLOSED, FRAME_SIZE_ERROR = 1, 3, 5, 6
REFUSED_STREAM, COMPRESSION_ERROR, ENHANCE_YOUR_CALM = 7, 9, 11


class Frames:
    """Methods to be called by frames."""

    async def echo(self, stream: Any) -> None:
        await stream.send_message(b"re:" + await server.request(stream))

    async def many(self, stream: Any) -> None:
        async for each in stream:
            await stream.send_message(b"re:" + each)

    async def hang(self, stream: Any) -> None:
        await asyncio.Event().wait()

    def __mapping__(self) -> dict[str, const.Handler]:
        return {
            ECHO: const.Handler(self.echo, Cardinality.UNARY_UNARY, bytes, bytes),
            HANG: const.Handler(self.hang, Cardinality.UNARY_UNARY, bytes, bytes),
            MANY: const.Handler(self.many, Cardinality.STREAM_STREAM, bytes, bytes),
        }


@pytest.fixture
async def path(tmp_path: Path) -> AsyncIterator[str]:
    socket = str(tmp_path / "s" / "f.sock")
    async with server.serve(unixsocket.listen(socket), [Frames()]):
        yield socket


async def echoes(path: str) -> bool:
    """Whether the server answers somebody else."""
    async with http2peer.connected(path) as peer:
        peer.send(call(1, ECHO, b"x"))
        return (await peer.answer(1)).messages == [b"re:x"]


GREETED = http2peer.PREFACE + raw(4, 0, 0, b"")
BEGUN = headers(1, block(fields(HANG)))

FAULTS: list[tuple[str, bytes, int]] = [
    ("another protocol", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", PROTOCOL_ERROR),
    ("no settings at first", http2peer.PREFACE + raw(6, 0, 0, bytes(8)), PROTOCOL_ERROR),
    ("a frame that is too large", GREETED + raw(0, 0, 1, b"")[3:].join([b"\x00\x40\x01", b""]), FRAME_SIZE_ERROR),
    ("settings of an odd length", GREETED + raw(4, 0, 0, bytes(5)), FRAME_SIZE_ERROR),
    ("settings of a stream", GREETED + raw(4, 0, 1, b""), PROTOCOL_ERROR),
    ("an acknowledgement with content", GREETED + raw(4, 1, 0, bytes(6)), FRAME_SIZE_ERROR),
    ("a window beyond all", GREETED + raw(4, 0, 0, b"\x00\x04\x80\x00\x00\x00"), FLOW_CONTROL_ERROR),
    (
        "a window that grows beyond all",
        GREETED + BEGUN + raw(8, 0, 1, (2**31 - 65536).to_bytes(4, "big")) + raw(4, 0, 0, b"\x00\x04\x7f\xff\xff\xff"),
        FLOW_CONTROL_ERROR,
    ),
    ("frames that are too small", GREETED + raw(4, 0, 0, b"\x00\x05\x00\x00\x3f\xff"), PROTOCOL_ERROR),
    ("a push that is neither", GREETED + raw(4, 0, 0, b"\x00\x02\x00\x00\x00\x02"), PROTOCOL_ERROR),
    ("a ping of a wrong length", GREETED + raw(6, 0, 0, bytes(7)), FRAME_SIZE_ERROR),
    ("a ping of a stream", GREETED + raw(6, 0, 1, bytes(8)), PROTOCOL_ERROR),
    ("an update of a wrong length", GREETED + raw(8, 0, 0, bytes(3)), FRAME_SIZE_ERROR),
    ("an update by nothing", GREETED + raw(8, 0, 0, bytes(4)), PROTOCOL_ERROR),
    ("an update beyond all", GREETED + raw(8, 0, 0, b"\x7f\xff\xff\xff"), FLOW_CONTROL_ERROR),
    ("an update of what never began", GREETED + raw(8, 0, 1, b"\0\0\0\1"), PROTOCOL_ERROR),
    ("a reset of what never began", GREETED + raw(3, 0, 1, bytes(4)), PROTOCOL_ERROR),
    ("a reset of a wrong length", GREETED + BEGUN + raw(3, 0, 1, bytes(3)), FRAME_SIZE_ERROR),
    ("a reset of the connection", GREETED + raw(3, 0, 0, bytes(4)), PROTOCOL_ERROR),
    ("data of the connection", GREETED + raw(0, 0, 0, b"x"), PROTOCOL_ERROR),
    ("data of what never began", GREETED + raw(0, 0, 1, b"x"), PROTOCOL_ERROR),
    ("more padding than data", GREETED + BEGUN + raw(0, 8, 1, b"\x05abcd"), PROTOCOL_ERROR),
    ("padding of nothing", GREETED + BEGUN + raw(0, 8, 1, b""), PROTOCOL_ERROR),
    ("headers of the connection", GREETED + raw(1, 4, 0, block(fields(ECHO))), PROTOCOL_ERROR),
    ("headers of a server's stream", GREETED + raw(1, 4, 2, block(fields(ECHO))), PROTOCOL_ERROR),
    ("a stream that was passed over", GREETED + call(5, ECHO) + call(3, ECHO), PROTOCOL_ERROR),
    ("a priority that is cut off", GREETED + raw(1, 0x24, 1, bytes(4)), FRAME_SIZE_ERROR),
    ("a priority of a wrong length", GREETED + raw(2, 0, 1, bytes(4)), FRAME_SIZE_ERROR),
    ("a priority of the connection", GREETED + raw(2, 0, 0, bytes(5)), PROTOCOL_ERROR),
    ("a continuation of nothing", GREETED + raw(9, 4, 1, b""), PROTOCOL_ERROR),
    ("a continuation of another", GREETED + raw(1, 0, 1, b"") + raw(9, 4, 3, b""), PROTOCOL_ERROR),
    ("a frame between headers", GREETED + raw(1, 0, 1, b"") + raw(0xF, 0, 0, b""), PROTOCOL_ERROR),
    ("headers that go on for ever", GREETED + raw(1, 0, 1, b"") + raw(9, 0, 1, b"") * 40, ENHANCE_YOUR_CALM),
    (
        "headers that are too large coded",
        GREETED + raw(1, 0, 1, b"") + raw(9, 0, 1, bytes(16384)) * 5,
        ENHANCE_YOUR_CALM,
    ),
    (
        "headers that are too large decoded",
        GREETED + headers(1, b"\x40\x01x\x7f\x80\x1e" + b"y" * 3967 + b"\xbe" * 20),
        ENHANCE_YOUR_CALM,
    ),
    ("headers that are none", GREETED + raw(1, 4, 1, b"\xff\xff\xff\xff\xff\xff\xff"), COMPRESSION_ERROR),
    ("headers of no table", GREETED + raw(1, 4, 1, b"\xbe"), COMPRESSION_ERROR),
    ("a table that is too large", GREETED + raw(1, 4, 1, b"\x3f\xe2\x1f"), COMPRESSION_ERROR),
    ("sizes of tables without end", GREETED + raw(1, 4, 1, b"\x3f\xe1\x1f\x20\x3e"), COMPRESSION_ERROR),
    ("a push", GREETED + raw(5, 4, 1, bytes(4)), PROTOCOL_ERROR),
    ("a farewell that is cut off", GREETED + raw(7, 0, 0, bytes(7)), FRAME_SIZE_ERROR),
    ("a farewell of a stream", GREETED + raw(7, 0, 1, bytes(8)), PROTOCOL_ERROR),
]


@pytest.mark.parametrize(("content", "code"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS])
@pytest.mark.parametrize("dribbled", [False, True])
async def test_who_breaks_the_rules_of_connections_is_told_and_left(
    path: str, content: bytes, code: int, dribbled: bool
) -> None:
    async with http2peer.connected(path, greeting=False) as peer:
        reading = asyncio.create_task(peer.end())
        piece = 1 if dribbled and len(content) < 2000 else len(content)
        for begin in range(0, len(content), piece):
            peer.send(content[begin : begin + piece])
            # Who still sends when the connection is closed doesn't get to read why.
            for _ in range(10):
                await asyncio.sleep(0)
            if any(isinstance(each, frames.GoAwayFrame) for each in peer.seen):
                break
        farewell = await reading
        assert farewell is not None
        assert farewell.error_code == code, farewell.additional_data
    assert await echoes(path)


MALFORMED: list[list[tuple[str, str]]] = [
    fields(ECHO, without=":method"),
    fields(ECHO, without=":scheme"),
    fields(ECHO, without=":path"),
    fields(""),
    [(":path", ECHO), *fields(ECHO)],
    [(":status", "200"), *fields(ECHO)],
    [*fields(ECHO), (":late", "x")],
    [*fields(ECHO), ("Upper", "x")],
    [*fields(ECHO), ("", "x")],
    [*fields(ECHO), ("a b", "x")],
    [*fields(ECHO), ("x", "line\nend")],
    [*fields(ECHO), ("x", "null\0")],
    [*fields(ECHO), ("x", " blank")],
    [*fields(ECHO), ("connection", "close")],
    [*fields(ECHO), ("transfer-encoding", "chunked")],
    [("te", "trailers")],
]


@pytest.mark.parametrize("pairs", MALFORMED)
async def test_a_malformed_request_costs_its_own_stream_only(path: str, pairs: list[tuple[str, str]]) -> None:
    async with http2peer.connected(path) as peer:
        peer.send(headers(1, block(pairs)), data(1, message(b""), "END_STREAM"), call(3, ECHO, b"y"))
        assert (await peer.answer(1)).reset == PROTOCOL_ERROR
        assert (await peer.answer(3)).messages == [b"re:y"]


@pytest.mark.parametrize(
    ("pairs", "http", "status"),
    [
        ([(":method", "GET"), *fields(ECHO, without=":method")], "405", Status.UNKNOWN),
        (fields(ECHO, without="content-type"), "415", Status.UNKNOWN),
        (fields(ECHO, ("content-type", "application/grpc+json"), without="content-type"), "415", Status.UNKNOWN),
        (fields(ECHO, without="te"), "400", Status.UNKNOWN),
        (fields(ECHO, ("grpc-timeout", "1 second")), "200", Status.UNKNOWN),
        (fields(ECHO, ("grpc-timeout", "123456789S")), "200", Status.UNKNOWN),
    ],
)
async def test_what_is_no_call_is_refused(path: str, pairs: list[tuple[str, str]], http: str, status: Status) -> None:
    async with http2peer.connected(path) as peer:
        peer.send(headers(1, block(pairs)))
        answer = await peer.answer(1)
        assert (answer.fields[":status"], answer.status) == (http, status.value)
        assert answer.fields["grpc-message"]
        await peer.settled()
        # Nobody reads what would still come.
        assert answer.reset == 0
        peer.send(data(1, message(b"late"), "END_STREAM"), call(3, ECHO, b"y"))
        assert (await peer.answer(3)).messages == [b"re:y"]


async def test_what_comes_after_the_end_of_a_call(path: str) -> None:
    async with http2peer.connected(path) as peer:
        # Of a call that is being answered: its own fault.
        peer.send(call(1, HANG), data(1, b"more"))
        assert (await peer.answer(1)).reset == STREAM_CLOSED
        peer.send(headers(3, block(fields(HANG))), headers(3, block([("x", "y")])))
        assert (await peer.answer(3)).reset == PROTOCOL_ERROR
        peer.send(call(5, HANG), raw(8, 0, 5, bytes(4)))
        assert (await peer.answer(5)).reset == PROTOCOL_ERROR
        peer.send(call(7, HANG), raw(8, 0, 7, b"\x7f\xff\xff\xff"))
        assert (await peer.answer(7)).reset == FLOW_CONTROL_ERROR
        peer.send(call(9, HANG), raw(2, 0, 9, bytes(4)))
        assert (await peer.answer(9)).reset == FRAME_SIZE_ERROR
        # Of one that has ended it may have been on its way.
        late = [data(1, b"x"), headers(1, block([("x", "y")]), "END_HEADERS", "END_STREAM"), raw(8, 0, 1, b"\0\0\0\1")]
        peer.send(*late, raw(3, 0, 1, bytes(4)), raw(3, 0, 1, bytes(4)), raw(2, 0, 1, bytes(4)))
        peer.send(call(11, ECHO, b"y"))
        assert (await peer.answer(11)).messages == [b"re:y"]


async def test_all_that_the_rules_allow(path: str) -> None:
    pairs = fields(ECHO, ("x-long", "v" * 40000))
    coded = block(pairs)
    assert len(coded) > 32000
    async with http2peer.connected(path) as peer:
        peer.send(
            raw(0xBE, 0xFF, 77, b"an unknown frame"),
            raw(2, 0, 9, bytes(5)),
            raw(4, 0, 0, b"\x00\x99\x00\x00\x00\x01"),
            headers(1, coded[:9], "PRIORITY", "PADDED", pad_length=200, depends_on=3, stream_weight=9, exclusive=True),
            raw(9, 0, 1, coded[9:16000]),
            raw(9, 0, 1, b""),
            raw(9, 0, 1, coded[16000:32000]),
            raw(9, 4, 1, coded[32000:]),
            data(1, message(b"padded")[:3], "PADDED", pad_length=255),
            data(1, b""),
            data(1, message(b"padded")[3:], "PADDED", pad_length=0),
            # A client's trailers.
            headers(1, block([("x-trailer", "1")]), "END_HEADERS", "END_STREAM"),
            raw(6, 1, 0, b"answered"),
            raw(7, 0, 0, bytes(8) + b"debug data"),
        )
        answer = await peer.answer(1)
        assert answer.messages == [b"re:padded"]
        assert answer.status == 0
        assert answer.fields["content-type"].startswith("application/grpc")
        pings = [each for each in peer.seen if isinstance(each, frames.PingFrame)]
        assert pings == []


async def test_settings_and_pings_are_acknowledged(path: str) -> None:
    async with http2peer.connected(path) as peer:
        peer.send(raw(6, 0, 0, b"12345678"), raw(4, 0, 0, b""))
        ping = await peer.first(frames.PingFrame)
        assert (ping.opaque_data, set(ping.flags)) == (b"12345678", {"ACK"})
        await peer.settled()
        acknowledged = [each for each in peer.seen if isinstance(each, frames.SettingsFrame) and "ACK" in each.flags]
        assert len(acknowledged) == 2
        greeting = await peer.first(frames.SettingsFrame)
        assert greeting.settings[frames.SettingsFrame.MAX_CONCURRENT_STREAMS] == connection.MAX_STREAMS
        assert greeting.settings[frames.SettingsFrame.MAX_HEADER_LIST_SIZE] == connection.MAX_HEADERS


async def test_tables_of_header_fields_are_kept(path: str) -> None:
    import hpack

    async with http2peer.connected(path) as peer:
        encoder = hpack.Encoder()
        number = 1
        for size in (4096, 0, 100, 4096):
            encoder.header_table_size = size
            for again in range(4):
                # Some with a field of their own, which moves all entries of the table.
                more = [("x-own", str(number))] if again == 2 else []
                peer.send(
                    headers(number, encoder.encode([*fields(ECHO), *more])), data(number, message(b"z"), "END_STREAM")
                )
                assert (await peer.answer(number)).messages == [b"re:z"]
                number += 2


@pytest.mark.parametrize("kept", [1, 3, 5, 9])
async def test_messages_come_in_any_pieces(path: str, kept: int) -> None:
    content = message(b"one") + message(b"") + message(b"three" * 50)
    async with http2peer.connected(path) as peer:
        peer.send(headers(1, block(fields(MANY))))
        for begin in range(0, len(content), kept):
            peer.send(data(1, content[begin : begin + kept]))
            await asyncio.sleep(0)
        peer.send(data(1, b"", "END_STREAM"))
        assert (await peer.answer(1)).messages == [b"re:one", b"re:", b"re:" + b"three" * 50]


async def test_a_message_that_ends_before_its_end(path: str) -> None:
    async with http2peer.connected(path) as peer:
        peer.send(headers(1, block(fields(ECHO))), data(1, message(b"cut off")[:-1], "END_STREAM"))
        assert (await peer.answer(1)).status == Status.INTERNAL.value
        peer.send(headers(3, block(fields(ECHO)), "END_HEADERS", "END_STREAM"))
        assert (await peer.answer(3)).status == Status.INVALID_ARGUMENT.value


@contextlib.asynccontextmanager
async def calling(path: str, *more: tuple[str, str], method: str = HANG) -> AsyncIterator[Callable[[], Any]]:
    async with http2peer.connected(path) as peer:
        peer.send(call(1, method, b"", *more))
        yield lambda: peer.answer(1)


@pytest.mark.parametrize("timeout", ["0n", "1n", "1u", "20m", "00000000H"])
async def test_deadlines_of_any_length_are_told(path: str, timeout: str) -> None:
    async with calling(path, ("grpc-timeout", timeout)) as answer:
        assert (await answer()).status == Status.DEADLINE_EXCEEDED.value


@pytest.mark.parametrize("timeout", ["99999999H", "99999999S"])
async def test_deadlines_beyond_all_are_none(path: str, timeout: str) -> None:
    async with calling(path, ("grpc-timeout", timeout), method=ECHO) as answer:
        assert (await answer()).status == 0
