"""A relay of gRPC calls, byte for byte: messages, metadata, deadline, cancellation, statuses and trailers stay as they are."""

from collections.abc import Awaitable, Callable

from grpclib import client
from grpclib.const import Cardinality, Status
from grpclib.exceptions import GRPCError, StreamTerminatedError

from nixlet import errors
from nixlet.rpc import channel as channels
from nixlet.rpc import server, transport


class Relay:
    """Hands calls on to one backend."""

    def __init__(self, channel: channels.Channel, peer: str) -> None:
        """A relay to a backend.

        Args:
            channel: The channel to it.
            peer: What people call it, for errors.
        """
        self._channel = channel
        self._peer = peer

    async def answer(
        self,
        path: str,
        stream: "server.Stream[bytes, bytes]",
        request: bytes,
        remark: str = "",
        look_at: Callable[[bytes], Awaitable[None]] | None = None,
    ) -> Status:
        """Answer a call with one request by what the backend says, be it one message or many; the status that was sent.

        Args:
            path: The method.
            stream: Where to answer.
            request: The request's bytes.
            remark: What people should know of a failure beside the backend's own words.
            look_at: Gets each message before it is passed on; the call fails by what it raises.
        """
        # A client that gives up resets its stream, and a deadline that passes is noticed by the server: both cancel this task,
        # which resets the backend's stream.
        call = self._channel.request(path, Cardinality.UNARY_STREAM, bytes, bytes, metadata=stream.metadata)
        try:
            async with call:
                transport.announce_deadline(call, stream.deadline)
                await self._pass_on(call, stream, request, look_at)
        except GRPCError as error:
            await stream.send_trailing_metadata(
                status=error.status,
                status_message=f"{error.message or ''}; {remark}" if remark else error.message,
                status_details=error.details,
                metadata=call.trailing_metadata,
            )
            return error.status
        except (OSError, StreamTerminatedError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise errors.UnavailableError(f"{self._peer} can't be reached: {reason}") from error
        return Status.OK

    @staticmethod
    async def _pass_on(
        call: "client.Stream[bytes, bytes]",
        stream: "server.Stream[bytes, bytes]",
        request: bytes,
        look_at: Callable[[bytes], Awaitable[None]] | None,
    ) -> None:
        await call.send_message(request, end=True)
        await call.recv_initial_metadata()
        await stream.send_initial_metadata(metadata=call.initial_metadata)
        async for message in call:
            if look_at is not None:
                await look_at(message)
            await stream.send_message(message)
        await call.recv_trailing_metadata()
        await stream.send_trailing_metadata(status=Status.OK, metadata=call.trailing_metadata)
