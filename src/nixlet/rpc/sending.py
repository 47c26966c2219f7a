"""The sending half of a server's HTTP/2 connection: answers of calls, as far as the client lets us send (RFC 9113, 5.2)."""

import asyncio
from typing import Final

from grpclib.const import Status
from grpclib.exceptions import ProtocolError, StreamTerminatedError

from nixlet.rpc import frames, headers

#: What is kept to be written at once, before we look whether the client reads it (bytes).
_PIECE: Final = 64 << 10


class _Call:
    """How far the answer of a call is that isn't answered to its end.

    Attributes:
        window: What the client takes of it (bytes); may be below zero.
        headed: The head was sent, or stands in what is sent next.
        sending: A message is being sent, or was given up on its way.
        room: What that message waits for, if there is no room.
    """

    __slots__ = ("headed", "room", "sending", "window")

    def __init__(self, window: int) -> None:
        self.window = window
        self.headed = False
        self.sending = False
        self.room: asyncio.Future[None] | None = None

    def look_again(self) -> None:
        """There may be room now."""
        if self.room is not None and not self.room.done():
            self.room.set_result(None)


class Sender:
    """Sends what calls answer.

    Attributes:
        paused: The client doesn't read what was sent.
    """

    def __init__(self) -> None:
        """Nobody is connected yet."""
        self.paused = False
        self._transport: asyncio.Transport | None = None
        self._queued: list[bytes] = []
        self._queued_size = 0
        self._window = frames.DEFAULT_WINDOW
        self._initial_window = frames.DEFAULT_WINDOW
        self._largest = frames.MAX_FRAME
        self._calls: dict[int, _Call] = {}

    # What calls ask for.

    def begin(self, number: int) -> None:
        """A call has begun."""
        self._calls[number] = _Call(self._initial_window)

    def send_head(self, number: int, block: bytes) -> None:
        """Send the head of an answer, which begins with the first message otherwise.

        Raises:
            ProtocolError: It was sent.
        """
        call = self._calls[number]
        if call.headed:
            raise ProtocolError("the initial metadata was sent already")
        self.queue(self._head(number, call, block))

    def answer(self, number: int, message: bytes, trailers: bytes, *, heard: bool) -> bool:
        """Send a whole answer in one write; False: there is no room for it now.

        Args:
            number: The call's stream.
            message: The only message.
            trailers: The fields at the end.
            heard: The client has sent all that it wanted to.
        """
        call = self._calls[number]
        size = len(message) + frames.MESSAGE.size
        if self.paused or size > self._largest or size > self._window or size > call.window:
            return False
        self._window -= size
        del self._calls[number]
        begin = b"" if call.headed else self._head(number, call)
        self.write(
            b"".join((begin, frames.message_in_one_frame(number, message), self._end(number, trailers, heard=heard)))
        )
        return True

    async def send_message(self, number: int, message: bytes) -> None:
        """Send a message as there is room for it, behind the head of the answer if that wasn't sent.

        Raises:
            ProtocolError: The message before it wasn't sent to its end.
            StreamTerminatedError: The call ended meanwhile.
        """
        call = self._calls[number]
        if call.sending:
            raise ProtocolError("a message before the end of another one")
        call.sending = True
        rest = memoryview(frames.MESSAGE.pack(0, len(message)) + message)
        while rest:
            if number not in self._calls:
                raise StreamTerminatedError("the call has ended")
            room = min(call.window, self._window, _PIECE, len(rest))
            if self.paused or (room <= 0 and call.headed):
                call.room = asyncio.get_running_loop().create_future()
                await call.room
                continue
            parts = [] if call.headed else [self._head(number, call)]
            if room > 0:
                call.window -= room
                self._window -= room
                piece, rest = rest[:room], rest[room:]
                parts += [
                    frames.frame(frames.DATA, 0, number, bytes(piece[at : at + self._largest]))
                    for at in range(0, room, self._largest)
                ]
            self.queue(b"".join(parts))
        call.sending = False

    def end(self, number: int, trailers: bytes, status: Status, *, heard: bool) -> None:
        """Send the trailers, or head and trailers in one; the call has ended.

        Args:
            number: The call's stream.
            trailers: The fields at the end.
            status: How it ended.
            heard: The client has sent all that it wanted to.

        Raises:
            ProtocolError: It is to end well, and a message wasn't sent to its end.
        """
        call = self._calls[number]
        if call.sending and status is Status.OK:
            raise ProtocolError("the call ends inside a message")
        self.drop(number, "the call was ended")
        block = trailers if call.headed else headers.PLAIN + trailers
        self.write(self._end(number, block, heard=heard))

    def drop(self, number: int, reason: str) -> None:
        """A call ended before it was answered to its end."""
        call = self._calls.pop(number)
        if call.room is not None and not call.room.done():
            # In another task than the handler's, which was cancelled.
            call.room.set_exception(StreamTerminatedError(reason))

    def reset(self, number: int, code: int, reason: str) -> None:
        """Break off a call that can't be answered.

        Args:
            number: The call's stream.
            code: What the RFC calls the reason.
            reason: In words, for whoever still answers it.
        """
        self.drop(number, reason)
        self.write(frames.reset(number, code))

    def give_back(self, number: int, size: int) -> None:
        """Let the client send so much more of a call."""
        self.queue(frames.window_update(number, size))

    def _head(self, number: int, call: _Call, block: bytes = headers.PLAIN) -> bytes:
        call.headed = True
        return frames.header_frames(number, block, end=False, largest=self._largest)

    def _end(self, number: int, block: bytes, *, heard: bool) -> bytes:
        end = frames.header_frames(number, block, end=True, largest=self._largest)
        # What the client would still send nobody reads.
        return end if heard else end + frames.reset(number, frames.NO_ERROR)

    # What the connection says.

    def connect(self, transport: asyncio.Transport | None) -> None:
        """Send by this; None: to nobody any more."""
        self._transport = transport

    def queue(self, data: bytes) -> None:
        """Send this with what is written next, at the latest in the event loop's next turn: each write wakes the client up."""
        if not self._queued:
            asyncio.get_running_loop().call_soon(self.flush)
        self._queued.append(data)
        self._queued_size += len(data)
        if self._queued_size >= _PIECE:
            self.flush()

    def flush(self) -> None:
        """Send what is queued now."""
        if self._queued:
            self.write(b"")

    def write(self, data: bytes) -> None:
        """Send this now, behind what is queued."""
        if self._queued:
            data = b"".join((*self._queued, data))
            self._queued.clear()
            self._queued_size = 0
        # uvloop takes nothing more once a write has failed, which is before it says that the connection is lost.
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def pause(self) -> None:
        """The client doesn't read."""
        self.paused = True

    def resume(self) -> None:
        """The client has read."""
        self.paused = False
        self._look_again()

    def settle(self, values: dict[int, int]) -> None:
        """Obey the client's settings.

        Raises:
            ConnectionFault: A window would be too large by them.
        """
        self._largest = min(values.get(frames.MAX_FRAME_SIZE, self._largest), _PIECE)
        # The windows of calls under way change by the difference, also to below zero (RFC 9113, 6.9.2).
        change = values.get(frames.INITIAL_WINDOW_SIZE, self._initial_window) - self._initial_window
        self._initial_window += change
        for call in self._calls.values():
            call.window += change
            if call.window > frames.MAX_WINDOW:
                raise frames.ConnectionFault(frames.FLOW_CONTROL_ERROR, "a window that is too large")
        self._look_again()

    def widen(self, increment: int) -> None:
        """The client takes more of all calls together.

        Raises:
            ConnectionFault: More than there may be.
        """
        self._window += increment
        if self._window > frames.MAX_WINDOW:
            raise frames.ConnectionFault(frames.FLOW_CONTROL_ERROR, "a window that is too large")
        self._look_again()

    def widen_call(self, number: int, increment: int) -> bool:
        """The client takes more of one call; False: more than there may be."""
        call = self._calls[number]
        call.window += increment
        call.look_again()
        return call.window <= frames.MAX_WINDOW

    def _look_again(self) -> None:
        for call in self._calls.values():
            call.look_again()
