"""How connections are made, kept, lost and given up, and what is said of it."""

import dataclasses
import datetime
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.cluster import certificates
from nixlet.cluster.settings import ClusterSettings
from nixlet.kubeclient import connections, failures, resources
from nixlet.kubeclient.calls import Call
from nixlet.kubeclient.client import Client
from nixlet.kubeclient.endpoint import Endpoint
from support import apiservers
from support.apiservers import Asked, Reply

DAY = datetime.timedelta(days=1)


def test_nothing_listens() -> None:
    with (
        Client(Endpoint.of(f"https://127.0.0.1:{apiservers.closed_port()}")) as client,
        pytest.raises(
            errors.UnavailableError, match=r"^nothing listens where the API server at https://127.0.0.1:\d+ should be"
        ),
    ):
        client.get(resources.NODES, "n")


def test_a_name_that_is_nowhere() -> None:
    with (
        Client(Endpoint.of("https://no-such-host.invalid:6443")) as client,
        pytest.raises(errors.UnavailableError, match=r"no-such-host.invalid can't be looked up"),
    ):
        client.get(resources.NODES, "n")


def quiet(connection: socket.socket) -> None:
    while connection.recv(1 << 16):
        pass


def dripping_head(connection: socket.socket) -> None:
    connection.recv(1 << 16)
    while True:
        connection.sendall(b"H")
        time.sleep(0.05)


def dripping_body(connection: socket.socket) -> None:
    connection.recv(1 << 16)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    while True:
        connection.sendall(b" ")
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("talk", "scheme"),
    [(quiet, "http"), (quiet, "https"), (dripping_head, "http"), (dripping_body, "http")],
)
def test_a_server_that_is_too_slow(talk: Callable[[socket.socket], None], scheme: str) -> None:
    """Also one that always sends a little: the time is for the whole."""
    with (
        apiservers.speaking(talk) as server,
        Client(Endpoint.of(server.url(scheme)), seconds=0.5) as client,
        pytest.raises(errors.DeadlineExceededError, match=r"hasn't answered within 0.5 s"),
    ):
        client.get(resources.NODES, "n")


def said(text: bytes) -> Callable[[socket.socket], None]:
    def talk(connection: socket.socket) -> None:
        connection.recv(1 << 16)
        connection.sendall(text)

    return talk


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        (b"", errors.UnavailableError, "ended the connection before its answer was whole|Connection reset"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{}", errors.UnavailableError, "before its answer was whole"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{}", errors.UnavailableError, "before its answer was whole"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", errors.UnavailableError, "no object of Kubernetes'"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 100_000, errors.UnavailableError, "no object of Kubernetes'"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * 200 + b"\r\n", errors.UnavailableError, "no object of Kubernetes'"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", errors.ResourceExhaustedError, "more than 64 MiB"),
    ],
)  # fmt: skip
def test_answers_that_are_broken(text: bytes, kind: type[errors.NixletError], message: str) -> None:
    with (
        apiservers.speaking(said(text)) as server,
        Client(Endpoint.of(server.url("http"))) as client,
        pytest.raises(errors.NixletError, match=message) as caught,
    ):
        client.get(resources.NODES, "n")
    assert type(caught.value) is kind


def test_an_answer_without_an_end_is_not_kept() -> None:
    def talk(connection: socket.socket) -> None:
        connection.recv(1 << 16)
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            connection.sendall(b" " * 65536)

    with (
        apiservers.speaking(talk) as server,
        connections.Connections(Endpoint.of(server.url("http"))) as there,
        pytest.raises(errors.ResourceExhaustedError, match="more than 1 MiB"),
    ):
        there.ask(connections.Request("GET", "/", most=1 << 20), Call())


def test_http_where_tls_is_expected_and_the_other_way_round(cluster: ClusterSettings) -> None:
    with (
        apiservers.speaking(said(b"HTTP/1.0 400 Bad Request\r\n\r\n")) as server,
        Client(Endpoint.of(server.url())) as client,
        pytest.raises(errors.UnavailableError, match="speaks no TLS"),
    ):
        client.get(resources.NODES, "n")
    with (
        apiservers.serving(lambda _: Reply(), apiservers.context(cluster)) as server,
        Client(Endpoint.of(server.url("http"))) as client,
        pytest.raises(errors.UnavailableError),
    ):
        client.get(resources.NODES, "n")


def test_another_authority_s_server_is_a_stranger(cluster: ClusterSettings, tmp_path: Path) -> None:
    other = apiservers.made(tmp_path)
    with (
        apiservers.serving(lambda _: Reply(), apiservers.context(other)) as server,
        Client(apiservers.endpoint(cluster, server)) as client,
        pytest.raises(failures.StrangerError, match="signed by an authority that isn't known here"),
    ):
        client.get(resources.NODES, "n")
    assert server.asked == []


def test_the_machine_s_own_authorities_are_believed_where_none_is_named(cluster: ClusterSettings) -> None:
    with (
        apiservers.serving(lambda _: Reply(), apiservers.context(cluster)) as server,
        Client(apiservers.endpoint(cluster, server, authority="", client="")) as client,
        pytest.raises(failures.StrangerError, match="isn't known here"),
    ):
        client.get(resources.NODES, "n")


@pytest.mark.parametrize(("then", "message"), [(-400 * DAY, "has ended"), (5 * DAY, "isn't valid yet")])
def test_a_certificate_outside_of_its_time(
    cluster: ClusterSettings, tmp_path: Path, then: datetime.timedelta, message: str
) -> None:
    now = datetime.datetime.now(datetime.UTC)
    settings = apiservers.made(tmp_path, min(now, now + then - DAY))
    if then > DAY:
        certificates.rotate(settings, ["api-server"], now + then)
    with (
        apiservers.serving(lambda _: Reply(), apiservers.context(settings)) as server,
        Client(apiservers.endpoint(settings, server, client="")) as client,
        pytest.raises(failures.StrangerError, match=message),
    ):
        client.get(resources.NODES, "n")


def test_a_certificate_for_another_host(cluster: ClusterSettings) -> None:
    """A controller's certificate is no server's, either."""
    with apiservers.serving(lambda _: Reply(), apiservers.context(cluster)) as server:
        there = Endpoint.of(f"https://127.0.0.2:{server.port}", authority=cluster.layout.tls("server-ca.crt"))
        # (the server listens at the first loopback address only: a socket of ours hands it on)
        with forwarding(("127.0.0.2", 0), server.port) as port:
            there = Endpoint.of(f"https://127.0.0.2:{port}", authority=there.authority)
            with Client(there) as client, pytest.raises(failures.StrangerError, match=r"isn't for 127.0.0.2$"):
                client.get(resources.NODES, "n")


class forwarding:  # noqa: N801 (a context manager)
    """Hands one connection on to a port of the loopback address."""

    def __init__(self, address: tuple[str, int], port: int) -> None:
        self._listening = socket.create_server(address)
        self._port = port
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        connection, _ = self._listening.accept()
        with connection, socket.create_connection(("127.0.0.1", self._port)) as other:
            back = threading.Thread(target=self._copy, args=(other, connection))
            back.start()
            self._copy(connection, other)
            back.join()

    @staticmethod
    def _copy(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def __enter__(self) -> int:
        self._thread.start()
        port: int = self._listening.getsockname()[1]
        return port

    def __exit__(self, *_: object) -> None:
        self._thread.join()
        self._listening.close()


def test_a_client_certificate_that_the_server_refuses(cluster: ClusterSettings, tmp_path: Path) -> None:
    other = apiservers.made(tmp_path)
    with apiservers.serving(lambda _: Reply(), apiservers.context(cluster, wanted=True)) as server:
        there = apiservers.endpoint(other, server, authority=cluster.layout.tls("server-ca.crt"))
        with Client(there) as client, pytest.raises(failures.UnauthenticatedError, match="refuses our certificate"):
            client.get(resources.NODES, "n")
        there = apiservers.endpoint(cluster, server, client="")
        with Client(there) as client, pytest.raises(failures.UnauthenticatedError, match="refuses our certificate"):
            client.get(resources.NODES, "n")
    assert server.asked == []


def test_old_tls_is_not_spoken(cluster: ClusterSettings) -> None:
    tls = apiservers.context(cluster)
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        tls.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        tls.minimum_version = ssl.TLSVersion.TLSv1
    with (
        apiservers.serving(lambda _: Reply(), tls) as server,
        Client(apiservers.endpoint(cluster, server)) as client,
        pytest.raises(errors.NixletError),
    ):
        client.get(resources.NODES, "n")
    assert server.asked == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("server-ca.crt", b"no certificate", "server-ca.crt holds no certificate"),
        ("client-admin.crt", b"no certificate", "client-admin.crt is no certificate, or its key is"),
        ("client-admin.key", b"no key", "client-admin.crt is no certificate, or its key is"),
        ("client-admin.key", None, "can't be read: No such file"),
    ],
)
def test_files_that_are_broken(
    cluster: ClusterSettings, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    shutil.copytree(cluster.layout.tls(""), tmp_path / "data/server/tls")
    path = tmp_path / "data/server/tls" / name
    path.unlink() if content is None else path.write_bytes(content)
    there = dataclasses.replace(cluster, data_dir=str(tmp_path / "data"))
    with (
        apiservers.serving(lambda _: Reply(), apiservers.context(cluster)) as server,
        Client(apiservers.endpoint(there, server)) as client,
        pytest.raises(errors.FailedPreconditionError, match=message),
    ):
        client.get(resources.NODES, "n")


def test_certificates_that_were_renewed_are_shown_by_the_next_connection(
    cluster: ClusterSettings, tmp_path: Path
) -> None:
    settings = apiservers.made(tmp_path)
    tls = apiservers.context(settings)
    serials = []

    def answer(_: Asked) -> Reply:
        return Reply(close=True)

    with apiservers.serving(answer, tls) as server, Client(apiservers.endpoint(settings, server)) as client:
        client.get(resources.NODES, "n")
        admin, scheduler = (settings.layout.tls(f"client-{name}") for name in ("admin", "scheduler"))
        for end in (".crt", ".key"):
            shutil.copy(f"{scheduler}{end}", f"{admin}{end}")
        client.get(resources.NODES, "n")
        serials = [each.client for each in server.asked]
    assert serials == ["system:admin", "system:kube-scheduler"]


def test_a_connection_that_is_kept_ends_with_the_certificate_that_it_was_made_by(tmp_path: Path) -> None:
    settings = apiservers.made(tmp_path)
    with (
        apiservers.serving(lambda _: Reply(), apiservers.context(settings)) as server,
        Client(apiservers.endpoint(settings, server)) as client,
    ):
        for _ in range(2):
            client.get(resources.NODES, "n")
        certificates.rotate(settings, ["admin"], datetime.datetime.now(datetime.UTC))
        for _ in range(2):
            client.get(resources.NODES, "n")
    assert [each.connection for each in server.asked] == [0, 0, 1, 1]


def test_a_pair_that_is_half_renewed_isn_t_shown_yet(cluster: ClusterSettings, tmp_path: Path) -> None:
    settings = apiservers.made(tmp_path)
    tls = apiservers.context(settings)
    with (
        apiservers.serving(lambda _: Reply(close=True), tls) as server,
        Client(apiservers.endpoint(settings, server)) as client,
    ):
        client.get(resources.NODES, "n")
        admin, scheduler = (settings.layout.tls(f"client-{name}") for name in ("admin", "scheduler"))
        shutil.copy(f"{scheduler}.key", f"{admin}.key")
        client.get(resources.NODES, "n")
        # Whoever begins now has no former one.
        with (
            Client(apiservers.endpoint(settings, server)) as other,
            pytest.raises(errors.FailedPreconditionError, match="or its key is encrypted or another one's"),
        ):
            other.get(resources.NODES, "n")
        shutil.copy(f"{scheduler}.crt", f"{admin}.crt")
        client.get(resources.NODES, "n")
        serials = [each.client for each in server.asked]
    assert serials == ["system:admin", "system:admin", "system:kube-scheduler"]


def test_a_server_that_closes_is_connected_anew(cluster: ClusterSettings) -> None:
    with (
        apiservers.serving(lambda _: Reply(close=True), apiservers.context(cluster)) as server,
        Client(apiservers.endpoint(cluster, server)) as client,
    ):
        for _ in range(3):
            client.get(resources.NODES, "n")
    assert [each.connection for each in server.asked] == [0, 1, 2]


def answering(times: int, answer: bytes) -> Callable[[socket.socket], None]:
    """Answers so often on each connection, and closes it when it is asked once more."""

    def talk(connection: socket.socket) -> None:
        for _ in range(times):
            if not connection.recv(1 << 16):
                return
            connection.sendall(answer)
        connection.recv(1)

    return talk


def test_what_may_come_twice_is_asked_again_where_a_kept_connection_is_lost_meanwhile() -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
    with apiservers.speaking(answering(1, answer)) as server, Client(Endpoint.of(server.url("http"))) as client:
        client.get(resources.NODES, "n")
        # The server closes without an answer when this one comes.
        client.get(resources.NODES, "n")
        with pytest.raises(errors.UnavailableError):
            client.create(resources.NODES, {})
        # Nor does a change that is good for one version only mean the same twice.
        once = {"metadata": {"resourceVersion": "1"}}
        for change in (client.patch, client.apply):
            client.get(resources.NODES, "n")
            with pytest.raises(errors.UnavailableError):
                change(resources.NODES, "n", once)
            client.get(resources.NODES, "n")
            change(resources.NODES, "n", {})


def test_threads_have_connections_of_their_own_and_few_are_kept(cluster: ClusterSettings) -> None:
    together = threading.Barrier(8)

    def answer(_: Asked) -> Reply:
        together.wait(30)
        return Reply()

    with (
        apiservers.serving(answer, apiservers.context(cluster)) as server,
        Client(apiservers.endpoint(cluster, server)) as client,
    ):
        threads = [threading.Thread(target=client.get, args=(resources.NODES, "n")) for _ in range(8)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert len({each.connection for each in server.asked}) == 8
        kept = client._reached._idle
        assert len(kept) == 4


@pytest.mark.parametrize("talk", [quiet, dripping_head, dripping_body])
def test_a_call_that_is_given_up_ends_at_once(talk: Callable[[socket.socket], None]) -> None:
    call = Call()
    failed: list[BaseException] = []

    def ask() -> None:
        try:
            client.get(resources.NODES, "n", call=call)
        except errors.NixletError as error:
            failed.append(error)

    with apiservers.speaking(talk) as server, Client(Endpoint.of(server.url("http")), seconds=3600) as client:
        thread = threading.Thread(target=ask)
        thread.start()
        while call._socket is None:
            time.sleep(0.001)
        call.cancel()
        thread.join(30)
        assert not thread.is_alive()
    assert [type(each) for each in failed] == [errors.CallCancelledError]


def test_a_call_that_was_given_up_before_asks_nothing(cluster: ClusterSettings) -> None:
    call = Call()
    call.cancel()
    with (
        apiservers.serving(lambda _: Reply(), apiservers.context(cluster)) as server,
        Client(apiservers.endpoint(cluster, server)) as client,
        pytest.raises(errors.CallCancelledError),
    ):
        client.get(resources.NODES, "n", call=call)
    assert server.asked == []


def test_a_connection_in_the_making_can_be_given_up() -> None:
    """Nobody takes connections from a queue that is full."""
    call = Call()
    failed: list[BaseException] = []
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        port = full.getsockname()[1]
        fillers: list[socket.socket] = []
        try:
            while True:
                filler = socket.socket()
                fillers.append(filler)
                filler.settimeout(0.3)
                filler.connect(("127.0.0.1", port))
        except TimeoutError:
            pass

        def ask() -> None:
            try:
                with Client(Endpoint.of(f"https://127.0.0.1:{port}"), seconds=3600) as client:
                    client.get(resources.NODES, "n", call=call)
            except errors.NixletError as error:
                failed.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        while call._socket is None:
            time.sleep(0.001)
        time.sleep(0.05)
        call.cancel()
        thread.join(30)
        assert not thread.is_alive()
        for each in fillers:
            each.close()
    assert [type(each) for each in failed] == [errors.CallCancelledError]


def test_a_connection_that_was_given_up_is_not_kept(cluster: ClusterSettings) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def pieces() -> Iterator[bytes]:
        yield b"{"
        entered.set()
        go_on.wait(30)
        yield b"}"

    def answer(_: Asked) -> Reply:
        return Reply(pieces=pieces()) if not entered.is_set() else Reply()

    call = Call()
    with (
        apiservers.serving(answer, apiservers.context(cluster)) as server,
        Client(apiservers.endpoint(cluster, server), seconds=60) as client,
    ):
        failed: list[BaseException] = []

        def ask() -> None:
            try:
                client.get(resources.NODES, "n", call=call)
            except errors.NixletError as error:
                failed.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        assert entered.wait(30)
        call.cancel()
        thread.join(30)
        go_on.set()
        assert [type(each) for each in failed] == [errors.CallCancelledError]
        client.get(resources.NODES, "n")
    assert [each.connection for each in server.asked] == [0, 1]
