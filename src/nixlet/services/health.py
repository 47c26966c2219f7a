"""The node's health and metrics over HTTP/1.1, for probes and for Prometheus; paths and answers are those of Kubernetes' parts.

``/healthz`` answers while the event loop turns, ``/readyz`` when pods can be run (else 503 with what is wrong), ``/metrics`` in
Prometheus's text form. Only what is needed of RFC 9112 is spoken: GET and HEAD, no bodies, one request for each connection.
"""

import asyncio
import contextlib
import ipaddress
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

from nixlet import errors
from nixlet.host import unixsocket
from nixlet.telemetry import metrics

#: Limits for whoever asks: bytes of a request, seconds for it and for taking the answer, connections at a time.
_MAX_REQUEST = 8 << 10
_TIMEOUT = 5.0
_MAX_CONNECTIONS = 32

#: Seconds that a check may take.
_CHECK_TIMEOUT = 5.0

_REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
}

_TEXT = "text/plain; charset=utf-8"

_log = logging.getLogger("nixlet.health")

#: Raises a NixletError when something is not as it must be.
Check = Callable[[], Awaitable[object]]


def good_for(seconds: float, check: Check) -> Check:
    """A check that costs something: when it went well, that is believed for some seconds."""
    believed_until = float("-inf")

    async def checked() -> None:
        nonlocal believed_until
        now = asyncio.get_running_loop().time()
        if now >= believed_until:
            await check()
            believed_until = now + seconds

    return checked


class Health:
    """What is answered."""

    def __init__(
        self,
        checks: Mapping[str, Check],
        registry: metrics.Registry,
        remarks: Mapping[str, Callable[[], str]] | None = None,
        further: Callable[[], Mapping[str, Check]] = dict,
    ) -> None:
        """Answers from checks and metrics.

        Args:
            checks: What must be so for the node to be ready, by name.
            registry: The metrics.
            remarks: Tell what is not as somebody wants it, though the node is ready; empty where all is.
            further: Gives checks that may change: it is asked each time.
        """
        self._checks = checks
        self._remarks = remarks or {}
        self._further = further
        self._registry = registry
        self._checking: asyncio.Task[dict[str, str]] | None = None

    async def failures(self) -> Mapping[str, str]:
        """The outcome of each check: what is wrong, or an empty string. Those who ask at the same time share the answer."""
        if self._checking is None or self._checking.done():
            self._checking = asyncio.create_task(self._check_all(), name="readiness")
        return await asyncio.shield(self._checking)

    async def _check_all(self) -> dict[str, str]:
        # A further check never takes the place of one that must be.
        checks = {**self._further(), **self._checks}
        outcomes = await asyncio.gather(*(self._outcome(name, check) for name, check in checks.items()))
        return dict(zip(checks, outcomes, strict=True))

    @staticmethod
    async def _outcome(name: str, check: Check) -> str:
        try:
            async with asyncio.timeout(_CHECK_TIMEOUT):
                await check()
        except errors.NixletError as error:
            return error.message
        except TimeoutError:
            return f"no answer within {_CHECK_TIMEOUT:g} s"
        except Exception as error:  # noqa: BLE001 (it is logged, and the node is not ready)
            _log.exception("the check %s failed", name)
            return f"internal error: {type(error).__name__}"
        return ""

    async def answer(self, target: str) -> tuple[int, str, str]:
        """The status, media type and text for a path with or without a query ("/readyz?verbose")."""
        path, _, query = target.partition("?")
        if path == "/healthz":
            return 200, _TEXT, "ok"
        if path == "/metrics":
            return 200, metrics.CONTENT_TYPE, self._registry.text()
        if path != "/readyz":
            return 404, _TEXT, "there are /healthz, /readyz and /metrics\n"
        outcomes = await self.failures()
        failed = any(outcomes.values())
        if not failed and query.partition("=")[0] != "verbose":
            return 200, _TEXT, "ok"
        # A check is a line, whatever its error says.
        lines = [
            f"[-]{name} failed: {' '.join(outcome.split())}" if outcome else f"[+]{name} ok"
            for name, outcome in outcomes.items()
        ]
        remarks = {name: " ".join(tell().split()) for name, tell in self._remarks.items()}
        lines += [f"[!]{name}: {remark}" for name, remark in remarks.items() if remark]
        lines.append("readyz check failed" if failed else "readyz check passed")
        return 503 if failed else 200, _TEXT, "\n".join(lines) + "\n"


def parse_address(text: str) -> tuple[str, int]:
    """A loopback address and port, "127.0.0.1:9763", "[::1]:9763" or "localhost:9763".

    Raises:
        UsageError: It is something else; what a node tells of itself is for its own host.
    """
    host, _, port = text.rpartition(":")
    # What this name stands for is not looked up: it must mean this host.
    host = "127.0.0.1" if host == "localhost" else host.removeprefix("[").removesuffix("]")
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if loopback and port.isascii() and port.isdecimal() and 0 < int(port) < 1 << 16:
        return host, int(port)
    raise errors.UsageError(
        f"{text!r} is no loopback address with a port", hint="use for example 127.0.0.1:9763, or a unix socket"
    )


@contextlib.asynccontextmanager
async def serve(health: Health, address: str) -> AsyncIterator[None]:
    """Serve for the time of the context.

    Args:
        health: What is answered.
        address: The path of a unix socket, which only we ourselves can open, or a loopback address and port.

    Raises:
        UsageError: The address is not on this host.
        FailedPreconditionError: The address is taken.
    """
    sock = unixsocket.listen(address) if address.startswith("/") else listen_tcp(address)
    connections = _Connections(health)
    create = asyncio.start_unix_server if address.startswith("/") else asyncio.start_server
    server = await create(connections.take, sock=sock, limit=_MAX_REQUEST)
    try:
        yield
    finally:
        server.close()
        await connections.close()
        await server.wait_closed()
        if address.startswith("/"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(address)


def listen_tcp(address: str) -> socket.socket:
    """A socket that listens at a loopback address and port.

    Raises:
        UsageError: The address is not on this host.
        FailedPreconditionError: It is taken.
    """
    host, port = parse_address(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(_MAX_CONNECTIONS)
    except OSError as error:
        sock.close()
        raise errors.FailedPreconditionError(
            f"can't listen on {host} port {port}: {error.strerror}", hint="choose another port: --health-address"
        ) from error
    return sock


class _RefusedError(Exception):
    """A request that gets no answer but its status."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class _Connections:
    """The connections of a server."""

    def __init__(self, health: Health) -> None:
        self._health = health
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take up a new connection."""
        if self._closed:
            writer.transport.abort()
            return
        if len(self._tasks) >= _MAX_CONNECTIONS:
            writer.write(_response(503, _TEXT, "too many connections\n"))
            writer.close()
            return
        task = asyncio.create_task(self._talk(reader, writer), name="health connection")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # Also when it was cancelled before its first step.
        task.add_done_callback(lambda _: writer.close())

    async def close(self) -> None:
        """End all of them, and those that are on their way."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # Transports close in a later turn of the loop than they are asked to.
        await asyncio.sleep(0)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            try:
                method, target = await _request(reader)
                code, media_type, text = await self._health.answer(target)
            except _RefusedError as error:
                method, code, media_type, text = "", error.code, _TEXT, f"{_REASONS[error.code]}\n"
            except Exception:  # noqa: BLE001 (it is logged, and told in one word)
                _log.exception("a request failed")
                method, code, media_type, text = "", 500, _TEXT, f"{_REASONS[500]}\n"
            writer.write(_response(code, media_type, text, head=method == "HEAD"))
            async with asyncio.timeout(_TIMEOUT):
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (OSError, TimeoutError):
            writer.transport.abort()


async def _request(reader: asyncio.StreamReader) -> tuple[str, str]:
    """The method and target of a request; its header fields don't matter here."""
    try:
        async with asyncio.timeout(_TIMEOUT):
            head = await reader.readuntil(b"\r\n\r\n")
    except TimeoutError as error:
        raise _RefusedError(408) from error
    except asyncio.LimitOverrunError as error:
        raise _RefusedError(431) from error
    except asyncio.IncompleteReadError as error:
        raise _RefusedError(400) from error
    parts = head.partition(b"\r\n")[0].decode("latin-1").split(" ")
    if len(parts) != 3 or not parts[1].startswith("/") or parts[2] not in {"HTTP/1.1", "HTTP/1.0"}:
        raise _RefusedError(400)
    if parts[0] not in {"GET", "HEAD"}:
        raise _RefusedError(405)
    return parts[0], parts[1]


def _response(code: int, media_type: str, text: str, *, head: bool = False) -> bytes:
    content = text.encode()
    fields = [
        f"HTTP/1.1 {code} {_REASONS[code]}",
        f"Content-Type: {media_type}",
        f"Content-Length: {len(content)}",
        "Cache-Control: no-cache",
        "X-Content-Type-Options: nosniff",
        "Connection: close",
    ]
    if code == 405:
        fields.append("Allow: GET, HEAD")
    return "\r\n".join([*fields, "", ""]).encode("latin-1") + (b"" if head else content)
