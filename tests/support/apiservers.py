"""Servers on the loopback address that answer as a test says: TLS by a cluster's own certificates, and faults that real servers show seldom."""

import contextlib
import datetime
import http.server
import ipaddress
import os
import socket
import socketserver
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nixlet.cluster import certificates, kubeconfigs
from nixlet.cluster.settings import ClusterSettings
from nixlet.kubeclient.endpoint import Endpoint
from support import clusters


class Asked(NamedTuple):
    """A request as it came."""

    method: str
    path: str
    body: bytes
    headers: dict[str, str]
    #: Which of the server's connections it came on, counted from 0.
    connection: int
    #: Whom the client's certificate is for; empty: it showed none.
    client: str


class Reply(NamedTuple):
    """What is answered. Pieces go out one by one, in chunks."""

    status: int = 200
    body: bytes = b"{}"
    pieces: Iterator[bytes] | None = None
    close: bool = False


class Server(NamedTuple):
    """A server that runs, and what it was asked so far."""

    port: int
    asked: list[Asked]

    def url(self, scheme: str = "https") -> str:
        return f"{scheme}://127.0.0.1:{self.port}"


def made(directory: Path, now: datetime.datetime | None = None, **changes: Any) -> ClusterSettings:
    """A cluster's certificates."""
    settings = clusters.settings(directory, **changes)
    certificates.ensure(settings, now or datetime.datetime.now(datetime.UTC))
    for path, config in kubeconfigs.of_server(settings).items():
        kubeconfigs.write(path, config)
    return settings


def endpoint(settings: ClusterSettings, server: Server, *, client: str = "client-admin", **changes: Any) -> Endpoint:
    """The way to a server with a cluster's certificates."""
    tls = settings.layout.tls
    credentials = kubeconfigs.Credentials(tls(f"{client}.crt"), tls(f"{client}.key")) if client else None
    return Endpoint.of(server.url(), **{"authority": tls("server-ca.crt"), "credentials": credentials, **changes})


def context(settings: ClusterSettings, *, wanted: bool = False, name: str = "serving-kube-apiserver") -> ssl.SSLContext:
    """What a server with a cluster's certificates shows, and whether it insists on a client's."""
    tls = settings.layout.tls
    found = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    found.load_cert_chain(tls(f"{name}.crt"), tls(f"{name}.key"))
    found.load_verify_locations(tls("client-ca.nochain.crt"))
    found.verify_mode = ssl.CERT_REQUIRED if wanted else ssl.CERT_OPTIONAL
    return found


@contextlib.contextmanager
def serving(answer: Callable[[Asked], Reply], tls: ssl.SSLContext | None) -> Iterator[Server]:
    """Answer requests, each connection in a thread of its own, until the context ends."""
    asked: list[Asked] = []
    connections: list[socket.socket] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            self.request.settimeout(30)
            if tls is not None:
                self.request = tls.wrap_socket(self.request, server_side=True)
            connections.append(self.request)
            self.number = len(connections) - 1
            super().setup()

        def finish(self) -> None:
            with contextlib.suppress(OSError, ValueError):
                super().finish()
            self.request.close()

        def handle(self) -> None:
            with contextlib.suppress(OSError):
                super().handle()

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            shown = self.request.getpeercert() if tls is not None else None
            names = dict(pair[0] for pair in shown["subject"]) if shown else {}
            found = Asked(self.command, self.path, body, dict(self.headers), self.number, names.get("commonName", ""))
            asked.append(found)
            reply = answer(found)
            self.send_response(reply.status)
            if reply.close:
                self.send_header("Connection", "close")
                self.close_connection = True
            if reply.pieces is None:
                self.send_header("Content-Length", str(len(reply.body)))
                self.end_headers()
                self.wfile.write(reply.body)
                return
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for piece in reply.pieces:
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            self.wfile.write(b"0\r\n\r\n")

        do_GET = do_POST = do_PATCH = do_DELETE = _serve  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Nothing."""

    class Listening(socketserver.ThreadingTCPServer):
        # (all have ended when the context has)
        daemon_threads = False
        allow_reuse_address = True

        def handle_error(self, *_: object) -> None:
            """A client that goes is no error of the server's."""

    with Listening(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield Server(server.server_address[1], asked)
        finally:
            server.shutdown()
            thread.join()
            for each in connections:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(each, socket.SHUT_RDWR)


@contextlib.contextmanager
def speaking(talk: Callable[[socket.socket], None]) -> Iterator[Server]:
    """Take connections and do with each what a test says, in a thread of its own."""
    listening = socket.create_server(("127.0.0.1", 0))
    threads: list[threading.Thread] = []
    taken: list[socket.socket] = []

    def one(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            talk(connection)

    def take() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            taken.append(connection)
            threads.append(threading.Thread(target=one, args=(connection,)))
            threads[-1].start()

    thread = threading.Thread(target=take)
    thread.start()
    try:
        yield Server(listening.getsockname()[1], [])
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()
        for each in taken:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for talking in threads:
            talking.join()


def closed_port() -> int:
    """A port of the loopback address where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def kept_port() -> Iterator[int]:
    """A port of the loopback address where nothing listens, and which the kernel gives to nobody who doesn't ask for it by its number."""
    with socket.socket() as keeper:
        # Both it and whoever listens there say that they share it; it never listens.
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        keeper.bind(("127.0.0.1", 0))
        yield keeper.getsockname()[1]


def open_files() -> int:
    """How many descriptors we have."""
    return len(os.listdir("/proc/self/fd"))


LOOPBACK = ipaddress.ip_address("127.0.0.1")
