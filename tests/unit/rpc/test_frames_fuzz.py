"""Any bytes and any frames: the server ends such a connection or answers, keeps nothing of it, and serves others as before.

``NIXLET_FRAMES=20000`` makes it long: so many connections of each kind.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import uvloop
from grpclib import const
from grpclib.const import Cardinality
from hypothesis import strategies as st

from nixlet.host import unixsocket
from nixlet.rpc import server
from support import http2peer
from support.http2peer import block, call, fields, message, raw

EXAMPLES = int(os.environ.get("NIXLET_FRAMES", "60"))

pytestmark = pytest.mark.timeout(120 + EXAMPLES)

ECHO, HANG, MANY = "/test.Fuzz/Echo", "/test.Fuzz/Hang", "/test.Fuzz/Many"

GREETED = http2peer.PREFACE + raw(4, 0, 0, b"")

#: Megabytes that the process may be larger after a long run than after its beginning.
GROWTH = 12


class Fuzz:
    """Methods of each kind."""

    async def echo(self, stream: Any) -> None:
        await stream.send_message(b"re:" + await server.request(stream))

    async def many(self, stream: Any) -> None:
        async for each in stream:
            await stream.send_message(each * 100)

    async def hang(self, stream: Any) -> None:
        await asyncio.Event().wait()

    def __mapping__(self) -> dict[str, const.Handler]:
        return {
            ECHO: const.Handler(self.echo, Cardinality.UNARY_UNARY, bytes, bytes),
            HANG: const.Handler(self.hang, Cardinality.UNARY_UNARY, bytes, bytes),
            MANY: const.Handler(self.many, Cardinality.STREAM_STREAM, bytes, bytes),
        }


class Errors(logging.Handler):
    """Keeps what is logged as an error, by us or by the event loop."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(self.format(record))


class Served:
    """A server, and a client of it that does all as it should."""

    def __init__(self, runner: asyncio.Runner, path: str, good: http2peer.Peer, errors: Errors) -> None:
        self.runner = runner
        self._errors = errors
        self.path = path
        self._good = good
        self._number = -1

    async def _sent(self, content: bytes, piece: int) -> None:
        async with http2peer.connected(self.path, greeting=False) as peer:
            for begin in range(0, len(content), piece):
                peer.send(content[begin : begin + piece])
                await asyncio.sleep(0)
            with contextlib.suppress(OSError, RuntimeError):
                peer.writer.write_eof()
            # Closed by the server, since we send no more, if not before; what it sends is well-formed.
            await peer.end()

    async def _told(self, content: bytes, piece: int) -> None:
        before = len(asyncio.all_tasks())
        await self._sent(content, piece)
        self._number += 2
        self._good.send(call(self._number, ECHO, b"good"))
        answer = await self._good.answer(self._number)
        assert (answer.messages, answer.status) == ([b"re:good"], 0)
        self._good.seen.clear()
        self._good.answers.clear()
        self._good.send(raw(8, 0, 0, (64).to_bytes(4, "big")))
        async with asyncio.timeout(20):
            while len(asyncio.all_tasks()) > before:
                await asyncio.sleep(0)

    def tell(self, content: bytes, piece: int) -> None:
        """Send something on a connection of its own, in pieces; then nothing of it is left, and the good client is answered."""
        self.runner.run(self._told(content, piece))
        assert self._errors.seen == []


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    path = str(tmp_path_factory.mktemp("fuzz") / "s" / "f.sock")
    errors = Errors()
    logging.getLogger().addHandler(errors)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        stack = contextlib.AsyncExitStack()

        async def start() -> Served:
            await stack.enter_async_context(server.serve(unixsocket.listen(path), [Fuzz()]))
            good = await stack.enter_async_context(http2peer.connected(path))
            await good.settled()
            return Served(runner, path, good, errors)

        try:
            yield runner.run(start())
        finally:
            runner.run(stack.aclose())
            logging.getLogger().removeHandler(errors)


numbers = st.sampled_from([0, 1, 1, 1, 3, 3, 5, 7, 2, 2**31 - 1, 2**32 - 1])
small = st.binary(max_size=40)
coded = st.one_of(
    st.sampled_from([ECHO, ECHO, HANG, MANY, "/none", ""]).flatmap(
        lambda path: st.sampled_from(
            [
                block(fields(path)),
                block(fields(path, ("grpc-timeout", "1m"))),
                block(fields(path, without="te")),
                block([("x-trailer", "1")]),
            ]
        )
    ),
    small,
    # What changes the tables, or names what is in them.
    st.lists(
        st.sampled_from([b"\x40\x01a\x01b", b"\xbe", b"\x83", b"\x20", b"\x3f\xe1\x1f", b"\x00\x01a\x00"]), max_size=8
    ).map(b"".join),
)
contents = st.one_of(
    small,
    small.map(message),
    st.integers(0, 2**32 - 1).map(lambda number: number.to_bytes(4, "big")),
    st.tuples(st.integers(0, 8), st.integers(0, 2**32 - 1)).map(
        lambda pair: pair[0].to_bytes(2, "big") + pair[1].to_bytes(4, "big")
    ),
    st.just(bytes(8)),
    st.just(bytes(16384)),
)
flags = st.one_of(st.sampled_from([0, 1, 4, 5, 5]), st.integers(0, 255))
one_frame = st.one_of(
    st.builds(raw, st.just(1), st.sampled_from([4, 5, 4, 5, 0, 1, 0x2C]), numbers, coded),
    st.builds(raw, st.just(9), flags, numbers, coded),
    st.builds(raw, st.sampled_from([0, 0, 2, 3, 4, 6, 7, 8, 8, 5, 200]), flags, numbers, contents),
    st.builds(call, st.sampled_from([1, 3, 5, 7, 9, 11]), st.sampled_from([ECHO, HANG, MANY]), small),
)

pieces = st.sampled_from([1 << 20, 1 << 20, 100, 9, 3])
rounds = hypothesis.settings(
    max_examples=EXAMPLES,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)


@rounds
@hypothesis.given(st.booleans(), st.binary(max_size=3000), pieces)
def test_any_bytes(served: Served, greeted: bool, content: bytes, piece: int) -> None:
    served.tell((GREETED if greeted else b"") + content, piece)


@rounds
@hypothesis.given(st.lists(one_frame, max_size=40), pieces)
def test_any_frames(served: Served, sent: list[bytes], piece: int) -> None:
    served.tell(GREETED + b"".join(sent), piece)


@rounds
@hypothesis.given(st.data(), pieces)
def test_good_calls_with_changed_bytes(served: Served, data: st.DataObject, piece: int) -> None:
    content = bytearray(
        GREETED + b"".join(call(number, ECHO, b"x" * 50, ("grpc-timeout", "1S")) for number in (1, 3, 5))
    )
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    served.tell(bytes(content), piece)


def test_nothing_is_kept_of_ended_connections(served: Served) -> None:
    largest = b"".join(call(number, HANG, bytes(10_000)) for number in range(1, 201, 2))

    def resident() -> int:
        # As it is now: what tests before this one had at their most says nothing (proc_pid_statm(5)).
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE") >> 20

    for _ in range(20):
        served.tell(GREETED + largest, 1 << 20)
    before = resident()
    for _ in range(EXAMPLES // 3):
        served.tell(GREETED + largest, 1 << 20)
    assert resident() - before < GROWTH
