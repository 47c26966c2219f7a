"""Serving gRPC on a unix socket: sockets that only their owner can open, errors as statuses, a door for unknown methods."""

import asyncio
import contextlib
import logging
import socket
import sys
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from typing import Any, Protocol, TypeVar

import grpclib.server
from grpclib import const, protocol
from grpclib.exceptions import GRPCError

from nixlet import errors
from nixlet.host import files
from nixlet.rpc import status, transport

#: A call as a handler sees it.
Stream = grpclib.server.Stream

Request = TypeVar("Request")

_Handle = Callable[[Any], Awaitable[const.Status | None]]

#: Answers a method that no handler serves: gets the method's path and the call, whose messages are bytes; returns the status
#: that it sent itself, or None.
Fallback = Callable[[str, "grpclib.server.Stream[bytes, bytes]"], Awaitable[const.Status | None]]

#: Learns of each call that was answered: the method's path, the status's name ("NOT_FOUND"), and the seconds that it took.
Observer = Callable[[str, str, float], None]

#: Seconds that running calls get to end when the server stops.
_GRACE = 5.0

#: Seconds that clients get to close their connections; Go's do so at once, others may not know how.
_PARTING = 0.3

#: From Python 3.13 on a server that closes also deletes its socket's file, which others may be waiting at (asyncio's documentation,
#: loop.create_unix_server); whoever made the socket decides about it.
_KEEPING_THE_FILE: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}

_log = logging.getLogger("nixlet.rpc")


async def request(stream: "grpclib.server.Stream[Request, Any]") -> Request:
    """The one message of a call with one request.

    Raises:
        InvalidArgumentError: The client ended the call without sending it.
    """
    message = await stream.recv_message()
    if message is None:
        raise errors.InvalidArgumentError("the call came without a request")
    return message


class Servable(Protocol):
    """A handler generated from a .proto file."""

    def __mapping__(self) -> dict[str, const.Handler]:
        """Method paths and what answers them."""
        ...


def _with_statuses(path: str, handle: _Handle, running: "_Running") -> Callable[[Any], Awaitable[None]]:
    """A handler whose errors become statuses; what is unexpected is logged here and told to the peer in one word."""

    async def call(stream: Any) -> None:
        began = time.perf_counter()
        answered = const.Status.CANCELLED
        with running:
            try:
                answered = await _answer(path, handle, stream)
            except GRPCError as error:
                answered = error.status
                raise
            except asyncio.CancelledError:
                # The client gave up, or its deadline passed.
                if stream.deadline is not None and stream.deadline.time_remaining() <= 0:
                    answered = const.Status.DEADLINE_EXCEEDED
                raise
            finally:
                running.observe(path, answered.name, time.perf_counter() - began)

    return call


async def _answer(path: str, handle: _Handle, stream: Any) -> const.Status:
    try:
        return await handle(stream) or const.Status.OK
    except errors.NixletError as error:
        raise status.from_error(error) from error
    except NotImplementedError as error:
        # grpclib's word for a compressed message; gRPC wants this code for it.
        raise GRPCError(const.Status.UNIMPLEMENTED, "compressed messages are not supported") from error
    except GRPCError:
        raise
    except Exception as error:
        _log.exception("%s failed", path)
        if isinstance(error, OSError) and (told := files.exhausted(error)):
            raise status.from_error(told) from error
        raise GRPCError(const.Status.INTERNAL, f"internal error: {type(error).__name__}") from error


class _Running:
    """How many calls are being answered; ``idle`` is set while none is."""

    def __init__(self, observe: Observer) -> None:
        self.observe = observe
        self._count = 0
        self.idle = asyncio.Event()
        self.idle.set()

    def __enter__(self) -> None:
        self._count += 1
        self.idle.clear()

    def __exit__(self, *_: object) -> None:
        self._count -= 1
        if not self._count:
            self.idle.set()


class _Mapping(dict[str, const.Handler]):
    """Method paths to handlers, with one for those that are not there; grpclib looks methods up by ``get``."""

    def __init__(self, known: dict[str, const.Handler], fallback: Fallback | None, running: _Running) -> None:
        super().__init__(known)
        self._fallback = fallback
        self._running = running

    def get(self, key: str, default: Any = None) -> Any:
        """The handler of a method."""
        del default
        found = super().get(key)
        if found is not None:
            return found
        fallback = self._fallback or _unknown_method

        async def handle(stream: Any) -> const.Status | None:
            return await fallback(key, stream)

        # Streams in both directions: such a call may have one answer, several or none, as its unknown method wants.
        return const.Handler(_with_statuses(key, handle, self._running), const.Cardinality.STREAM_STREAM, bytes, bytes)


async def _unknown_method(path: str, stream: Stream[bytes, bytes]) -> const.Status | None:
    # grpclib's own answer to an unknown method lacks the content type, which grpc-go takes for a broken server.
    await stream.recv_message()
    raise GRPCError(const.Status.UNIMPLEMENTED, f"unknown method {path}")


class _Server(grpclib.server.Server):
    def __init__(self, mapping: _Mapping) -> None:
        super().__init__((), codec=transport.RawCodec(), status_details_codec=transport.RawStatusDetails())
        self._mapping = mapping
        self._connections: weakref.WeakSet[transport.LimitedProtocol] = weakref.WeakSet()

    def _protocol_factory(self) -> protocol.H2Protocol:
        made = super()._protocol_factory()
        connection = transport.LimitedProtocol(made.handler, made.config, made.h2_config)
        self._connections.add(connection)
        return connection

    async def start_on(self, sock: socket.socket) -> None:
        """Serve on a listening unix socket."""
        self._server = await self._loop.create_unix_server(self._protocol_factory, sock=sock, **_KEEPING_THE_FILE)
        self._server_closed_fut = self._loop.create_future()

    def stop_listening(self) -> None:
        """Take no more connections."""
        assert self._server is not None
        self._server.close()

    def go_away(self) -> None:
        """Ask all peers to make their next calls on new connections."""
        for connection in list(self._connections):
            connection.go_away()

    @property
    def is_connected(self) -> bool:
        """Whether a connection is open."""
        return any(not connection.connection.is_closing() for connection in self._connections)

    def close_connections(self) -> None:
        """Close what is still connected: grpclib would leave it open, and go on answering."""
        for connection in list(self._connections):
            connection.close()


def _ignore(_path: str, _code: str, _seconds: float) -> None:
    """Observe nothing."""


@contextlib.asynccontextmanager
async def serve(
    sock: socket.socket,
    handlers: Collection[Servable],
    *,
    fallback: Fallback | None = None,
    observe: Observer = _ignore,
) -> AsyncIterator[None]:
    """Serve gRPC on a listening unix socket for the time of the context; running calls get a few seconds to end.

    Args:
        sock: The socket, listening; it is closed at the end.
        handlers: The services.
        fallback: Answers what no service knows; without it the answer is UNIMPLEMENTED.
        observe: Learns of each call when it ends.
    """
    running = _Running(observe)
    known = {
        path: handler._replace(func=_with_statuses(path, handler.func, running))
        for service in handlers
        for path, handler in service.__mapping__().items()
    }
    server = _Server(_Mapping(known, fallback, running))
    await server.start_on(sock)
    try:
        yield
    finally:
        server.stop_listening()
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(running.idle.wait(), _GRACE)
            # A client that is told goes elsewhere without a call lost: to who has the same listening socket next.
            server.go_away()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PARTING):
                    while server.is_connected:
                        await asyncio.sleep(0.01)
                    await running.idle.wait()
        finally:
            server.close()
            server.close_connections()
            await server.wait_closed()
