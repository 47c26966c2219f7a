"""One call as its handler sees it: messages in, messages out, metadata, a deadline."""

import asyncio
import enum
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

from google.protobuf.message import DecodeError
from grpclib import const
from grpclib.const import Status
from grpclib.exceptions import GRPCError, ProtocolError, StreamTerminatedError
from grpclib.metadata import Deadline

from nixlet.rpc import frames, headers, receiving, sending, transport

Request = TypeVar("Request")
Response = TypeVar("Response")


class _State(enum.Enum):
    """How far a call is; each state goes on to a later one only."""

    WAITING = enum.auto()
    """The task that answers it is about to begin."""
    ANSWERING = enum.auto()
    """That task has begun."""
    ANSWERED = enum.auto()
    """The answer was sent to its end."""
    GONE = enum.auto()
    """Nobody waits for an answer any more; the task was told so, once, by being cancelled."""


#: States of a call that is not over.
_OPEN: Final = (_State.WAITING, _State.ANSWERING)

#: Why nothing more can be done in a call that was answered.
_ENDED: Final = "the call was ended already"


class Stream(Generic[Request, Response]):
    """A call.

    Attributes:
        path: The method.
        deadline: Until when it is to be answered; None: at any time.
        status: What it was answered with; None: it wasn't, or not to its end.
        receiver: Takes up what the client sends.
    """

    __slots__ = (
        "_forget",
        "_head",
        "_left",
        "_message",
        "_reason",
        "_sender",
        "_state",
        "_task",
        "_timer",
        "deadline",
        "method",
        "number",
        "path",
        "receiver",
        "status",
    )

    def __init__(
        self,
        sender: sending.Sender,
        receiver: receiving.Receiver,
        number: int,
        head: headers.Head,
        *,
        forget: Callable[[int], object],
        left: Callable[[], None],
    ) -> None:
        """A call that a client has begun.

        Args:
            sender: Sends on the connection that it came on.
            receiver: Takes up what comes of it there.
            number: The stream's number there.
            head: Its header fields.
            forget: Is told the number when the call is over for the client.
            left: Is told when the task that answered it has ended.
        """
        self._sender = sender
        self.receiver = receiver
        self._forget = forget
        self._left = left
        self.number = number
        self._head = head
        self.path = head.path
        self.method: const.Handler = const.Handler(None, const.Cardinality.STREAM_STREAM, bytes, bytes)
        self.deadline: Deadline | None = None
        self.status: Status | None = None
        self._state = _State.WAITING
        self._reason = ""
        self._task: asyncio.Task[Any] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._message: bytes | None = None
        sender.begin(number)

    # What the handler calls.

    @property
    def metadata(self) -> headers.Metadata:
        """The caller's metadata.

        Raises:
            GRPCError: Binary metadata that isn't in base64.
        """
        return self._head.metadata()

    async def recv_message(self) -> Request | None:
        """The next message; None when the client has sent its last one.

        Raises:
            GRPCError: It is too large, compressed, or none.
            ProtocolError: The call was ended, or somebody else waits for its next message.
            StreamTerminatedError: The client has given up, or is gone, or the deadline has passed.
        """
        self._check()
        while (data := self.receiver.take()) is None:
            if self.receiver.exhausted:
                return None
            await self.receiver.arrival()
            self._check()
        kind = self.method.request_type
        if kind is bytes:
            return data  # type: ignore[return-value]  # what Request is then
        try:
            message: Request = kind.FromString(data)
        except DecodeError as error:
            raise GRPCError(Status.INTERNAL, f"the request is no {kind.DESCRIPTOR.full_name}") from error
        return message

    def __aiter__(self) -> "Stream[Request, Response]":
        return self

    async def __anext__(self) -> Request:
        message = await self.recv_message()
        if message is None:
            raise StopAsyncIteration
        return message

    async def send_initial_metadata(self, *, metadata: headers.MetadataLike | None = None) -> None:
        """Send the head of the answer now; it goes with the first message otherwise.

        Raises:
            ProtocolError: It was sent.
            StreamTerminatedError: The client has given up, or is gone, or the deadline has passed.
        """
        self._check()
        self._sender.send_head(self.number, headers.initial(metadata))

    async def send_message(self, message: Response) -> None:
        """Send a message. The only one of a call with one answer goes out at its end, in one piece with the status.

        Raises:
            GRPCError: It is too large.
            ProtocolError: It is one too many, or the one before it wasn't sent to its end.
            StreamTerminatedError: The client has given up, or is gone, or the deadline has passed.
        """
        self._check()
        if isinstance(message, bytes) and self.method.reply_type is bytes:
            data = message
        elif isinstance(message, self.method.reply_type):
            data = message.SerializeToString()
        else:
            msg = f"{self.path} answers with {self.method.reply_type.__name__}, not {type(message).__name__}"
            raise TypeError(msg)
        if len(data) > transport.MAX_MESSAGE:
            raise transport.too_large(len(data))
        if not self.method.cardinality.server_streaming:
            if self._message is not None:
                raise ProtocolError("the message was sent already")
            self._message = data
            return
        await self._sender.send_message(self.number, data)

    async def send_trailing_metadata(
        self,
        *,
        status: Status = Status.OK,
        status_message: str | None = None,
        status_details: bytes | None = None,
        metadata: headers.MetadataLike | None = None,
    ) -> None:
        """End the call; a handler that doesn't do so ends it well by returning, and otherwise by what it raises.

        Args:
            status: How it went.
            status_message: What is to be said of that.
            status_details: The same as an encoded google.rpc.Status.
            metadata: The server's own.

        Raises:
            ProtocolError: It was ended already, or all went well though there is no message, or one that wasn't sent to its end.
            StreamTerminatedError: The client has given up, or is gone, or the deadline has passed.
        """
        self._check()
        block = headers.trailers(status, status_message, status_details, metadata)
        if status is Status.OK:
            if self._message is not None:
                message, self._message = self._message, None
                if self._sender.answer(self.number, message, block, heard=self.receiver.ended):
                    self._close(_State.ANSWERED, _ENDED, status)
                    return
                await self._sender.send_message(self.number, message)
                self._check()
            elif not self.method.cardinality.server_streaming:
                raise ProtocolError(f"{self.path} ended well without its message")
        self._end(block, status)

    def _end(self, block: bytes, status: Status) -> None:
        self._sender.end(self.number, block, status, heard=self.receiver.ended)
        self._close(_State.ANSWERED, _ENDED, status)

    def _check(self) -> None:
        if self._state is _State.GONE:
            raise StreamTerminatedError(self._reason)
        if self._state is _State.ANSWERED:
            raise ProtocolError(self._reason)

    def _close(self, state: _State, reason: str, status: Status | None = None) -> None:
        """The call is over: its sender has heard so, the rest does here."""
        self._state, self._reason, self.status = state, reason, status
        self._forget(self.number)
        if self._timer is not None:
            self._timer.cancel()
        self.receiver.close(reason)

    # What the server calls.

    @property
    def open(self) -> bool:
        """Whether somebody waits for an answer, or for the rest of it."""
        return self._state in _OPEN

    @property
    def gone(self) -> bool:
        """Whether nobody waits for an answer any more, though it wasn't sent to its end."""
        return self._state is _State.GONE

    def fail(self, block: bytes, status: Status) -> None:
        """End the call with trailers that tell of a failure; what was not sent of the answer isn't. One that is over is left alone."""
        if self.open:
            self._end(block, status)

    def answered_by(self, task: "asyncio.Task[Any]") -> None:
        """Take note of the task that answers it, and begin to watch its deadline."""
        self._task = task
        if self._head.timeout is not None:
            self.deadline = Deadline.from_timeout(self._head.timeout)
            self._timer = asyncio.get_running_loop().call_later(self._head.timeout, self._expire)

    def begin(self) -> bool:
        """The task that answers it begins; False: nobody waits for that any more."""
        if self._state is _State.WAITING:
            self._state = _State.ANSWERING
        return self._state is _State.ANSWERING

    def left(self) -> None:
        """The task that answered it has ended."""
        self._task = None
        if self.open:
            # As no exception does that a handler should raise.
            self._sender.reset(self.number, frames.INTERNAL_ERROR, "nobody answers the call any more")
            self._close(_State.GONE, "nobody answers the call any more")
        self._left()

    def _expire(self) -> None:
        # The client hears of it now: the handler may have much to put away.
        self._cancel()
        status = Status.DEADLINE_EXCEEDED
        self._sender.end(self.number, headers.trailers(status), status, heard=self.receiver.ended)
        self._close(_State.GONE, "the deadline has passed", status)

    def _cancel(self) -> None:
        # A task that was not begun yet must begin: it is what ends the call's use of the connection.
        if self._state is _State.ANSWERING and self._task is not None:
            self._task.cancel()

    # What the connection calls.

    def terminate(self, reason: str) -> None:
        """Nobody waits for an answer any more: whoever makes one is told."""
        self._cancel()
        self._sender.drop(self.number, reason)
        self._close(_State.GONE, reason)
