"""Where nodes join a cluster: what a server says to those that have a token (``kubeclient.joinforms``).

HTTPS on a port of its own, one above the API server's: that one is Kubernetes' own program, and to share its port all traffic to it would have
to go through us. It shows the API server's certificate. Only what is needed of RFC 9112 is spoken: one request for each connection.
Who has no token any more that is good may show a node's certificate in its place: it stays the node that it is.

Whoever can reach the port may be anybody: what they send, how long they take, how many they are, and how often they guess is limited, and
everything that takes time is done in threads. Connections are counted before their handshake.
"""

import asyncio
import collections
import contextlib
import errno
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from typing import NamedTuple

import msgspec

from nixlet import errors
from nixlet.cluster.settings import ClusterSettings
from nixlet.encoding import unreadable
from nixlet.kubeclient import joinforms, nodepasswords
from nixlet.services import joincredentials, strangers
from nixlet.services.joining import Doorkeeper, WishError

#: Bytes of a request's head; seconds for the handshake, for all of a request, and for taking its answer, or a refusal.
_MAX_HEAD = 8 << 10
_HANDSHAKE_TIMEOUT, _REQUEST_TIMEOUT, _ANSWER_TIMEOUT, _REFUSAL_TIMEOUT = 5.0, 10.0, 10.0, 1.0

#: Connections at a time: of all, of one address, and how many more are told that there is no room.
_MAX_CONNECTIONS, _MAX_OF_ONE, _MAX_TOLD = 64, 8, 8

#: Seconds that joining may take, and how many nodes are let in at a time.
_JOIN_TIMEOUT, _AT_ONCE = 60.0, 4

#: Seconds before connections are taken again after there was no room for one.
_PAUSE = 0.5

_REASONS = {
    200: "OK", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed", 408: "Request Timeout",
    409: "Conflict", 413: "Content Too Large", 429: "Too Many Requests", 431: "Request Header Fields Too Large", 500: "Internal Server Error",
    503: "Service Unavailable",
}  # fmt: skip

_log = logging.getLogger("nixlet.joining")


class _Answer(NamedTuple):
    status: int
    body: bytes
    media_type: str = "application/json"


class _RefusedError(Exception):
    """A request is answered by a refusal."""

    def __init__(self, status: int, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.answer = _Answer(status, msgspec.json.encode(joinforms.Refusal(message, hint)))


_FULL = _RefusedError(503, "the server has no room for one more connection", "try it again in a while").answer


class _Request(NamedTuple):
    method: str
    path: str
    authorization: str
    body: bytes


class _Peer(NamedTuple):
    """Who has come.

    Attributes:
        address: Its address.
        node: The node that its certificate is for; empty: it showed none.
    """

    address: str
    node: str


def port(settings: ClusterSettings) -> int:
    """Where nodes join."""
    return settings.https_listen_port + joinforms.PORT_ABOVE


@contextlib.asynccontextmanager
async def serve(doorkeeper: Doorkeeper, settings: ClusterSettings) -> AsyncIterator[None]:
    """Let nodes join for the time of the context, at the node's address. The certificates are there.

    Raises:
        FailedPreconditionError: The address is taken, or no address of this machine's.
        NixletError: A certificate can't be read.
    """
    context = await asyncio.to_thread(joincredentials.Shown(settings).context)
    with _listening(settings) as listening:
        connections = _Connections(doorkeeper, context)
        accepting = asyncio.create_task(connections.accept(listening), name="joining")
        try:
            yield
        finally:
            accepting.cancel()
            await asyncio.gather(accepting, return_exceptions=True)
            await connections.close()


def _listening(settings: ClusterSettings) -> socket.socket:
    family = socket.AF_INET6 if settings.node_ip.version == 6 else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((str(settings.node_ip), port(settings)))
        sock.listen(_MAX_CONNECTIONS)
    except OSError as error:
        sock.close()
        raise errors.FailedPreconditionError(
            f"can't listen on {settings.node_ip} port {port(settings)}, where nodes join: {error.strerror}",
            hint="it is one above --https-listen-port: choose another one",
        ) from error
    return sock


class _Connections:
    """The connections of a server."""

    def __init__(self, doorkeeper: Doorkeeper, context: ssl.SSLContext) -> None:
        self._doorkeeper = doorkeeper
        self._context = context
        self._guesses = strangers.Guesses()
        self._lines = strangers.Lines(_log)
        self._joining = asyncio.Semaphore(_AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()
        self._of: collections.Counter[str] = collections.Counter()

    async def accept(self, listening: socket.socket) -> None:
        """Take connections until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, peer = await loop.sock_accept(listening)
            except OSError as error:
                # It has gone again; or there is no room for more in this process, or on this machine, just now.
                if error.errno != errno.ECONNABORTED:
                    self._lines.write("no connection can be taken: %s", error.strerror)
                    await asyncio.sleep(_PAUSE)
                continue
            self._take(connection, str(peer[0]))

    def _take(self, connection: socket.socket, address: str) -> None:
        network = strangers.network(address)
        is_full = len(self._tasks) >= _MAX_CONNECTIONS
        if is_full or self._of[network] >= _MAX_OF_ONE:
            self._lines.write("there is no room for one more connection of %s", address)
        if len(self._tasks) >= _MAX_CONNECTIONS + _MAX_TOLD or self._of[network] >= _MAX_OF_ONE:
            connection.close()
            return
        self._of[network] += 1
        task = asyncio.create_task(self._talk(connection, address, is_full=is_full), name="joining")
        self._tasks.add(task)

        def ended(_: "asyncio.Task[None]") -> None:
            # Also when it was cancelled before its first step.
            connection.close()
            self._tasks.discard(task)
            self._of[network] -= 1
            if not self._of[network]:
                del self._of[network]

        task.add_done_callback(ended)

    async def close(self) -> None:
        """End all of them."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # Transports close in a later turn of the loop than they are asked to.
        await asyncio.sleep(0)

    async def _talk(self, connection: socket.socket, address: str, *, is_full: bool) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(_MAX_HEAD)
        protocol = asyncio.StreamReaderProtocol(reader)
        try:
            transport, _ = await loop.connect_accepted_socket(
                lambda: protocol, connection, ssl=self._context, ssl_handshake_timeout=_HANDSHAKE_TIMEOUT
            )
        except (OSError, TimeoutError):
            # Somebody who speaks no TLS, takes too long, or doesn't believe us.
            return
        try:
            writer = asyncio.StreamWriter(transport, protocol, reader, loop)
            peer = _Peer(address, joincredentials.node(transport.get_extra_info("peercert")))
            answer = _FULL if is_full else await self._answer(reader, peer)
            writer.write(_response(answer))
            if answer.status == 408:
                # Who has said nothing in all this time isn't waited for; the kernel still sends what it has.
                return
            async with asyncio.timeout(_ANSWER_TIMEOUT if answer.status == 200 else _REFUSAL_TIMEOUT):
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (OSError, TimeoutError):
            pass
        finally:
            transport.abort()

    async def _answer(self, reader: asyncio.StreamReader, peer: _Peer) -> _Answer:
        try:
            return await self._answered(await _request(reader), peer)
        except _RefusedError as refused:
            return refused.answer
        except Exception:  # noqa: BLE001 (it is logged, and told in one sentence)
            self._lines.write("a request failed", trace=True)
            return _RefusedError(500, "the server made a mistake", "its log says more").answer

    async def _answered(self, request: _Request, peer: _Peer) -> _Answer:
        wanted = {joinforms.AUTHORITY: "GET", joinforms.JOIN: "POST"}.get(request.path)
        if wanted is None:
            raise _RefusedError(404, f"there are {joinforms.AUTHORITY} and {joinforms.JOIN}")
        if request.method != wanted:
            raise _RefusedError(405, f"{request.path} is asked for by {wanted}")
        if request.path == joinforms.AUTHORITY:
            with self._unsaid("the server can't show its authority now", peer.address):
                return _Answer(200, await asyncio.to_thread(self._doorkeeper.authority), "application/x-pem-file")
        try:
            return await self._joined(request, peer)
        except TimeoutError as error:
            self._lines.write("nobody could be let in within %g s: %s asked", _JOIN_TIMEOUT, peer.address)
            raise _RefusedError(503, f"the server can't let a node in within {_JOIN_TIMEOUT:g} s") from error

    @contextlib.contextmanager
    def _unsaid(self, sentence: str, address: str) -> Iterator[None]:
        """Have a stranger read no more than a sentence of what goes wrong, and the log the rest."""
        try:
            yield
        except errors.NixletError as error:
            self._lines.write("%s asked in vain: %s", address, _said(error))
            raise _RefusedError(503, sentence, "its log says why") from error

    async def _joined(self, request: _Request, peer: _Peer) -> _Answer:
        address = peer.address
        try:
            self._guesses.check(address)
        except errors.PermissionDeniedError as error:
            raise _RefusedError(429, error.message, error.hint) from error
        shown = joincredentials.token(request.authorization)
        async with asyncio.timeout(_JOIN_TIMEOUT), self._joining:
            with self._unsaid("the server can't look tokens up now", address):
                known = shown is not None and await asyncio.to_thread(self._doorkeeper.is_known, shown)
            if not known and not (shown is None and peer.node):
                self._guesses.note(address)
                self._lines.write("somebody at %s wants to join with a wrong token", address)
                raise _RefusedError(
                    401, "the token is wrong, or has ended", "the server's is in its DATA_DIR/server/node-token"
                )
            try:
                wish = msgspec.json.decode(request.body, type=joinforms.Wish)
            except unreadable.JSON as error:
                raise _RefusedError(
                    400, "this is no node's wish to join", "are the two nixlets of different versions?"
                ) from error
            if not known and wish.node != peer.node:
                raise _RefusedError(403, f"the certificate is for the node {peer.node}, which asks for another one")
            welcome = await self._let_in(wish, address)
        _log.info("node %s at %s has its certificates", wish.node, address)
        return _Answer(200, msgspec.json.encode(welcome))

    async def _let_in(self, wish: joinforms.Wish, address: str) -> joinforms.Welcome:
        try:
            return await asyncio.to_thread(self._doorkeeper.let_in, wish)
        except WishError as error:
            raise _RefusedError(400, error.message, error.hint) from error
        except nodepasswords.TakenError as error:
            raise _RefusedError(403, error.message, error.hint) from error
        except errors.NixletError as error:
            # Ours, whatever its kind: an API server that doesn't let us in has nothing against the node.
            _log.warning("node %s at %s can't join: %s", wish.node, address, _said(error))
            away = isinstance(error, errors.UnavailableError | errors.DeadlineExceededError)
            raise _RefusedError(503 if away else 500, _said(error), error.hint) from error


def _said(error: errors.NixletError) -> str:
    return f"{error.said_by} answered: {error.message}" if error.said_by else error.message


async def _request(reader: asyncio.StreamReader) -> _Request:
    try:
        async with asyncio.timeout(_REQUEST_TIMEOUT):
            head = await reader.readuntil(b"\r\n\r\n")
            method, path, fields = _head(head)
            length = fields.get("content-length", "0")
            if "transfer-encoding" in fields or not (length.isascii() and length.isdigit() and len(length) < 10):
                raise _RefusedError(400, "a request's body has a length")
            if int(length) > joinforms.MAX_WISH:
                raise _RefusedError(413, "the request is too large")
            body = await reader.readexactly(int(length))
    except TimeoutError as error:
        raise _RefusedError(408, "the request took too long") from error
    except asyncio.LimitOverrunError as error:
        raise _RefusedError(431, "the request's head is too large") from error
    except asyncio.IncompleteReadError as error:
        raise _RefusedError(400, "the request is not whole") from error
    return _Request(method, path, fields.get("authorization", ""), body)


def _head(head: bytes) -> tuple[str, str, dict[str, str]]:
    first, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    parts = first.split(" ")
    if len(parts) != 3 or not parts[1].startswith("/") or parts[2] not in {"HTTP/1.1", "HTTP/1.0"}:
        raise _RefusedError(400, "this is no request of HTTP/1.1")
    fields: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip() or name.lower() in fields:
            raise _RefusedError(400, "the request's head is none of HTTP/1.1")
        fields[name.lower()] = value.strip()
    return parts[0], parts[1], fields


def _response(answer: _Answer) -> bytes:
    fields = [
        f"HTTP/1.1 {answer.status} {_REASONS[answer.status]}",
        f"Content-Type: {answer.media_type}",
        f"Content-Length: {len(answer.body)}",
        "Cache-Control: no-store",
        "Connection: close",
    ]
    return "\r\n".join([*fields, "", ""]).encode("latin-1") + answer.body
