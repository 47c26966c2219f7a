"""Connections to a server, which are kept for the next request: HTTP/1.1 by the standard library, one request at a time on each.

What a server sends is read as far as there is room, and each step has to be done by a moment. Proxies of the environment are passed over:
a cluster's API is asked directly. Redirects are not followed.
"""

import collections
import contextlib
import http.client
import io
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple, Self, cast

import nixlet
from nixlet import errors
from nixlet.kubeclient import breakages, failures, trust
from nixlet.kubeclient.calls import Call
from nixlet.kubeclient.endpoint import Endpoint

#: How many connections are kept that nobody uses.
_MAX_IDLE = 4

#: What is read at once (bytes).
_CHUNK = 1 << 16

#: Seconds after which the kernel asks a silent peer whether it is still there, between two such questions, and how often.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))

#: A kept connection was closed by the server in the moment in which it was taken.
_CLOSED = (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError)


class Request(NamedTuple):
    """A request.

    Attributes:
        method: HTTP's.
        target: The path behind the endpoint's own, and a query.
        body: What is sent.
        content_type: The body's media type.
        seconds: How long the whole may take.
        most: How large the answer may be (bytes).
        repeatable: It means the same when it arrives twice.
        authorization: In place of the endpoint's token. A secret.
    """

    method: str
    target: str
    body: bytes = b""
    content_type: str = ""
    seconds: float = 10.0
    most: int = 64 << 20
    repeatable: bool = True
    authorization: str = ""

    def __repr__(self) -> str:
        return f"Request({self.method!r}, {self.target!r})"


class Answer(NamedTuple):
    """An answer, whole."""

    status: int
    body: bytes


class _Wire:
    """A socket as ``http.client`` takes it, whose every step has to be done by a moment. Its owner closes it, and nobody else."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.until = 0.0

    def arm(self) -> None:
        """Let the next step take the time that is left.

        Raises:
            TimeoutError: None is.
        """
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeoutError("the time is over")
        self.socket.settimeout(left)

    def sendall(self, data: bytes) -> None:
        """Send all of it."""
        rest = memoryview(data)
        while rest:
            self.arm()
            try:
                rest = rest[self.socket.send(rest) :]
            except _CLOSED:
                # The server may have said why it hangs up: that it doesn't take our certificate, for one.
                self.socket.recv(1)
                raise

    def makefile(self, *_: object) -> io.BufferedReader:
        """What is received, for ``http.client``."""
        return io.BufferedReader(_Received(self), _CHUNK)

    def close(self) -> None:
        """``http.client`` is done with it, which may be before its answer is read."""


class _Received(io.RawIOBase):
    def __init__(self, wire: _Wire) -> None:
        super().__init__()
        self._wire = wire

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]
        self._wire.arm()
        return self._wire.socket.recv_into(buffer)


class _Connection:
    """A connection, and HTTP on it."""

    def __init__(self, endpoint: Endpoint, sock: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        self.wire = _Wire(sock)
        #: What it was made with.
        self.tls = tls
        self._http = http.client.HTTPConnection(endpoint.host, endpoint.port)
        self._http.auto_open = 0
        self._http.sock = cast("socket.socket", self.wire)

    def send(self, request: Request, headers: dict[str, str], path: str) -> http.client.HTTPResponse:
        """Send a request; its answer, of which the head is read."""
        own = {"Content-Type": request.content_type} if request.content_type else {}
        own |= {"Authorization": request.authorization} if request.authorization else {}
        self._http.request(request.method, f"{path}{request.target}", request.body or None, {**headers, **own})
        return self._http.getresponse()

    def is_alive(self) -> bool:
        """Whether the server has neither closed it nor said anything unasked."""
        poll = select.poll()
        poll.register(self.wire.socket, select.POLLIN | select.POLLHUP)
        return not poll.poll(0)

    def close(self) -> None:
        """Close it."""
        self._http.close()
        self.wire.socket.close()


class Connections:
    """A server's connections, for any number of threads. A context manager, whose end closes those that are kept."""

    def __init__(self, endpoint: Endpoint) -> None:
        """For a server.

        Raises:
            InvalidArgumentError: The token can't go into a header.
        """
        self._endpoint = endpoint
        self._trust = trust.Trust(endpoint)
        self._idle: collections.deque[_Connection] = collections.deque()
        self._closed = False
        self._lock = threading.Lock()
        self._headers = {"Accept": "application/json", "User-Agent": f"nixlet/{nixlet.__version__}"}
        if token := endpoint.credentials.token:
            if not (token.isascii() and token.isprintable() and " " not in token):
                raise errors.InvalidArgumentError(f"the token for {endpoint.what} has other characters than a token's")
            self._headers["Authorization"] = f"Bearer {token}"

    def __enter__(self) -> Self:
        """Use it."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close what is kept. What is in use is closed by its users."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, collections.deque()
        for each in idle:
            each.close()

    def ask(self, request: Request, call: Call) -> Answer:
        """Send a request and read the whole answer, whatever its status.

        Raises:
            CallCancelledError: It was given up.
            ResourceExhaustedError: The answer is too large.
            NixletError: As in ``breakages.of_transport``.
        """
        with self._told(request, call):
            connection, response = self._sent(request, call)
            try:
                body = self._read(response, request.most)
            except BaseException:
                call.release()
                connection.close()
                raise
            call.release()
            self._keep(connection, response)
            call.check()
            return Answer(response.status, body)

    @contextlib.contextmanager
    def streaming(self, request: Request, call: Call) -> Iterator[Iterator[bytes]]:
        """Send a request and have its answer piece by piece, as it comes.

        Raises:
            NixletError: As in ``ask``; or the status isn't 200: as in ``failures.of_answer``.
        """
        with self._told(request, call):
            connection, response = self._sent(request, call)
        try:
            if response.status != 200:
                with self._told(request, call):
                    body = self._read(response, request.most)
                raise failures.of_answer(self._endpoint, response.status, body)
            yield self._pieces(response, request, call)
        finally:
            call.release()
            connection.close()

    def _pieces(self, response: http.client.HTTPResponse, request: Request, call: Call) -> Iterator[bytes]:
        while True:
            with self._told(request, call):
                piece = response.read1(_CHUNK)
            call.check()
            if not piece:
                return
            yield piece

    def _sent(self, request: Request, call: Call) -> tuple[_Connection, http.client.HTTPResponse]:
        until = call.until(time.monotonic(), request.seconds)
        kept = self._taken()
        if kept is not None:
            try:
                return kept, self._send(kept, request, call, until)
            except _CLOSED:
                # The server closes what is idle, and may do so just now.
                if not request.repeatable or call.cancelled:
                    raise
        fresh = self._connected(call, until)
        return fresh, self._send(fresh, request, call, until)

    def _send(self, connection: _Connection, request: Request, call: Call, until: float) -> http.client.HTTPResponse:
        try:
            call.use(connection.wire.socket)
            connection.wire.until = until
            return connection.send(request, self._headers, self._endpoint.path)
        except BaseException:
            call.release()
            connection.close()
            raise

    def _read(self, response: http.client.HTTPResponse, most: int) -> bytes:
        if (response.length or 0) > most:
            raise failures.too_large(self._endpoint, most)
        pieces, size = [], 0
        while piece := response.read1(_CHUNK):
            size += len(piece)
            if size > most:
                raise failures.too_large(self._endpoint, most)
            pieces.append(piece)
        if response.length:
            # (``read1`` says nothing of an end that comes too early)
            raise http.client.IncompleteRead(b"", response.length)
        return b"".join(pieces)

    def _taken(self) -> _Connection | None:
        while True:
            with self._lock:
                if not self._idle:
                    return None
                found = self._idle.pop()
            if found.is_alive() and self._is_current(found):
                return found
            found.close()

    def _is_current(self, connection: _Connection) -> bool:
        """Whether a connection was made as one would be made now: a server looks at our certificate with each request, also at one that was renewed long ago."""
        return connection.tls is None or connection.tls is self._trust.context()

    def _keep(self, connection: _Connection, response: http.client.HTTPResponse) -> None:
        # Before Python 3.12 a response that was read to its end by ``read1`` doesn't know it.
        response.close()
        with self._lock:
            if not (self._closed or response.will_close or len(self._idle) >= _MAX_IDLE):
                self._idle.append(connection)
                return
        connection.close()

    def _connected(self, call: Call, until: float) -> _Connection:
        sock = _connect(self._endpoint, call, until)
        try:
            if self._endpoint.scheme == "https":
                tls = self._trust.context()
                sock = tls.wrap_socket(sock, server_hostname=self._endpoint.host, do_handshake_on_connect=False)
                call.use(sock)
                connection = _Connection(self._endpoint, sock, tls)
                connection.wire.until = until
                connection.wire.arm()
                sock.do_handshake()
                return connection
            return _Connection(self._endpoint, sock)
        except BaseException:
            call.release()
            sock.close()
            raise

    @contextlib.contextmanager
    def _told(self, request: Request, call: Call) -> Iterator[None]:
        """Have what goes wrong on the way told in words."""
        try:
            yield
        except (OSError, http.client.HTTPException) as error:
            if call.cancelled:
                raise errors.CallCancelledError("the request was given up") from error
            ended = isinstance(error, http.client.IncompleteRead | http.client.RemoteDisconnected)
            if isinstance(error, http.client.HTTPException) and not ended:
                raise failures.no_object(self._endpoint) from error
            raise breakages.of_transport(self._endpoint, error, request.seconds) from error


def _connect(endpoint: Endpoint, call: Call, until: float) -> socket.socket:
    """A socket that is connected with the first address that takes us; several share the time.

    Raises:
        OSError: None does: what the last one said.
    """
    call.check()
    found = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
    for number, (family, kind, protocol, _, address) in enumerate(found):
        sock = socket.socket(family, kind | socket.SOCK_CLOEXEC, protocol)
        try:
            call.use(sock)
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError("the time is over")
            sock.settimeout(left / (len(found) - number))
            sock.connect(address)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE:
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
            return sock
        except BaseException as error:
            call.release()
            sock.close()
            if not isinstance(error, OSError) or call.cancelled or number + 1 == len(found):
                raise
    raise OSError("the name has no address")
