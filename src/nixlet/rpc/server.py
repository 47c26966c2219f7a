"""Serving gRPC on a unix socket: sockets that only their owner can open, errors as statuses, a door for unknown methods."""

import asyncio
import contextlib
import logging
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from typing import Any, Protocol, TypeVar

from grpclib import const
from grpclib.exceptions import GRPCError, StreamTerminatedError

from nixlet import errors
from nixlet.host import files
from nixlet.rpc import connection as connection_module
from nixlet.rpc import headers, receiving, status
from nixlet.rpc import stream as stream_module

#: A call as a handler sees it.
Stream = stream_module.Stream

Request = TypeVar("Request")

#: Answers a method that no handler serves: gets the method's path and the call, whose messages are bytes.
Fallback = Callable[[str, Stream[bytes, bytes]], Awaitable[None]]

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


async def request(stream: Stream[Request, Any]) -> Request:
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


async def _unknown_method(path: str, stream: Stream[bytes, bytes]) -> None:
    # Some clients see the end of the stream before the status while they still send.
    await stream.recv_message()
    raise GRPCError(const.Status.UNIMPLEMENTED, f"unknown method {path}")


def _failure(path: str, error: Exception) -> tuple[const.Status, bytes]:
    """The status of what a handler raised, and the trailers that tell the peer of it; what is unexpected is logged here and told in one word."""
    if isinstance(error, errors.NixletError):
        error = status.from_error(error)
    if isinstance(error, GRPCError):
        try:
            return error.status, headers.trailers(error.status, error.message, error.details)
        except Exception as unwritten:  # noqa: BLE001 (it may hold anything, and the peer is to hear something)
            error = unwritten
    _log.error("%s failed", path, exc_info=error)
    if isinstance(error, OSError) and (told := files.exhausted(error)):
        return _failure(path, told)
    return const.Status.INTERNAL, headers.trailers(const.Status.INTERNAL, f"internal error: {type(error).__name__}")


async def _ending(path: str, _stream: Stream[bytes, bytes]) -> None:
    raise errors.UnavailableError(f"{path} can't be answered: the server is ending before it was ready")


def _ignore(_path: str, _code: str, _seconds: float) -> None:
    """Observe nothing."""


class _Calls:
    """The methods, and the calls that are being answered, which wait until the methods are known."""

    def __init__(self) -> None:
        self._known: dict[str, const.Handler] = {}
        self._fallback: Fallback = _unknown_method
        self._observe: Observer = _ignore
        self._told = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def tell(self, known: dict[str, const.Handler], fallback: Fallback | None, observe: Observer) -> None:
        """Tell the methods: calls are answered from now on."""
        self._known, self._fallback, self._observe = known, fallback or _unknown_method, observe
        self._told.set()

    def refuse(self) -> None:
        """Let calls fail that would wait for methods that come no more."""
        if not self._told.is_set():
            self.tell({}, _ending, _ignore)

    def begin(self, stream: Stream[Any, Any]) -> None:
        """Answer a call, in a task of its own."""
        task = asyncio.get_running_loop().create_task(self._answer(stream))
        self._tasks.add(task)
        stream.answered_by(task)

    async def ended(self) -> None:
        """Wait until no call is being answered, for some seconds at most."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GRACE):
                while self._tasks:
                    await asyncio.wait(self._tasks)

    async def cancelled(self) -> None:
        """Wait for what goes on although nobody waits for it any more."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _answer(self, stream: Stream[Any, Any]) -> None:
        began = time.perf_counter()
        try:
            if stream.begin():
                await self._handle(stream)
        except asyncio.CancelledError:
            stream.fail(headers.trailers(const.Status.CANCELLED), const.Status.CANCELLED)
            raise
        except Exception as error:  # noqa: BLE001 (a server answers whatever happens)
            # Whoever sends something to a client that is gone fails by that.
            if not (stream.gone and isinstance(error, StreamTerminatedError)):
                answered, block = _failure(stream.path, error)
                stream.fail(block, answered)
        finally:
            stream.left()
            self._tasks.discard(asyncio.current_task())
            # A client that gave up has no status.
            self._observe(stream.path, (stream.status or const.Status.CANCELLED).name, time.perf_counter() - began)

    async def _handle(self, stream: Stream[Any, Any]) -> None:
        if not self._told.is_set():
            await self._told.wait()
        handler = self._known.get(stream.path)
        if handler is not None:
            stream.method = handler
            await handler.func(stream)
        else:
            await self._fallback(stream.path, stream)
        if stream.open:
            await stream.send_trailing_metadata()


class Server:
    """A listening socket and its connections; ``accepting`` makes it."""

    def __init__(self) -> None:
        self._calls = _Calls()
        self._server: asyncio.Server | None = None
        self._connections: set[connection_module.Connection] = set()
        self._room = receiving.Room()

    def _connect(self) -> connection_module.Connection:
        made = connection_module.Connection(self._calls.begin, self._connections.discard, self._room)
        self._connections.add(made)
        return made

    async def start_on(self, sock: socket.socket) -> None:
        """Serve on a listening unix socket."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(self._connect, sock=sock, **_KEEPING_THE_FILE)

    @contextlib.asynccontextmanager
    async def answering(
        self, handlers: Collection[Servable], *, fallback: Fallback | None = None, observe: Observer = _ignore
    ) -> AsyncIterator[None]:
        """Answer calls for the time of the context, which is the server's last; see ``serve``."""
        known = {path: handler for service in handlers for path, handler in service.__mapping__().items()}
        self._calls.tell(known, fallback, observe)
        try:
            yield
        finally:
            await self.stop()

    async def stop(self) -> None:
        """Take no more connections, let running calls end, and send the clients elsewhere; then close what is left.

        Calls that go on after their time are cancelled, and waited for as long as they have something to put away: without a limit,
        since what they use ends next.
        """
        assert self._server is not None
        self._server.close()
        self._calls.refuse()
        try:
            await self._calls.ended()
            # A client that is told goes elsewhere without a call lost: to who has the same listening socket next.
            for connection in list(self._connections):
                connection.go_away()
            await self._parted()
            # What came in meanwhile ends as well. Of what comes now the client hears that it was not begun.
            await self._calls.ended()
        finally:
            for connection in list(self._connections):
                connection.close("the server stopped")
            await self._calls.cancelled()
            await self._parted()
            # Who doesn't read the farewell is not waited for.
            for connection in list(self._connections):
                connection.abort()
            await self._server.wait_closed()

    async def _parted(self) -> None:
        """Give clients some time to close their connections, or to read what closes them."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PARTING):
                while self._connections:
                    await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def accepting(sock: socket.socket) -> AsyncIterator[Server]:
    """Take connections on a listening unix socket for the time of the context. Calls wait until the server is ``answering``.

    A client that connects gets its greeting at once: containerd's, which is grpc-go, soon gives up on a server that is silent.

    Args:
        sock: The socket, listening; it is closed at the end.
    """
    server = Server()
    await server.start_on(sock)
    try:
        yield server
    finally:
        await server.stop()


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
    async with accepting(sock) as server, server.answering(handlers, fallback=fallback, observe=observe):
        yield
