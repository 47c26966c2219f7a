"""The receiving half of a call: what its client sends becomes messages, as far as there is room for it (RFC 9113, 5.2)."""

import asyncio
from typing import Final

from grpclib.const import Status
from grpclib.exceptions import GRPCError, ProtocolError, StreamTerminatedError

from nixlet.rpc import frames, sending, transport

#: What a client may send of a call before somebody has read it (bytes).
WINDOW: Final = 256 << 10

#: What messages that are too large for a window may take, of all a server's calls together, until they are there (bytes).
LARGE: Final = 64 << 20


class Room:
    """Room for large messages while they come in: whoever takes some keeps it until the message is there."""

    def __init__(self, size: int = LARGE) -> None:
        """Room of so many bytes."""
        self._free = size

    def take(self, size: int) -> None:
        """Take so many bytes, to be given back.

        Raises:
            GRPCError: There aren't as many. Waiting for them could be long: others may dribble what they send.
        """
        if size > self._free:
            raise GRPCError(
                Status.RESOURCE_EXHAUSTED,
                f"there is no room for a message of {size} bytes beside others that are just coming in; try it again later",
            )
        self._free -= size

    def give_back(self, size: int) -> None:
        """Give back what was taken."""
        self._free += size


class Receiver:
    """Takes up what a client sends of a call.

    Attributes:
        ended: The client sends nothing more.
    """

    __slots__ = ("_arrival", "_buffer", "_number", "_owed", "_room", "_sender", "_taken", "ended")

    def __init__(self, sender: sending.Sender, number: int, room: Room, *, ended: bool) -> None:
        """What comes of a call.

        Args:
            sender: Tells the client how much more it may send.
            number: The call's stream.
            room: Where large messages find room.
            ended: Nothing comes.
        """
        self._sender = sender
        self._number = number
        self._room = room
        self._taken = 0
        self._buffer = bytearray()
        self._owed = 0
        self._arrival: asyncio.Future[None] | None = None
        self.ended = ended

    def feed(self, data: bytes, size: int, *, ended: bool) -> bool:
        """Take up what the client sent; False when it had no right to send that much.

        Args:
            data: The content.
            size: What it counts for flow control: with padding.
            ended: It is the last.
        """
        self._owed += size
        if self._owed > WINDOW:
            return False
        self._buffer += data
        self.ended = ended
        if self._arrival is not None:
            arrival, self._arrival = self._arrival, None
            if not arrival.done():
                arrival.set_result(None)
        return True

    async def arrival(self) -> None:
        """Wait until more has come.

        Raises:
            GRPCError: Nothing more will, though a message has begun.
            ProtocolError: Somebody else waits for it.
            StreamTerminatedError: The call ended meanwhile.
        """
        if self.ended:
            raise GRPCError(Status.INTERNAL, "the call ended inside a message")
        if self._arrival is not None and not self._arrival.done():
            raise ProtocolError("two wait for one message")
        self._arrival = asyncio.get_running_loop().create_future()
        await self._arrival

    @property
    def exhausted(self) -> bool:
        """Whether all that the client sent was taken."""
        return self.ended and not self._buffer

    def take(self) -> bytes | None:
        """The next message's bytes, if it is there; the client may send as much more as was read.

        Raises:
            GRPCError: It is too large, for now or for ever, or compressed.
        """
        buffer = self._buffer
        unread = len(buffer)
        if unread >= frames.MESSAGE.size:
            compressed, length = frames.MESSAGE.unpack_from(buffer)
            if compressed:
                raise GRPCError(Status.UNIMPLEMENTED, "compressed messages are not supported")
            # The length comes before the content: a message that is too large is refused before it is received.
            if length > transport.MAX_MESSAGE:
                raise transport.too_large(length)
            end = frames.MESSAGE.size + length
            if unread >= end:
                message = bytes(memoryview(buffer)[frames.MESSAGE.size : end])
                del buffer[:end]
                self._give_back_room()
                self._give_back(len(buffer))
                return message
            if end > WINDOW and not self._taken:
                self._room.take(length)
                self._taken = length
            # All of it is wanted.
            unread = 0
        self._give_back(unread)
        return None

    def close(self, reason: str) -> None:
        """The call is over: keep nothing of it, and tell whoever waits for more."""
        self._buffer.clear()
        self._give_back_room()
        if self._arrival is not None and not self._arrival.done():
            # In a task beside the handler's.
            self._arrival.set_exception(StreamTerminatedError(reason))

    def _give_back(self, unread: int) -> None:
        size = self._owed - unread
        if size >= WINDOW // 2 and not self.ended:
            self._owed = unread
            self._sender.give_back(self._number, size)

    def _give_back_room(self) -> None:
        if self._taken:
            self._room.give_back(self._taken)
            self._taken = 0
