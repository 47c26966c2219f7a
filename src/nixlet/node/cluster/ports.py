"""Where a cluster's programs listen, at ports and sockets, and whether that is free."""

import asyncio
import contextlib
import socket
from collections.abc import Collection, Iterator
from typing import NamedTuple

from nixlet import errors
from nixlet.cluster import settings as model
from nixlet.cluster.settings import ClusterSettings
from nixlet.host import unixsocket
from nixlet.node.cluster import finding

_LOOPBACK = "127.0.0.1"

#: Seconds for the programs of a node that was killed to be gone: the kernel ends them a moment after it.
_GONE_TIMEOUT = 5.0


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


def wanted(cluster: ClusterSettings, programs: Collection[str]) -> Iterator[Port]:
    """The ports of programs; without those of a program that a person's own arguments put elsewhere."""
    address = str(cluster.node_ip)
    listens = {
        finding.ETCD: (
            (_LOOPBACK, model.ETCD_CLIENT_PORT),
            (address, model.ETCD_CLIENT_PORT),
            (address, model.ETCD_PEER_PORT),
            (_LOOPBACK, model.ETCD_METRICS_PORT),
        ),
        "kube-apiserver": ((address, cluster.https_listen_port),),
        "kube-controller-manager": ((_LOOPBACK, model.CONTROLLERS_PORT),),
        "kube-scheduler": ((_LOOPBACK, model.SCHEDULER_PORT),),
        "kubelet": ((address, model.KUBELET_PORT), (_LOOPBACK, model.KUBELET_HEALTH_PORT)),
        "kube-proxy": ((_LOOPBACK, model.PROXY_HEALTH_PORT), (_LOOPBACK, model.PROXY_METRICS_PORT)),
        finding.FLANNEL: ((_LOOPBACK, model.FLANNEL_HEALTH_PORT),),
    }
    said = {
        finding.ETCD: cluster.etcd_args,
        "kube-apiserver": cluster.kube_apiserver_args,
        "kube-controller-manager": cluster.kube_controller_manager_args,
        "kube-scheduler": cluster.kube_scheduler_args,
        "kubelet": cluster.kubelet_args,
        "kube-proxy": cluster.kube_proxy_args,
    }
    for program, places in listens.items():
        keys = [argument.partition("=")[0] for argument in said.get(program, ())]
        if program in programs and not any(part in key for key in keys for part in ("port", "listen", "bind")):
            yield from (Port(program, host, number) for host, number in places)
    if finding.KINE in programs:
        yield Port(finding.KINE, cluster.layout.kine_socket)


def of_node(cluster: ClusterSettings, programs: Collection[str]) -> list[Port]:
    """The ports of a node with these programs: theirs, and of a server the one at which nodes join it."""
    found = list(wanted(cluster, programs))
    if "kube-apiserver" in programs:
        number = cluster.https_listen_port + model.JOINING_ABOVE
        found.append(Port("nixlet", str(cluster.node_ip), number, "where nodes join (one above --https-listen-port)"))
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
                hint=f"end what listens there: ss -ltnp 'sport = :{port.number}' names it",
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
