"""A client below gRPC: it sends the frames that it is told to, right or wrong, and shows what comes back.

Frames are made and read by hyperframe and hpack, which know nothing of our own.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any, TypeVar

import hpack
from hyperframe import frame as frames

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

Kind = TypeVar("Kind", bound=frames.Frame)

#: What every call of gRPC begins with; ":path" comes on top.
FIELDS = [
    (":method", "POST"),
    (":scheme", "http"),
    (":authority", "localhost"),
    ("content-type", "application/grpc"),
    ("te", "trailers"),
]


def message(content: bytes) -> bytes:
    """A gRPC message."""
    return b"\0" + len(content).to_bytes(4, "big") + content


def fields(path: str, *more: tuple[str, str], without: str = "") -> list[tuple[str, str]]:
    """The header fields of a call."""
    made = [*FIELDS[:2], (":path", path), *FIELDS[2:], *more]
    return [pair for pair in made if pair[0] != without]


def block(pairs: Sequence[tuple[str, str]]) -> bytes:
    """Header fields, coded so that no table is changed."""
    return hpack.Encoder().encode([(name, value, True) for name, value in pairs])


def headers(number: int, coded: bytes, *flags: str, **more: Any) -> bytes:
    """A HEADERS frame; without flags it has all the fields, and data follows."""
    return frames.HeadersFrame(number, coded, flags=flags or ("END_HEADERS",), **more).serialize()


def data(number: int, content: bytes, *flags: str, **more: Any) -> bytes:
    return frames.DataFrame(number, content, flags=flags, **more).serialize()


def call(number: int, path: str, content: bytes = b"", *more: tuple[str, str]) -> bytes:
    """A whole call with one message."""
    begin = headers(number, block(fields(path, *more)))
    return begin + data(number, message(content), "END_STREAM")


def raw(kind: int, flags: int, number: int, content: bytes) -> bytes:
    """A frame that no library would make."""
    return len(content).to_bytes(3, "big") + bytes((kind, flags)) + number.to_bytes(4, "big") + content


class Answer:
    """What came of one call.

    Attributes:
        fields: Its header fields and trailers.
        content: All of its data.
        ended: The server has ended it.
        reset: The code that the server reset it with.
    """

    def __init__(self) -> None:
        self.fields: dict[str, str] = {}
        self.content = b""
        self.ended = False
        self.reset: int | None = None

    @property
    def messages(self) -> list[bytes]:
        found, rest = [], self.content
        while rest:
            end = 5 + int.from_bytes(rest[1:5], "big")
            found.append(rest[5:end])
            rest = rest[end:]
        return found

    @property
    def status(self) -> int:
        return int(self.fields["grpc-status"])


class Peer:
    """A connection to a server.

    Attributes:
        seen: All frames that came.
        closed: The server has closed the connection.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer
        self._decoder = hpack.Decoder()
        self._rest = b""
        self.seen: list[frames.Frame] = []
        self.answers: dict[int, Answer] = {}
        self.closed = False

    def send(self, *content: bytes) -> None:
        """Send bytes; whether the server still takes them is not asked."""
        if not self.writer.is_closing():
            self.writer.write(b"".join(content))

    async def _receive(self) -> None:
        """Wait for the next bytes, and take up the frames that they complete."""
        try:
            received = await self._reader.read(1 << 18)
        except ConnectionError:
            received = b""
        self.closed = not received
        self._rest += received
        while len(self._rest) >= 9:
            frame, length = frames.Frame.parse_frame_header(memoryview(self._rest[:9]))
            if len(self._rest) < 9 + length:
                return
            frame.parse_body(memoryview(self._rest[9 : 9 + length]))
            self._rest = self._rest[9 + length :]
            self._take(frame)

    def _take(self, frame: frames.Frame) -> None:
        self.seen.append(frame)
        answer = self.answers.setdefault(frame.stream_id, Answer())
        if isinstance(frame, frames.HeadersFrame):
            assert "END_HEADERS" in frame.flags
            answer.fields |= {str(name): str(value) for name, value in self._decoder.decode(frame.data)}
        elif isinstance(frame, frames.DataFrame):
            answer.content += frame.data
        elif isinstance(frame, frames.RstStreamFrame):
            answer.reset = frame.error_code
        answer.ended |= "END_STREAM" in frame.flags

    async def until(self, condition: Any) -> None:
        """Wait until something is so; a server that closes the connection instead is an error."""
        async with asyncio.timeout(20):
            while not condition():
                assert not self.closed, self.seen
                await self._receive()

    async def answer(self, number: int) -> Answer:
        """The answer of a call, once it has ended."""
        answer = self.answers.setdefault(number, Answer())
        await self.until(lambda: answer.ended or answer.reset is not None)
        return answer

    async def first(self, kind: type[Kind], number: int = 0) -> Kind:
        """The first frame of a kind, once it is there."""

        def found() -> list[Kind]:
            return [each for each in self.seen if isinstance(each, kind) and each.stream_id == number]

        await self.until(found)
        return found()[0]

    async def end(self) -> frames.GoAwayFrame | None:
        """Wait until the server closes the connection; what it said of that."""
        async with asyncio.timeout(20):
            while not self.closed:
                await self._receive()
        return next((each for each in self.seen if isinstance(each, frames.GoAwayFrame)), None)

    async def settled(self) -> None:
        """Wait until the server has taken up all that was sent."""
        content = len(self.seen).to_bytes(8, "big")
        self.send(frames.PingFrame(0, content).serialize())
        await self.until(
            lambda: any(isinstance(each, frames.PingFrame) and each.opaque_data == content for each in self.seen)
        )


@contextlib.asynccontextmanager
async def connected(path: str, *, greeting: bool = True, **settings: int) -> AsyncIterator[Peer]:
    """A client that has said so much as every one says.

    Args:
        path: The server's socket.
        greeting: Say it.
        settings: The client's, by hyperframe's names for them.
    """
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        peer = Peer(reader, writer)
        if greeting:
            values = {getattr(frames.SettingsFrame, name): value for name, value in settings.items()}
            peer.send(PREFACE, frames.SettingsFrame(0, settings=values).serialize())
        yield peer
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
