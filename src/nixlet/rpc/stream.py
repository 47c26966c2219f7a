"""One call as its handler sees it: messages in, messages out, metadata, a deadline."""

import asyncio
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from google.protobuf.message import DecodeError
from grpclib import const
from grpclib.const import Status
from grpclib.exceptions import GRPCError, ProtocolError, StreamTerminatedError
from grpclib.metadata import Deadline

from nixlet.rpc import frames, headers, sending, transport

Request = TypeVar("Request")
Response = TypeVar("Response")

#: What a client may send of a call before somebody has read it (bytes).
WINDOW = 256 << 10


class Stream(Generic[Request, Response]):
    """A call.

    Attributes:
        path: The method.
        deadline: Until when it is to be answered; None: at any time.
        gone: Why nobody waits for an answer any more; empty: somebody does.
        overdue: The deadline has passed.
    """

    __slots__ = (
        "_arrival",
        "_began",
        "_buffer",
        "_done",
        "_ended",
        "_forget",
        "_head",
        "_head_sent",
        "_message",
        "_owed",
        "_sender",
        "_task",
        "_timer",
        "deadline",
        "gone",
        "method",
        "number",
        "overdue",
        "path",
    )

    def __init__(
        self, sender: sending.Sender, number: int, head: headers.Head, forget: Callable[[int], object], *, ended: bool
    ) -> None:
        """A call that a client has begun.

        Args:
            sender: Sends on the connection that it came on.
            number: The stream's number there.
            head: Its header fields.
            forget: Is told the number when the call was answered to its end.
            ended: The client sends nothing more.
        """
        self._sender = sender
        self._forget = forget
        self.number = number
        self._head = head
        self.path = head.path
        self.method: const.Handler = const.Handler(None, const.Cardinality.STREAM_STREAM, bytes, bytes)
        self.deadline: Deadline | None = None
        self.gone = ""
        self.overdue = False
        self._buffer = bytearray()
        self._owed = 0
        self._ended = ended
        self._arrival: asyncio.Future[None] | None = None
        self._task: asyncio.Task[Any] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._began = False
        self._head_sent = False
        self._message: bytes | None = None
        self._done = False

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
            StreamTerminatedError: The client has given up, or is gone.
        """
        while (data := self._take()) is None:
            if self.gone:
                raise StreamTerminatedError(self.gone)
            if self._ended:
                if self._buffer:
                    raise GRPCError(Status.INTERNAL, "the call ended inside a message")
                return None
            if self._arrival is not None and not self._arrival.done():
                raise ProtocolError("two wait for one message")
            self._arrival = asyncio.get_running_loop().create_future()
            await self._arrival
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
            StreamTerminatedError: The client has given up, or is gone.
        """
        self._check()
        if self._head_sent:
            raise ProtocolError("the initial metadata was sent already")
        self._head_sent = True
        self._sender.send_head(self.number, headers.initial(metadata))

    async def send_message(self, message: Response) -> None:
        """Send a message. The only one of a call with one answer goes out at its end, in one piece with the status.

        Raises:
            GRPCError: It is too large.
            ProtocolError: It is one too many.
            StreamTerminatedError: The client has given up, or is gone.
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
        await self._sender.send_message(self.number, self._take_head(), data)

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
            ProtocolError: It was ended already, or there is no message though all went well.
            StreamTerminatedError: The client has given up, or is gone.
        """
        self._check()
        block = headers.trailers(status, status_message, status_details, metadata)
        if status is not Status.OK:
            self.fail(block, status)
            return
        if self._message is not None:
            message, self._message = self._message, None
            head = self._take_head()
            if self._sender.answer(self.number, head, message, block):
                self._forget(self.number)
                self._done = True
                return
            await self._sender.send_message(self.number, head, message)
        elif not self.method.cardinality.server_streaming:
            raise ProtocolError(f"{self.path} ended well without its message")
        self._end(block, status)

    def _take_head(self) -> bytes:
        if self._head_sent:
            return b""
        self._head_sent = True
        return headers.PLAIN

    def _check(self) -> None:
        if self.gone:
            raise StreamTerminatedError(self.gone)
        if self._done:
            raise ProtocolError("the call was ended already")

    # What the server calls.

    @property
    def done(self) -> bool:
        """Whether the call was answered to its end."""
        return self._done

    def fail(self, block: bytes, status: Status) -> None:
        """End the call with trailers that tell of a failure; what was not sent of the answer isn't."""
        if not self.gone and not self._done:
            self._end(block, status)

    def _end(self, block: bytes, status: Status) -> None:
        self._forget(self.number)
        self._done = True
        self._sender.end(self.number, self._take_head() + block, status, heard=self._ended)

    def begin(self) -> bool:
        """The task that answers it begins; False: nobody waits for it any more."""
        self._began = True
        return not self.gone

    def answered_by(self, task: "asyncio.Task[Any]") -> None:
        """Take note of the task that answers it, and begin to watch its deadline."""
        self._task = task
        if self._head.timeout is not None:
            self.deadline = Deadline.from_timeout(self._head.timeout)
            self._timer = asyncio.get_running_loop().call_later(self._head.timeout, self._expire)

    def left(self) -> None:
        """The task that answered it has ended."""
        self._task = None
        if self._timer is not None:
            self._timer.cancel()

    def _expire(self) -> None:
        self.overdue = True
        self._cancel()

    def _cancel(self) -> None:
        # A task that was not begun yet must begin: it is what answers. It sees for itself that the time is over.
        if self._task is not None and self._began:
            self._task.cancel()

    # What the connection calls.

    @property
    def ended(self) -> bool:
        """Whether the client sends nothing more."""
        return self._ended

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
        self._ended = ended
        if self._arrival is not None:
            arrival, self._arrival = self._arrival, None
            if not arrival.done():
                arrival.set_result(None)
        return True

    def terminate(self, reason: str) -> None:
        """Nobody waits for an answer any more: whoever makes one is told."""
        self.gone = reason
        self._cancel()
        if self._arrival is not None and not self._arrival.done():
            # In a task beside the handler's.
            self._arrival.set_exception(StreamTerminatedError(reason))

    def _take(self) -> bytes | None:
        """The next message's bytes, if it is there; the client may send as much more as was read."""
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
                self._give_back(len(buffer))
                return message
            # All of it is wanted.
            unread = 0
        self._give_back(unread)
        return None

    def _give_back(self, unread: int) -> None:
        size = self._owed - unread
        if size >= WINDOW // 2 and not self._ended:
            self._owed = unread
            self._sender.give_back(self.number, size)
