"""The sending half of a server's HTTP/2 connection: answers of calls, as far as the client lets us send (RFC 9113, 5.2)."""

import asyncio
from typing import Final

from grpclib.const import Status
from grpclib.exceptions import ProtocolError, StreamTerminatedError

from nixlet.rpc import frames

#: What is kept to be written at once, before we look whether the client reads it (bytes).
_PIECE: Final = 64 << 10


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
        #: What the client takes of each call that isn't answered to its end (bytes); may be below zero.
        self._windows: dict[int, int] = {}
        #: Calls that wait for room.
        self._waiting: dict[int, asyncio.Future[None]] = {}

    # What calls ask for.

    def send_head(self, number: int, block: bytes) -> None:
        """Send the head of an answer."""
        self.queue(frames.header_frames(number, block, end=False, largest=self._largest))

    def answer(self, number: int, head: bytes, message: bytes, trailers: bytes) -> bool:
        """Send a whole answer in one write; False: there is no room for it now.

        Args:
            number: The call's stream.
            head: The header fields; empty: they were sent.
            message: The only message.
            trailers: The fields at the end.
        """
        size = len(message) + frames.MESSAGE.size
        if self.paused or size > self._largest or size > self._window or size > self._windows[number]:
            return False
        self._window -= size
        del self._windows[number]
        begin = frames.header_frames(number, head, end=False, largest=self._largest) if head else b""
        end = frames.header_frames(number, trailers, end=True, largest=self._largest)
        self.write(b"".join((begin, frames.message_in_one_frame(number, message), end)))
        return True

    async def send_message(self, number: int, head: bytes, message: bytes) -> None:
        """Send a message as there is room for it, behind the head of the answer if there is one.

        Raises:
            ProtocolError: Another message is just being sent.
            StreamTerminatedError: The call ended meanwhile.
        """
        begin = frames.header_frames(number, head, end=False, largest=self._largest) if head else b""
        rest = memoryview(frames.MESSAGE.pack(0, len(message)) + message)
        while rest:
            window = self._windows.get(number)
            if window is None:
                raise StreamTerminatedError("the call has ended")
            room = min(window, self._window, _PIECE, len(rest))
            if self.paused or (room <= 0 and not begin):
                await self._room(number)
                continue
            parts = [begin]
            begin = b""
            if room > 0:
                self._windows[number] = window - room
                self._window -= room
                piece, rest = rest[:room], rest[room:]
                parts += [
                    frames.frame(frames.DATA, 0, number, bytes(piece[at : at + self._largest]))
                    for at in range(0, room, self._largest)
                ]
            self.queue(b"".join(parts))

    def end(self, number: int, block: bytes, status: Status, *, heard: bool) -> None:
        """Send the trailers, or head and trailers in one; the call has ended.

        Args:
            number: The call's stream.
            block: The header fields.
            status: How it ended.
            heard: The client has sent all that it wanted to.
        """
        self.drop(number, "the call was ended")
        data = frames.header_frames(number, block, end=True, largest=self._largest)
        if status is not Status.OK and not heard:
            # What the client would still send nobody reads.
            data += frames.reset(number, frames.NO_ERROR)
        self.write(data)

    def give_back(self, number: int, size: int) -> None:
        """Let the client send so much more of a call."""
        self.queue(frames.window_update(number, size))

    async def _room(self, number: int) -> None:
        if number in self._waiting:
            raise ProtocolError("two messages of a call at the same time")
        self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            await self._waiting[number]
        finally:
            self._waiting.pop(number, None)

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

    def begin(self, number: int) -> None:
        """A call has begun."""
        self._windows[number] = self._initial_window

    def drop(self, number: int, reason: str) -> None:
        """A call ended before it was answered to its end."""
        self._windows.pop(number, None)
        waiting = self._waiting.pop(number, None)
        if waiting is not None and not waiting.done():
            # In another task than the handler's, which was cancelled.
            waiting.set_exception(StreamTerminatedError(reason))

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
        for number in self._windows:
            self._windows[number] += change
            if self._windows[number] > frames.MAX_WINDOW:
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
        window = self._windows[number] = self._windows[number] + increment
        self._look_again_for(number)
        return window <= frames.MAX_WINDOW

    def _look_again(self) -> None:
        for number in self._waiting:
            self._look_again_for(number)

    def _look_again_for(self, number: int) -> None:
        waiting = self._waiting.get(number)
        if waiting is not None and not waiting.done():
            waiting.set_result(None)
