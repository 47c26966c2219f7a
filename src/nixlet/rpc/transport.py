"""What grpclib's client lacks for our sockets: a limit on messages, raw messages, status details as bytes.

This is the one module that leans on grpclib's insides; it was written against grpclib 0.4.9, and its tests fail when a later
version moves them.
"""

import asyncio
import types
from collections.abc import Callable
from typing import Any

from grpclib import client, protocol
from grpclib.const import Status
from grpclib.encoding.base import StatusDetailsCodecBase
from grpclib.encoding.proto import ProtoCodec
from grpclib.exceptions import GRPCError, StreamTerminatedError
from grpclib.metadata import Deadline
from grpclib.utils import Wrapper
from hyperframe import frame

#: No message may be larger (bytes), in either direction: containerd's own limit on its sockets.
MAX_MESSAGE = 16 << 20


class RawCodec(ProtoCodec):
    """Protobuf messages, and messages that stay bytes where ``bytes`` is the type."""

    def encode(self, message: Any, message_type: Any) -> bytes:
        """The bytes of a message."""
        data: bytes = message if message_type is bytes else super().encode(message, message_type)
        if len(data) > MAX_MESSAGE:
            raise too_large(len(data))
        return data

    def decode(self, data: bytes, message_type: Any) -> Any:
        """A message from its bytes."""
        return data if message_type is bytes else super().decode(data, message_type)


class RawStatusDetails(StatusDetailsCodecBase):
    """``grpc-status-details-bin`` as it stands on the wire: the details of an error are bytes."""

    def encode(self, status: Status, message: str | None, details: Any) -> bytes:
        """The bytes that were received."""
        del status, message
        assert isinstance(details, bytes)
        return details

    def decode(self, status: Status, message: str | None, data: bytes) -> bytes:
        """The bytes, for handing on."""
        del status, message
        return data


def too_large(size: int) -> GRPCError:
    """The status for a message beyond the limit, named as gRPC's own libraries name it."""
    return GRPCError(Status.RESOURCE_EXHAUSTED, f"message of {size} bytes is larger than the maximum of {MAX_MESSAGE}")


class _Stream(protocol.Stream):
    async def recv_data(self, size: int) -> bytes:
        # The length comes before the content: a message that is too large is refused before it is received.
        if size > MAX_MESSAGE:
            raise too_large(size)
        return await super().recv_data(size)


def _create_stream(
    connection: protocol.Connection, *, stream_id: int | None = None, wrapper: Wrapper | None = None
) -> protocol.Stream:
    if connection.is_closing():
        # A peer can accept and close before the first call gets here; the connection has no transport then.
        raise StreamTerminatedError("Connection lost")
    return _Stream(
        connection,
        connection._connection,  # noqa: SLF001 (as the method does that this one replaces)
        connection._transport,  # noqa: SLF001 (likewise)
        stream_id=stream_id,
        wrapper=wrapper,
    )


class _GatheringTransport:
    """A transport that sends what is written in one turn of the event loop at once.

    A call's headers, message and trailers are three writes, each of which would wake the peer up.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._pending: list[bytes] = []

    def write(self, data: bytes) -> None:
        if not self._pending:
            self._loop.call_soon(self._send)
        self._pending.append(data)

    def _send(self) -> None:
        if self._pending:
            data, self._pending = b"".join(self._pending), []
            self._transport.write(data)

    def close(self) -> None:
        self._send()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class _Processor(protocol.EventsProcessor):
    """What comes in on a connection, which may have to end with its last call."""

    _leaving = False

    def register(self, stream: protocol.Stream) -> Callable[[], None]:
        release = super().register(stream)

        def released() -> None:
            release()
            self._close_when_done()

        return released

    def leave(self, last_stream_id: int) -> None:
        """Let the calls under way end, up to the last that the peer answers, and then the connection."""
        self._leaving = True
        for number, stream in self.streams.items():
            if number > last_stream_id:
                stream.__terminated__("the peer answers no more calls on this connection")
        self._close_when_done()

    def _close_when_done(self) -> None:
        if self._leaving and not self.streams:
            self.close("the peer is going away")


class LimitedProtocol(protocol.H2Protocol):
    """A client's connection whose streams refuse messages beyond the limit, and which goes when it is asked to."""

    def connection_made(self, transport: Any) -> None:
        """Take up a new connection."""
        super().connection_made(_GatheringTransport(transport))  # type: ignore[arg-type]  # it passes all else on
        self.connection.create_stream = types.MethodType(_create_stream, self.connection)  # type: ignore[method-assign]  # no hook for it
        self.processor = self._own = _Processor(self.handler, self.connection)
        # h2 takes a connection for closed with the first GOAWAY, and grpclib ends all calls on it, answered or not.
        received = self.connection._connection._frame_dispatch_table  # noqa: SLF001 (neither has a hook for it)
        self._fail = received[frame.GoAwayFrame]
        received[frame.GoAwayFrame] = self._go

    def _go(self, received: frame.GoAwayFrame) -> tuple[list[Any], list[Any]]:
        if received.error_code:
            failed: tuple[list[Any], list[Any]] = self._fail(received)
            return failed
        # The channel makes a new connection for its next call.
        self.handler.connection_lost = True  # type: ignore[attr-defined]  # that of a client's handler
        # When all that came with it was looked at: the last answer may be among that.
        asyncio.get_running_loop().call_soon(self._own.leave, received.last_stream_id)
        return [], []


def announce_deadline(call: "client.Stream[Any, Any]", deadline: Deadline | None) -> None:
    """Tell a call's peer of a deadline that the caller keeps itself; before the request is sent.

    A deadline given to the call starts a timer of its own. In a call that is made to answer another, that timer would fire
    together with the answered call's, and who comes first would decide about the status.
    """
    call._deadline = deadline  # noqa: SLF001 (see above)
