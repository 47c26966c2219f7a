"""Where a cluster's programs listen, at ports and sockets, whether that is free, and where each program is asked how it is."""

import asyncio
import contextlib
import errno
import ipaddress
import socket
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from nixlet import errors
from nixlet.cluster import arguments
from nixlet.cluster import settings as model
from nixlet.cluster.settings import ClusterSettings
from nixlet.host import unixsocket
from nixlet.node.cluster.preflight import finding

_LOOPBACK = "127.0.0.1"

#: Seconds for the programs of a node that was killed to be gone: the kernel ends them a moment after it.
_GONE_TIMEOUT = 5.0

#: Programs that a person may have listen elsewhere, and how their arguments are called.
_ARGUMENTS = {
    finding.ETCD: "etcd_args",
    "kube-apiserver": "kube_apiserver_args",
    "kube-controller-manager": "kube_controller_manager_args",
    "kube-scheduler": "kube_scheduler_args",
    "kubelet": "kubelet_args",
    "kube-proxy": "kube_proxy_args",
}


class Port(NamedTuple):
    """A port, whose it is, and what for where that isn't plain; or, by the path of a unix socket instead of a host, that one."""

    program: str
    host: str
    number: int = 0
    purpose: str = ""

    @property
    def is_socket(self) -> bool:
        """Whether it is a unix socket."""
        return self.host.startswith("/")


class _Listening(NamedTuple):
    """Where a program listens, and at which of these it may be asked how it is."""

    places: list[tuple[str, int]]
    health: list[tuple[str, int]]


def wanted(cluster: ClusterSettings, programs: Collection[str]) -> Iterator[Port]:
    """The ports of programs, also where a person's own arguments have put them elsewhere.

    Raises:
        InvalidArgumentError: An argument names no address, or no port.
    """
    for program in programs:
        yield from (Port(program, host, number) for host, number in _listening(cluster, program).places if number)
    if finding.KINE in programs:
        yield Port(finding.KINE, cluster.layout.kine_socket)


def asked(cluster: ClusterSettings, program: str) -> str:
    """The base of the URL at which a program other than the API server is asked how it is.

    Raises:
        InvalidArgumentError: An argument names no address, or no port; or it can't be asked there.
    """
    scheme = "https" if program in {"kube-controller-manager", "kube-scheduler"} else "http"
    for host, number in _listening(cluster, program).health:
        address = ipaddress.ip_address(host)
        if number and (address.is_loopback or address.is_unspecified):
            # (Go's programs take IPv4 as well where they listen at all addresses of IPv6)
            return f"{scheme}://{_LOOPBACK if address.is_unspecified else model.bracketed(address)}:{number}"
    raise errors.InvalidArgumentError(
        f"by its arguments {program} doesn't answer for its health on the loopback address, where the node asks it",
        hint="have it listen at 127.0.0.1 or at 0.0.0.0, and at a port",
    )


def _listening(cluster: ClusterSettings, program: str) -> _Listening:
    address = str(cluster.node_ip)
    files = cluster.kubelet_files if program == "kubelet" else ()
    said = _Said(program, (*files, *getattr(cluster, _ARGUMENTS.get(program, ""), ())))
    match program:
        case finding.ETCD:
            # (the interface of its clients wants a certificate)
            clients = ",".join(f"https://{_bracketed(host)}:{model.ETCD_CLIENT_PORT}" for host in (_LOOPBACK, address))
            clients_and_peers = [
                *said.urls("listen-client-urls", clients),
                *said.urls("listen-peer-urls", f"https://{_bracketed(address)}:{model.ETCD_PEER_PORT}"),
            ]
            metrics = said.urls("listen-metrics-urls", f"http://{_LOOPBACK}:{model.ETCD_METRICS_PORT}")
            return _Listening([*clients_and_peers, *metrics], metrics)
        case "kube-apiserver":
            return _Listening([(said.address("bind-address", address), cluster.https_listen_port)], [])
        case "kube-controller-manager":
            places = [said.pair("bind-address", _LOOPBACK, "secure-port", model.CONTROLLERS_PORT)]
            return _Listening(places, places)
        case "kube-scheduler":
            places = [said.pair("bind-address", _LOOPBACK, "secure-port", model.SCHEDULER_PORT)]
            return _Listening(places, places)
        case "kubelet":
            health = said.pair("healthz-bind-address", _LOOPBACK, "healthz-port", model.KUBELET_HEALTH_PORT)
            served = [] if cluster.is_standalone else [said.pair("address", address, "port", model.KUBELET_PORT)]
            return _Listening([*served, health], [health])
        case "kube-proxy":
            health = said.joined("healthz-bind-address", model.PROXY_HEALTH_PORT)
            return _Listening([health, said.joined("metrics-bind-address", model.PROXY_METRICS_PORT)], [health])
        case finding.FLANNEL:
            places = [(_LOOPBACK, model.FLANNEL_HEALTH_PORT)]
            return _Listening(places, places)
        case _:
            # (kine has a socket)
            return _Listening([], [])


def _bracketed(address: str) -> str:
    return model.bracketed(ipaddress.ip_address(address))


class _Said:
    """What a person's arguments, and files in their place, say of where a program listens."""

    def __init__(self, program: str, extra: Collection[str]) -> None:
        self._program = program
        self._said: Mapping[str, str] = arguments.last({}, extra)

    def address(self, key: str, ours: str) -> str:
        """An address."""
        return self._host(key, self._said.get(key, ours))

    def pair(self, host_key: str, host: str, port_key: str, port: int) -> tuple[str, int]:
        """An address and a port that have an argument each."""
        return self._host(host_key, self._said.get(host_key, host)), self._port(
            port_key, self._said.get(port_key, str(port))
        )

    def joined(self, key: str, port: int) -> tuple[str, int]:
        """An address with a port in one argument; kube-proxy's own where the port is left out."""
        text = self._said.get(key, f"{_LOOPBACK}:{port}")
        with contextlib.suppress(ValueError):
            return str(ipaddress.ip_address(text.strip("[]"))), port
        host, _, number = text.rpartition(":")
        return self._host(key, host), self._port(key, number)

    def urls(self, key: str, ours: str) -> list[tuple[str, int]]:
        """The addresses and ports of URLs."""
        found = []
        for url in self._said.get(key, ours).split(","):
            host, _, number = url.strip().partition("://")[2].rstrip("/").rpartition(":")
            if host == "localhost":
                host = _LOOPBACK
            found.append((self._host(key, host), self._port(key, number)))
        return found

    def _host(self, key: str, text: str) -> str:
        try:
            return str(ipaddress.ip_address(text.removeprefix("[").removesuffix("]")))
        except ValueError:
            raise self._wrong(key, "address") from None

    def _port(self, key: str, text: str) -> int:
        if not (text.isascii() and text.isdigit()) or len(text) > 5 or int(text) > 65535:
            raise self._wrong(key, "port")
        return int(text)

    def _wrong(self, key: str, what: str) -> errors.InvalidArgumentError:
        return errors.InvalidArgumentError(f"the argument {key} of {self._program} names no {what}")


def of_node(cluster: ClusterSettings, programs: Collection[str]) -> list[Port]:
    """The ports of a node with these programs: theirs, and of a server the one at which nodes join it."""
    found = list(wanted(cluster, programs))
    if "kube-apiserver" in programs:
        found.append(
            Port(
                "nixlet", str(cluster.node_ip), cluster.joining_port, "where nodes join (one above --https-listen-port)"
            )
        )
    return found


def check(ports: Collection[Port]) -> None:
    """Check that ports can be listened at.

    Raises:
        FailedPreconditionError: Somebody listens at one, or the machine hasn't its address.
    """
    for port in ports:
        if port.is_socket:
            # (one that nobody serves any more is in nobody's way)
            if unixsocket.is_served(port.host):
                raise errors.FailedPreconditionError(
                    f"{port.program} can't listen at {port.host}: another process serves that socket",
                    hint=f"end what listens there: ss -lxp 'src = {port.host}' names it",
                )
            continue
        try:
            with contextlib.closing(socket.socket(socket.AF_INET6 if ":" in port.host else socket.AF_INET)) as trial:
                # Connections that have just ended are no hindrance.
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                trial.bind((port.host, port.number))
                trial.listen(1)
        except OSError as error:
            purpose = f", {port.purpose}" if port.purpose else ""
            raise errors.FailedPreconditionError(
                f"{port.program} can't listen at {port.host} port {port.number}{purpose}: {error.strerror}",
                hint="the machine hasn't that address: give it one, or name another one (--node-ip)"
                if error.errno == errno.EADDRNOTAVAIL
                else f"end what listens there: ss -ltnp 'sport = :{port.number}' names it",
            ) from error


async def free(ports: Collection[Port]) -> None:
    """The same, with patience for the programs of a node that was killed a moment ago."""
    deadline = asyncio.get_running_loop().time() + _GONE_TIMEOUT
    while True:
        try:
            check(ports)
            return
        except errors.FailedPreconditionError:
            if asyncio.get_running_loop().time() >= deadline:
                raise
        await asyncio.sleep(0.1)
