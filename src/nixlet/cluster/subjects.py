"""Whom a cluster's certificates are for: names, groups and addresses as Kubernetes' authorizers and clients expect them.

Kubernetes: "PKI certificates and requirements", and the users of its RBAC bootstrap policy; names of files are k3s's.
"""

import dataclasses
import ipaddress
from collections.abc import Collection

from nixlet.cluster.settings import Address, ClusterSettings

#: Who is an administrator of everything, whatever RBAC says.
MASTERS = "system:masters"

#: The group of nodes, and what their names as users begin with (Kubernetes: "Using Node Authorization").
NODES, _NODE = "system:nodes", "system:node:"

#: Who the API server is to kubelets. A role lets it in there: it needs no more than that.
API_SERVER_USER = "system:apiserver"

#: The one client whose word on who somebody is extension API servers take.
FRONT_PROXY = "system:auth-proxy"

_LOOPBACK = (ipaddress.IPv4Address("127.0.0.1"), ipaddress.IPv6Address("::1"))


@dataclasses.dataclass(frozen=True, slots=True)
class Subject:
    """What a certificate says.

    Attributes:
        common_name: The user's name, or what the server is.
        organizations: The user's groups.
        dns: Names that a server is reached by.
        addresses: Addresses that a server is reached at.
        client: It is shown by a client.
        server: It is shown by a server.
    """

    common_name: str
    organizations: tuple[str, ...] = ()
    dns: tuple[str, ...] = ()
    addresses: tuple[Address, ...] = ()
    client: bool = False
    server: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """All that a server is reached by, in order and each once."""
        return tuple(sorted({*self.dns, *map(str, self.addresses)}))


def user(name: str, *groups: str) -> Subject:
    """A user of the API."""
    return Subject(name, groups, client=True)


def api_server(settings: ClusterSettings) -> Subject:
    """What the API server shows: all that it is reached by, from the node, from pods, from elsewhere."""
    domain = settings.cluster_domain
    service = ("kubernetes", "kubernetes.default", "kubernetes.default.svc", f"kubernetes.default.svc.{domain}")
    more_dns, more_addresses = _divided(settings.tls_sans)
    advertised = () if settings.advertise_address is None else (settings.advertise_address,)
    return Subject(
        "kube-apiserver",
        dns=(*service, "localhost", settings.node_name, *more_dns),
        addresses=(*_LOOPBACK, *settings.node_ips, *advertised, *settings.kubernetes_addresses, *more_addresses),
        server=True,
    )


def kubelet_client(node_name: str) -> Subject:
    """A kubelet as a user: what the Node authorizer lets see what is the node's, and no more."""
    return user(f"{_NODE}{node_name}", NODES)


def node_of(user_name: str, groups: Collection[str]) -> str:
    """The node that is known as this user; empty: it is no node."""
    return user_name.removeprefix(_NODE) if user_name.startswith(_NODE) and NODES in groups else ""


def kubelet_serving(node_name: str, addresses: tuple[Address, ...]) -> Subject:
    """What a kubelet shows to the API server."""
    return Subject(node_name, dns=(node_name, "localhost"), addresses=(*_LOOPBACK, *addresses), server=True)


def kube_proxy() -> Subject:
    """A kube-proxy as a user."""
    return user("system:kube-proxy")


def etcd(settings: ClusterSettings, name: str) -> Subject:
    """A member of an etcd cluster, towards clients and other members: it is a client of theirs, too."""
    return Subject(
        name,
        # What kine shows on its socket is this one as well, and clients of a socket expect the socket's name.
        dns=("localhost", "kine.sock", settings.node_name),
        addresses=(*_LOOPBACK, *settings.node_ips),
        client=True,
        server=True,
    )


def _divided(names: tuple[str, ...]) -> tuple[list[str], list[Address]]:
    """Names, and those of them that are addresses."""
    dns, addresses = [], []
    for name in names:
        try:
            addresses.append(ipaddress.ip_address(name))
        except ValueError:
            # Clients compare in small letters.
            dns.append(name.lower())
    return dns, addresses
