"""A client's connection: HTTP/2 (RFC 9113) as a gRPC server speaks it on a unix socket, without encryption.

What a client can make us keep has a limit everywhere: frames (MAX_FRAME), header fields (MAX_HEADERS, also in many frames), calls at
once (MAX_STREAMS), what nobody has read yet of each (receiving.WINDOW), messages (transport.MAX_MESSAGE), large ones that come in on
all of a server's connections (receiving.LARGE). A client that doesn't read is not read from either, so that nothing that it asks for piles up.
"""

import asyncio
import re
from collections.abc import Callable
from typing import Any, ClassVar, Final, cast

import hpack

from nixlet.rpc import frames, headers, receiving, sending
from nixlet.rpc import stream as stream_module

Stream = stream_module.Stream[Any, Any]

#: Calls of one connection at the same time; more are refused in a way that lets the client try again.
MAX_STREAMS: Final = 100

#: Header fields of one call (bytes), counted as RFC 9113 (6.5.2) does; what is received of them coded is no more, in so many frames.
MAX_HEADERS: Final = 64 << 10
_MAX_CONTINUATIONS: Final = 32

#: What a client may send of all its calls before it hears of it (bytes). Each call has a window of its own.
_WINDOW: Final = 16 << 20

#: Heads that are known with all their fields, and fields of each; a client has a few heads for each method.
_MAX_KNOWN: Final = 64
_MAX_FIELDS: Final = 64

#: A coded head of these bytes alone names entries of the tables, and changes none (RFC 7541, 6.1).
_INDEXED: Final = bytes(range(0x81, 0xFF))

#: More changes of the table's size at a block's beginning than there can be a reason for (RFC 7541, 4.2); each costs time.
_MANY_SIZES: Final = re.compile(rb"(?:[\x20-\x3e]|\x3f[\x80-\xff]*[\x00-\x7f]){3}", re.DOTALL)

_GREETING: Final = frames.settings(
    {
        frames.MAX_CONCURRENT_STREAMS: MAX_STREAMS,
        frames.INITIAL_WINDOW_SIZE: receiving.WINDOW,
        frames.MAX_HEADER_LIST_SIZE: MAX_HEADERS,
    }
) + frames.window_update(0, _WINDOW - frames.DEFAULT_WINDOW)

_SETTINGS_ACK: Final = frames.frame(frames.SETTINGS, frames.ACK, 0)


class _Block:
    """Header fields that come in several frames."""

    def __init__(self, number: int, flags: int, begin: bytes) -> None:
        self.number = number
        self.flags = flags
        self.content = bytearray(begin)
        self.frames = 0


class Connection(asyncio.Protocol):
    """One client's connection."""

    def __init__(
        self, answer: Callable[[Stream], None], closed: "Callable[[Connection], None]", room: receiving.Room
    ) -> None:
        """A connection that is about to be made.

        Args:
            answer: Begins to answer a call, in a task.
            closed: Is told when the connection is closed.
            room: Where large messages find room.
        """
        self._answer = answer
        self._closed = closed
        self._room = room
        self._transport: asyncio.Transport | None = None
        self._decoder = hpack.Decoder(max_header_list_size=MAX_HEADERS)
        self._known: dict[bytes, headers.Head] = {}
        self._rest = bytearray()
        self._wanted = 0
        self._greeted = False
        self._settled = False
        self._block: _Block | None = None
        self._streams: dict[int, Stream] = {}
        self._last = 0
        self._answering = 0
        self._received = 0
        self._sender = sending.Sender()
        self._ending = False
        #: Answers to frames of the connection itself.
        self._replies: list[bytes] = []

    # asyncio's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet the client."""
        self._transport = cast("asyncio.Transport", transport)
        if self._ending:
            self.abort()
        else:
            self._sender.connect(self._transport)
            self._sender.write(_GREETING)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the calls of a client that is gone."""
        del exc
        self._transport = None
        self._ending = True
        self._sender.connect(None)
        self._terminate("the connection was lost")
        self._closed(self)

    def pause_writing(self) -> None:
        """The client doesn't read: let it wait as well."""
        self._sender.pause()
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """The client has read."""
        self._sender.resume()
        if self._transport is not None:
            self._transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        """Take up what the client sent."""
        if self._ending:
            return
        if self._rest:
            self._rest += data
            if len(self._rest) < self._wanted:
                return
            data = bytes(self._rest)
            self._rest.clear()
        try:
            self._split(data)
        except frames.ConnectionFault as fault:
            self.close(str(fault), fault.code)
            self._replies.clear()
        if self._replies:
            # Behind the beginning of calls: what they answer at once goes out in the same write.
            self._sender.queue(b"".join(self._replies))
            self._replies.clear()

    # Frames.

    def _split(self, data: bytes) -> None:
        position, size = 0, len(data)
        if not self._greeted:
            if not frames.PREFACE.startswith(data[: len(frames.PREFACE)]):
                raise frames.ConnectionFault(frames.PROTOCOL_ERROR, "this is no HTTP/2")
            if size < len(frames.PREFACE):
                self._keep(data, len(frames.PREFACE))
                return
            self._greeted, position = True, len(frames.PREFACE)
        while (begin := position + frames.HEAD.size) <= size:
            high, low, kind, flags, number = frames.HEAD.unpack_from(data, position)
            length = high << 16 | low
            if length > frames.MAX_FRAME:
                raise frames.ConnectionFault(frames.FRAME_SIZE_ERROR, "a frame that is too large")
            end = begin + length
            if end > size:
                self._keep(data[position:], end - position)
                return
            if self._block is not None and kind != frames.CONTINUATION:
                raise frames.ConnectionFault(frames.PROTOCOL_ERROR, "a frame between those of a header block")
            if not self._settled and kind != frames.SETTINGS:
                raise frames.ConnectionFault(frames.PROTOCOL_ERROR, "the first frame is not SETTINGS")
            receive = self._RECEIVERS.get(kind)
            # Types that nobody has heard of are passed over (RFC 9113, 4.1).
            if receive is not None:
                receive(self, flags, number & frames.MAX_STREAM, data[begin:end])
            position = end
        if position < size:
            self._keep(data[position:], frames.HEAD.size)

    def _keep(self, data: bytes, wanted: int) -> None:
        """Keep the beginning of a frame until so much of it is there."""
        self._rest += data
        self._wanted = wanted

    def _on_data(self, flags: int, number: int, payload: bytes) -> None:
        size = len(payload)
        payload = frames.unpadded(flags, payload)
        # The connection's window is given back at once, in large pieces: what one call doesn't read holds up no other.
        self._received += size
        if self._received >= _WINDOW // 2:
            self._replies.append(frames.window_update(0, self._received))
            self._received = 0
        stream = self._stream(number)
        if stream is None:
            return
        if stream.receiver.ended:
            self._reset(stream, frames.STREAM_CLOSED, "data after the end")
        elif not stream.receiver.feed(payload, size, ended=bool(flags & frames.END_STREAM)):
            self._reset(stream, frames.FLOW_CONTROL_ERROR, "more data than the window allows")

    def _on_headers(self, flags: int, number: int, payload: bytes) -> None:
        if not number & 1:
            raise frames.ConnectionFault(frames.PROTOCOL_ERROR, "header fields on a stream that no client begins")
        begin = frames.unpadded(flags, payload)
        if flags & frames.WITH_PRIORITY:
            if len(begin) < 5:
                raise frames.ConnectionFault(frames.FRAME_SIZE_ERROR, "a priority that is cut off")
            begin = begin[5:]
        if flags & frames.END_HEADERS:
            self._on_block(number, begin, ended=bool(flags & frames.END_STREAM))
        else:
            self._block = _Block(number, flags, begin)

    def _on_continuation(self, flags: int, number: int, payload: bytes) -> None:
        block = self._block
        if block is None or block.number != number:
            raise frames.ConnectionFault(frames.PROTOCOL_ERROR, "header fields without a beginning")
        block.content += payload
        block.frames += 1
        if len(block.content) > MAX_HEADERS or block.frames > _MAX_CONTINUATIONS:
            raise frames.ConnectionFault(frames.ENHANCE_YOUR_CALM, "too many header fields")
        if flags & frames.END_HEADERS:
            self._block = None
            self._on_block(number, bytes(block.content), ended=bool(block.flags & frames.END_STREAM))

    def _on_block(self, number: int, block: bytes, *, ended: bool) -> None:
        # Also what is not answered is decoded: it may change the tables.
        head = self._known.get(block) or self._decode(block)
        stream = self._streams.get(number)
        if stream is not None:
            # Trailers: of a client's nobody has a use.
            if stream.receiver.ended or not ended or head.begins_call or head.malformed:
                self._reset(stream, frames.PROTOCOL_ERROR, "trailers that are none")
            else:
                stream.receiver.feed(b"", 0, ended=True)
            return
        if number <= self._last:
            if head.begins_call:
                raise frames.ConnectionFault(frames.PROTOCOL_ERROR, "a stream's number that was used already")
            return
        self._last = number
        if head.malformed or not head.begins_call:
            self._replies.append(frames.reset(number, frames.PROTOCOL_ERROR))
        elif len(self._streams) >= MAX_STREAMS or self._answering >= 2 * MAX_STREAMS:
            # Calls that were given up may go on for a while; whoever begins and gives up others meanwhile can't have any number of them.
            self._replies.append(frames.reset(number, frames.REFUSED_STREAM))
        elif head.refusal is not None:
            self._replies.append(frames.header_frames(number, headers.refused(head.refusal), end=True))
            if not ended:
                self._replies.append(frames.reset(number, frames.NO_ERROR))
        else:
            receiver = receiving.Receiver(self._sender, number, self._room, ended=ended)
            stream = stream_module.Stream(
                self._sender, receiver, number, head, forget=self._streams.pop, left=self._left
            )
            self._streams[number] = stream
            self._answering += 1
            self._answer(stream)

    def _decode(self, block: bytes) -> headers.Head:
        if _MANY_SIZES.match(block):
            raise frames.ConnectionFault(frames.COMPRESSION_ERROR, "too many sizes of the table")
        try:
            head = headers.read(self._decoder.decode(block, raw=True))
        except hpack.OversizedHeaderListError as error:
            raise frames.ConnectionFault(frames.ENHANCE_YOUR_CALM, "too many header fields") from error
        except hpack.HPACKError as error:
            raise frames.ConnectionFault(frames.COMPRESSION_ERROR, "header fields that can't be decoded") from error
        if block.translate(None, _INDEXED):
            # Entries of the tables may have other numbers now.
            self._known.clear()
        elif len(self._known) < _MAX_KNOWN and len(block) <= _MAX_FIELDS:
            self._known[block] = head
        return head

    def _on_priority(self, _flags: int, number: int, payload: bytes) -> None:
        if not number:
            raise frames.ConnectionFault(frames.PROTOCOL_ERROR, "a priority of the connection")
        if len(payload) == 5:
            return
        stream = self._streams.get(number)
        if stream is not None:
            self._reset(stream, frames.FRAME_SIZE_ERROR, "a priority of a wrong length")
        elif number > self._last:
            # What hasn't begun can't be reset.
            raise frames.ConnectionFault(frames.FRAME_SIZE_ERROR, "a priority of a wrong length")

    def _on_reset(self, _flags: int, number: int, payload: bytes) -> None:
        frames.number_in(payload)
        stream = self._stream(number)
        if stream is not None:
            stream.terminate("the client gave up")

    def _on_settings(self, flags: int, number: int, payload: bytes) -> None:
        if number:
            raise frames.ConnectionFault(frames.PROTOCOL_ERROR, "SETTINGS of a stream")
        if flags & frames.ACK:
            if payload:
                raise frames.ConnectionFault(frames.FRAME_SIZE_ERROR, "an acknowledgement with content")
            return
        self._settled = True
        self._sender.settle(frames.parsed_settings(payload))
        self._replies.append(_SETTINGS_ACK)

    def _on_push(self, _flags: int, _number: int, _payload: bytes) -> None:
        raise frames.ConnectionFault(frames.PROTOCOL_ERROR, "a client doesn't push")

    def _on_ping(self, flags: int, number: int, payload: bytes) -> None:
        if number:
            raise frames.ConnectionFault(frames.PROTOCOL_ERROR, "PING of a stream")
        if len(payload) != 8:
            raise frames.ConnectionFault(frames.FRAME_SIZE_ERROR, "PING of a wrong length")
        if not flags & frames.ACK:
            self._replies.append(frames.frame(frames.PING, frames.ACK, 0, payload))

    def _on_go_away(self, _flags: int, number: int, payload: bytes) -> None:
        # The client begins no more calls; it closes the connection when it has its answers.
        if number:
            raise frames.ConnectionFault(frames.PROTOCOL_ERROR, "GOAWAY of a stream")
        if len(payload) < 8:
            raise frames.ConnectionFault(frames.FRAME_SIZE_ERROR, "GOAWAY that is cut off")

    def _on_window_update(self, _flags: int, number: int, payload: bytes) -> None:
        increment = frames.number_in(payload) & frames.MAX_WINDOW
        if not number:
            if not increment:
                raise frames.ConnectionFault(frames.PROTOCOL_ERROR, "a window that is no larger")
            self._sender.widen(increment)
            return
        stream = self._stream(number)
        if stream is None:
            return
        if not increment:
            self._reset(stream, frames.PROTOCOL_ERROR, "a window that is no larger")
        elif not self._sender.widen_call(number, increment):
            self._reset(stream, frames.FLOW_CONTROL_ERROR, "a window that is too large")

    def _stream(self, number: int) -> Stream | None:
        """The stream of a frame; None: it has ended."""
        stream = self._streams.get(number)
        if stream is None and (number > self._last or not number & 1):
            raise frames.ConnectionFault(frames.PROTOCOL_ERROR, "a frame of a stream that was never begun")
        return stream

    def _reset(self, stream: Stream, code: int, reason: str) -> None:
        self._replies.append(frames.reset(stream.number, code))
        stream.terminate(reason)

    def _left(self) -> None:
        """A call's task has ended."""
        self._answering -= 1

    _RECEIVERS: ClassVar[dict[int, Callable[["Connection", int, int, bytes], None]]] = {
        frames.DATA: _on_data,
        frames.HEADERS: _on_headers,
        frames.PRIORITY: _on_priority,
        frames.RST_STREAM: _on_reset,
        frames.SETTINGS: _on_settings,
        frames.PUSH_PROMISE: _on_push,
        frames.PING: _on_ping,
        frames.GOAWAY: _on_go_away,
        frames.WINDOW_UPDATE: _on_window_update,
        frames.CONTINUATION: _on_continuation,
    }

    # What the server asks for.

    def go_away(self) -> None:
        """Ask the client to make its next calls on a new connection (RFC 9113, 6.8); those under way go on."""
        self._sender.write(frames.go_away(frames.MAX_STREAM))

    def close(self, reason: str, code: int = frames.NO_ERROR) -> None:
        """Close the connection; its calls end. What the client has begun meanwhile it may begin again elsewhere.

        Args:
            reason: For the client, and for whoever answers its calls.
            code: What the RFC calls it.
        """
        self._ending = True
        self._terminate(reason)
        self._sender.write(b"".join((*self._replies, frames.go_away(self._last, code, reason))))
        self._sender.connect(None)
        if self._transport is not None:
            self._transport.close()
        if self._sender.paused:
            self.abort()

    def abort(self) -> None:
        """End the connection whatever the client has read of it."""
        if self._transport is not None:
            self._transport.abort()

    def _terminate(self, reason: str) -> None:
        for stream in list(self._streams.values()):
            stream.terminate(reason)
