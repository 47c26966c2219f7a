"""One connection to a Nix daemon: the handshake, and requests with the log that comes before each reply."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import Protocol, TypeVar

from nixlet import errors
from nixlet.store.daemon import wire

T = TypeVar("T")

_CHUNK = 1 << 16
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


class LogSink(Protocol):
    """Who wants the daemon's log."""

    def line(self, text: str) -> None:
        """A line for a person."""
        ...

    def started(self, number: int, kind: int, fields: list[int | str]) -> None:
        """An activity began."""
        ...

    def result(self, number: int, kind: int, fields: list[int | str]) -> None:
        """An activity reported something."""
        ...


class DaemonError(errors.NixletError):
    """The daemon answered a request with an error; the connection is still good."""


class Connection:
    """A connection, good for one request after the other. What cuts a request short closes it."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        last_words: Callable[[], Awaitable[str]] | None = None,
    ) -> None:
        """Speak over a pair of streams; ``last_words`` tells what a daemon that ended has said of it elsewhere."""
        self._last_words = last_words
        self._stream = reader
        self._writer = writer
        self._reader = wire.Reader()
        self._lock = asyncio.Lock()
        self._closed = False
        self.minor = 0
        #: How many requests were sent, for tests that count.
        self.requests = 0

    async def handshake(self) -> None:
        """Agree on the protocol's version.

        Raises:
            ProtocolError: The peer is no Nix daemon, or too old.
        """
        async with self._whole():
            self._writer.write(wire.integer(wire.CLIENT_MAGIC) + wire.integer(wire.PROTOCOL))
            magic, version = await self._parse(lambda reader: (reader.integer(), reader.integer()))
            if magic != wire.SERVER_MAGIC:
                raise wire.ProtocolError("the Nix daemon's socket is served by something else")
            if version >> 8 > 1:
                raise wire.ProtocolError(
                    f"the Nix daemon speaks protocol {version >> 8}.{version & 0xFF}, which is newer than nixlet",
                    hint="update nixlet",
                )
            if version < wire.MIN_PROTOCOL:
                raise wire.ProtocolError(
                    f"the Nix daemon speaks protocol {version >> 8}.{version & 0xFF}, older than 1.{wire.MIN_PROTOCOL & 0xFF}",
                    hint="update Nix to 2.4 or later",
                )
            self.minor = min(version, wire.PROTOCOL) & 0xFF
            # No CPU affinity, no reserved space: both are relics that the protocol still asks for.
            self._writer.write(wire.integer(0) + wire.integer(0))
            if self.minor >= 33:
                await self._parse(wire.Reader.string)  # Nix's version
            if self.minor >= 35:
                await self._parse(wire.Reader.integer)  # whether it trusts us to add unsigned paths
            await self._read_log(None)

    async def request(
        self, operation: int, body: bytes, parser: Callable[[wire.Reader], T], sink: LogSink | None = None
    ) -> T:
        """Send a request and parse its reply."""
        async with self._whole():
            self.requests += 1
            self._writer.write(wire.integer(operation) + body)
            return await self._reply(parser, sink)

    async def upload(self, operation: int, body: bytes, data: Iterable[bytes], parser: Callable[[wire.Reader], T]) -> T:
        """Send a request with data of any length behind it, and parse its reply.

        Args:
            operation: The operation.
            body: The request.
            data: The data, in pieces; they are asked for in another thread.
            parser: Parses the reply.

        Raises:
            DaemonError: The daemon refuses.
        """
        async with self._whole():
            self.requests += 1
            self._writer.write(wire.integer(operation) + body)
            writing = asyncio.create_task(self._write_frames(iter(data)), name="data for the Nix daemon")
            reading = asyncio.create_task(self._reply(parser, None), name="reply of the Nix daemon")
            try:
                await asyncio.wait({writing, reading}, return_when=asyncio.FIRST_EXCEPTION)
                if not (writing.done() and reading.done()):
                    # Refused in the middle, or cut short by us: what is left of it would be taken for a request.
                    self.close()
                if writing.done():
                    writing.result()
                return reading.result()
            finally:
                for task in (writing, reading):
                    task.cancel()
                await asyncio.gather(writing, reading, return_exceptions=True)

    async def _write_frames(self, data: Iterator[bytes]) -> None:
        while piece := await asyncio.to_thread(next, data, b""):
            self._writer.write(wire.integer(len(piece)) + piece)
            await self._writer.drain()
        self._writer.write(wire.integer(0))
        await self._writer.drain()

    async def requests_in_a_row(
        self, operation: int, bodies: Iterable[bytes], parser: Callable[[wire.Reader], T]
    ) -> list[T | DaemonError]:
        """Send many short requests at once and parse their replies, errors among them."""
        async with self._whole():
            encoded = [wire.integer(operation) + body for body in bodies]
            self.requests += len(encoded)
            writing = asyncio.create_task(self._write_all(encoded), name="requests to the Nix daemon")
            replies: list[T | DaemonError] = []
            try:
                for _ in encoded:
                    try:
                        replies.append(await self._reply(parser, None))
                    except DaemonError as error:
                        replies.append(error)
                await writing
            finally:
                # Whatever went wrong with writing went wrong with reading as well, and is told from there.
                writing.cancel()
                await asyncio.gather(writing, return_exceptions=True)
            return replies

    async def _write_all(self, encoded: list[bytes]) -> None:
        for start in range(0, len(encoded), 64):
            self._writer.write(b"".join(encoded[start : start + 64]))
            await self._writer.drain()

    @contextlib.asynccontextmanager
    async def _whole(self) -> AsyncIterator[None]:
        """One request at a time, and none after one that was cut short: its reply would be taken for the next one's."""
        async with self._lock:
            if self._closed:
                raise errors.UnavailableError("the connection to the Nix daemon broke in an earlier request")
            if self._writer.is_closing():
                # uvloop takes what is written then for a mistake of ours.
                raise await self._broken()
            try:
                yield
            except DaemonError:
                raise
            except OSError as error:
                self.close()
                raise await self._broken() from error
            except BaseException:
                self.close()
                raise

    @property
    def alive(self) -> bool:
        """Whether nothing has cut it off so far: what it holds, it has held all the time."""
        return not (self._closed or self._stream.at_eof() or self._writer.is_closing())

    @property
    def at_rest(self) -> bool:
        """Whether it is good for another request, and nothing is under way."""
        return self.alive and not self._lock.locked() and not self._reader.pending

    async def is_undisturbed(self) -> bool:
        """Whether it is at rest, and nothing has come until now that nobody asked for; who waits in ``disturbed`` has stopped."""
        # What waits in the kernel is taken in during the first turn, and seen in the second at the latest.
        for _ in range(2):
            try:
                async with asyncio.timeout(0):
                    await self.disturbed()
            except TimeoutError:
                continue
            except OSError:
                pass
            return False
        return self.at_rest

    async def disturbed(self) -> None:
        """Wait until the daemon ends, or says something, while nobody asks it."""
        await self._stream.read(1)

    def close(self) -> None:
        """Close it; the daemon gives up what it does for us."""
        self._closed = True
        self._writer.close()

    async def _broken(self) -> errors.UnavailableError:
        why = await self._last_words() if self._last_words is not None else ""
        return errors.UnavailableError(f"the Nix daemon closed the connection{f': {why}' if why else ''}")

    async def _reply(self, parser: Callable[[wire.Reader], T], sink: LogSink | None) -> T:
        await self._read_log(sink)
        return await self._parse(parser)

    async def _parse(self, parser: Callable[[wire.Reader], T]) -> T:
        while True:
            try:
                return self._reader.parse(parser)
            except wire.NeedMore:
                self._reader.feed(await self._receive())

    async def _receive(self) -> bytes:
        data = await self._stream.read(_CHUNK)
        if not data:
            raise ConnectionResetError
        return data

    async def _read_log(self, sink: LogSink | None) -> None:
        """Read log records up to the one that says that the reply follows.

        Raises:
            DaemonError: The daemon ends the request with an error instead.
        """
        while (kind := await self._parse(lambda reader: _record(reader, sink))) != wire.STDERR_LAST:
            if kind in {wire.STDERR_READ, wire.STDERR_WRITE}:
                raise wire.ProtocolError("the Nix daemon asks for data in a way that only old versions do")


def _record(reader: wire.Reader, sink: LogSink | None) -> int:
    kind = reader.integer()
    if kind == wire.STDERR_NEXT:
        text = reader.string()
        if sink is not None:
            sink.line(plain(text))
    elif kind == wire.STDERR_ERROR:
        raise DaemonError(plain(reader.error()))
    elif kind == wire.START_ACTIVITY:
        number, _level, activity, _text = reader.integer(), reader.integer(), reader.integer(), reader.string()
        fields = reader.fields()
        reader.integer()  # the activity above it
        if sink is not None:
            sink.started(number, activity, fields)
    elif kind == wire.STOP_ACTIVITY:
        reader.integer()
    elif kind == wire.RESULT:
        number, result = reader.integer(), reader.integer()
        fields = reader.fields()
        if sink is not None:
            sink.result(number, result, fields)
    elif kind not in {wire.STDERR_LAST, wire.STDERR_READ, wire.STDERR_WRITE}:
        raise wire.ProtocolError(f"the Nix daemon sent an unknown record {kind:#x}")
    return kind


def plain(message: str) -> str:
    """A message of Nix without colours, on one line, without its own "error:"."""
    text = " ".join(_ANSI.sub("", message).split())
    return text.removeprefix("error: ")
