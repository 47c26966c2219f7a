"""How calls end: once, with a status that tells how, and with nothing kept, whatever their handlers and clients do."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from grpclib import const
from grpclib.const import Cardinality, Status
from grpclib.exceptions import GRPCError, ProtocolError, StreamTerminatedError

from nixlet.host import unixsocket
from nixlet.rpc import receiving, server, transport
from support import http2peer
from support.http2peer import block, call, data, fields, headers, message, raw

ONE, MANY, ALL = Cardinality.UNARY_UNARY, Cardinality.UNARY_STREAM, Cardinality.STREAM_UNARY

INTERNAL_ERROR, CANCEL = 2, 8


class Serving:
    """A server whose methods are added as a test needs them, and what it told of its calls.

    Attributes:
        path: Its socket.
        told: Methods and statuses of the calls that have ended.
        release: What methods may wait for; at the end it is set.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.told: list[tuple[str, str]] = []
        self.release = asyncio.Event()
        self._methods: dict[str, const.Handler] = {}

    def add(self, method: Any, cardinality: Cardinality = ONE) -> str:
        name = f"/test.Endings/{method.__name__}"
        self._methods[name] = const.Handler(method, cardinality, bytes, bytes)
        return name

    def observe(self, path: str, code: str, _seconds: float) -> None:
        self.told.append((path.rpartition("/")[2], code))

    def __mapping__(self) -> dict[str, const.Handler]:
        return self._methods

    @contextlib.asynccontextmanager
    async def connected(self, **settings: int) -> AsyncIterator[http2peer.Peer]:
        async with server.serve(unixsocket.listen(self.path), [self], observe=self.observe):
            try:
                async with http2peer.connected(self.path, greeting=True, **settings) as peer:
                    await peer.settled()
                    yield peer
            finally:
                self.release.set()


@pytest.fixture
def serving(tmp_path: Path) -> Serving:
    return Serving(str(tmp_path / "s" / "e.sock"))


async def settles(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def reset(number: int) -> bytes:
    return raw(3, 0, number, CANCEL.to_bytes(4, "big"))


@pytest.mark.parametrize(
    "untold",
    [
        GRPCError(Status.NOT_FOUND, "m", ["a detail that is no bytes"]),
        GRPCError(Status.NOT_FOUND, b"bytes"),  # type: ignore[arg-type]  # what a mistake of ours would be
        GRPCError(5, "m"),  # type: ignore[arg-type]  # as above
    ],
)
async def test_a_failure_that_cannot_be_told_is_told_as_one(
    serving: Serving, caplog: pytest.LogCaptureFixture, untold: GRPCError
) -> None:
    async def fail(_stream: Any) -> None:
        raise untold

    path = serving.add(fail)
    async with serving.connected() as peer:
        peer.send(call(1, path))
        assert (await peer.answer(1)).status == Status.INTERNAL.value
    assert [record.name for record in caplog.records] == ["nixlet.rpc"]
    assert serving.told == [("fail", "INTERNAL")]


async def test_a_call_that_nobody_answers_is_reset(serving: Serving) -> None:
    class OddError(BaseException):
        pass

    tasks: list[asyncio.Task[Any] | None] = []

    async def leave(_stream: Any) -> None:
        tasks.append(asyncio.current_task())
        raise OddError

    path = serving.add(leave)
    async with serving.connected() as peer:
        peer.send(call(1, path))
        assert (await peer.answer(1)).reset == INTERNAL_ERROR
    assert isinstance(tasks[0], asyncio.Task)
    with pytest.raises(OddError):
        tasks[0].result()


async def test_a_call_is_cancelled_once(serving: Serving) -> None:
    done = list[str]()

    async def hang(_stream: Any) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            done.append("begun")
            try:
                await serving.release.wait()
            except asyncio.CancelledError:
                done.append("cut off")
                raise
            done.append("ended")

    path = serving.add(hang)
    async with serving.connected() as peer:
        # Its client gives up when the deadline has passed, as Go's do, and is gone then.
        peer.send(call(1, path, b"", ("grpc-timeout", "20m")))
        await settles(lambda: done)
        peer.send(reset(1))
        await peer.settled()
        peer.writer.transport.abort()
        async with http2peer.connected(serving.path) as other:
            await other.settled()
        serving.release.set()
        await settles(lambda: serving.told)
    assert done == ["begun", "ended"]
    assert serving.told == [("hang", "DEADLINE_EXCEEDED")]


async def test_a_deadline_is_told_before_the_handler_has_put_everything_away(serving: Serving) -> None:
    failed = list[Exception]()

    async def hang(stream: Any) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await serving.release.wait()
        for attempt in (stream.recv_message, lambda: stream.send_message(b"late")):
            with pytest.raises(StreamTerminatedError) as caught:
                await attempt()
            failed.append(caught.value)

    path = serving.add(hang)
    async with serving.connected() as peer:
        peer.send(call(1, path, b"", ("grpc-timeout", "20m")))
        answer = await peer.answer(1)
        assert (answer.status, answer.messages) == (Status.DEADLINE_EXCEEDED.value, [])
        serving.release.set()
        await settles(lambda: serving.told)
    assert len(failed) == 2
    assert serving.told == [("hang", "DEADLINE_EXCEEDED")]


async def test_a_call_that_was_answered_is_not_cancelled(serving: Serving) -> None:
    done = list[str]()

    async def work(stream: Any) -> None:
        await server.request(stream)
        await stream.send_message(b"ok")
        await stream.send_trailing_metadata()
        await serving.release.wait()
        done.append("ended")

    path = serving.add(work)
    async with serving.connected() as peer:
        peer.send(call(1, path, b"", ("grpc-timeout", "100m")), call(3, path))
        assert (await peer.answer(1)).status == (await peer.answer(3)).status == 0
        peer.send(reset(3))
        # A deadline that begins later, and so passes later.
        peer.send(call(5, "/test.Endings/None", b"", ("grpc-timeout", "300m")))
        await peer.answer(5)
        await asyncio.sleep(0.3)
        serving.release.set()
        await settles(lambda: len(done) == 2)
    assert sorted(serving.told) == [("None", "UNIMPLEMENTED"), ("work", "OK"), ("work", "OK")]


@pytest.mark.parametrize("cardinality", [ONE, MANY])
async def test_an_answer_has_its_head_also_when_the_client_reads_late(
    serving: Serving, cardinality: Cardinality
) -> None:
    async def large(stream: Any) -> None:
        await server.request(stream)
        await stream.send_message(bytes(8_000_000))

    async def small(stream: Any) -> None:
        await server.request(stream)
        await stream.send_message(b"small")

    paths = serving.add(large, MANY), serving.add(small, cardinality)
    async with serving.connected(INITIAL_WINDOW_SIZE=2**31 - 1) as peer:
        peer.writer.transport.pause_reading()  # type: ignore[attr-defined]  # a socket's can
        peer.send(raw(8, 0, 0, (2**30).to_bytes(4, "big")))
        peer.send(call(1, paths[0]), call(3, paths[1], b"", ("grpc-timeout", "100m")))
        await settles(lambda: serving.told)
        peer.writer.transport.resume_reading()  # type: ignore[attr-defined]  # as above
        answer = await peer.answer(3)
        assert (answer.fields[":status"], answer.status) == ("200", Status.DEADLINE_EXCEEDED.value)
        assert len((await peer.answer(1)).messages[0]) == 8_000_000
    assert serving.told == [("small", "DEADLINE_EXCEEDED"), ("large", "OK")]


async def test_messages_are_not_sent_into_each_other(serving: Serving) -> None:
    refused = 0

    async def two(stream: Any) -> None:
        nonlocal refused
        first = asyncio.create_task(stream.send_message(b"A" * 100))
        await asyncio.sleep(0)
        while not first.done():
            with pytest.raises(ProtocolError):
                await stream.send_message(b"B" * 100)
            refused += 1
            await asyncio.sleep(0)
        await stream.send_message(b"C" * 100)

    path = serving.add(two, MANY)
    async with serving.connected(INITIAL_WINDOW_SIZE=50) as peer:
        peer.send(call(1, path))
        await peer.until(lambda: peer.answers.get(1) is not None and len(peer.answers[1].content) == 50)
        peer.send(raw(8, 0, 1, (1000).to_bytes(4, "big")))
        assert (await peer.answer(1)).messages == [b"A" * 100, b"C" * 100]
    assert refused


async def test_nothing_is_sent_behind_the_half_of_a_message(serving: Serving) -> None:
    refused = list[ProtocolError]()

    async def half(stream: Any) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(stream.send_message(b"A" * 100), 0.01)
        with pytest.raises(ProtocolError) as caught:
            await stream.send_message(b"B")
        refused.append(caught.value)

    path = serving.add(half, MANY)
    async with serving.connected(INITIAL_WINDOW_SIZE=50) as peer:
        peer.send(call(1, path))
        answer = await peer.answer(1)
    assert (answer.status, answer.content) == (Status.INTERNAL.value, message(b"A" * 100)[:50])
    assert len(refused) == 1


async def test_a_call_does_not_end_well_inside_a_message(serving: Serving) -> None:
    async def leave(stream: Any) -> None:
        sending.append(asyncio.create_task(stream.send_message(b"A" * 100)))
        await asyncio.sleep(0)

    sending: list[asyncio.Task[None]] = []
    path = serving.add(leave, MANY)
    async with serving.connected(INITIAL_WINDOW_SIZE=50) as peer:
        peer.send(call(1, path))
        assert (await peer.answer(1)).status == Status.INTERNAL.value
        with pytest.raises(StreamTerminatedError):
            await sending[0]


@pytest.mark.parametrize("way", ["answered", "refused"])
async def test_a_client_that_still_sends_is_told_to_stop(serving: Serving, way: str) -> None:
    async def first(stream: Any) -> None:
        request = await stream.recv_message()
        if way == "refused":
            raise GRPCError(Status.ABORTED, "no")
        await stream.send_message(request)

    path = serving.add(first, ALL)
    async with serving.connected() as peer:
        peer.send(headers(1, block(fields(path))), data(1, message(b"x")))
        answer = await peer.answer(1)
        await peer.settled()
        assert answer.ended
        assert answer.status == (0 if way == "answered" else Status.ABORTED.value)
        assert answer.reset == 0


async def test_nothing_more_is_asked_of_a_call_that_was_given_up(serving: Serving) -> None:
    failed = list[str]()

    async def late(stream: Any) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await serving.release.wait()
        try:
            await stream.recv_message()
        except StreamTerminatedError as error:
            failed.append(str(error))

    path = serving.add(late)
    async with serving.connected() as peer:
        peer.send(headers(1, block(fields(path))), data(1, b"\0\0\4\0\0" + bytes(16000)), data(1, bytes(16384)) * 9)
        await peer.settled()
        peer.send(reset(1))
        await peer.settled()
        serving.release.set()
        await settles(lambda: serving.told)
        await peer.settled()
        assert [each for each in peer.seen if each.stream_id] == []
    assert failed == ["the client gave up"]
    assert serving.told == [("late", "CANCELLED")]


async def test_who_compresses_is_told_what_is_understood(serving: Serving) -> None:
    path = serving.add(server.request)
    async with serving.connected() as peer:
        peer.send(headers(1, block(fields(path))), data(1, b"\1" + message(b"x")[1:], "END_STREAM"))
        answer = await peer.answer(1)
    assert (answer.status, answer.fields["grpc-accept-encoding"]) == (Status.UNIMPLEMENTED.value, "identity")


AT_ONCE = receiving.LARGE // transport.MAX_MESSAGE


def large(number: int, path: str, *more: tuple[str, str]) -> bytes:
    """A call whose message has begun to come in."""
    begin = b"\0" + transport.MAX_MESSAGE.to_bytes(4, "big")
    return headers(number, block(fields(path, *more))) + data(number, begin + bytes(1000))


async def test_large_messages_have_room_together(serving: Serving) -> None:
    async def size(stream: Any) -> None:
        await stream.send_message(b"%d" % len(await server.request(stream)))

    path = serving.add(size)
    async with serving.connected() as peer, http2peer.connected(serving.path) as other:
        for number in range(1, 2 * AT_ONCE, 2):
            peer.send(large(number, path))
        await peer.settled()
        # Not for one more, on whatever connection; others go on.
        other.send(large(1, path), call(3, path, b"x"))
        assert (await other.answer(1)).status == Status.RESOURCE_EXHAUSTED.value
        assert (await other.answer(3)).messages == [b"1"]
        peer.send(reset(1))
        await peer.settled()
        other.send(large(5, path))
        await other.settled()
        assert not other.answers.get(5)
        # All that isn't refused gets through.
        left = transport.MAX_MESSAGE - 1000
        sent = 0
        while sent < left:
            for _ in range(8):
                piece = min(16000, left - sent)
                other.send(data(5, bytes(piece)))
                sent += piece
            await other.settled()
        other.send(data(5, b"", "END_STREAM"))
        assert (await other.answer(5)).messages == [b"%d" % transport.MAX_MESSAGE]


@pytest.mark.parametrize("end", ["reset", "cut off", "too late", "gone"])
async def test_room_is_given_back_however_a_call_ends(serving: Serving, end: str) -> None:
    path = serving.add(server.request)
    more = [("grpc-timeout", "300m")] if end == "too late" else []
    async with serving.connected() as peer, contextlib.AsyncExitStack() as clients:
        for again in range(2):
            client = await clients.enter_async_context(http2peer.connected(serving.path)) if end == "gone" else peer
            numbers = range(1 + 20 * again, 1 + 20 * again + 2 * AT_ONCE, 2)
            client.send(*(large(number, path, *more) for number in numbers))
            await client.settled()
            if end == "reset":
                client.send(*(reset(number) for number in numbers))
            elif end == "cut off":
                client.send(*(data(number, b"", "END_STREAM") for number in numbers))
            elif end == "gone":
                await clients.aclose()
            await settles(lambda all_of=(again + 1) * AT_ONCE: len(serving.told) == all_of)
    code = {"cut off": "INTERNAL", "too late": "DEADLINE_EXCEEDED"}.get(end, "CANCELLED")
    assert serving.told == [("request", code)] * 2 * AT_ONCE


async def test_room_is_given_back_with_each_message(serving: Serving) -> None:
    async def count(stream: Any) -> None:
        sizes = [len(each) async for each in stream]
        await stream.send_message(b"%d %d" % (len(sizes), sum(sizes)))

    path = serving.add(count, ALL)
    content = message(bytes(300_000))
    async with serving.connected() as peer:
        peer.send(headers(1, block(fields(path))))
        for _ in range(3):
            for begin in range(0, len(content), 100_000):
                piece = content[begin : begin + 100_000]
                peer.send(*(data(1, piece[at : at + 16000]) for at in range(0, len(piece), 16000)))
                await peer.settled()
        # The call goes on, and its messages are no longer coming in.
        peer.send(*(large(number, path) for number in range(3, 3 + 2 * AT_ONCE, 2)))
        await peer.settled()
        assert serving.told == []
        peer.send(data(1, b"", "END_STREAM"))
        assert (await peer.answer(1)).messages == [b"3 900000"]
    assert sorted(serving.told) == [("count", "CANCELLED")] * AT_ONCE + [("count", "OK")]
