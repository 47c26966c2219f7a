"""What a person decides about a cluster, checked as a whole before anything is made of it."""

import dataclasses
import ipaddress

from nixlet import errors
from nixlet.cluster.layout import Layout

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

#: Where kubelets serve, and where the programs answer for their health on loopback (Kubernetes' defaults).
KUBELET_PORT, KUBELET_HEALTH_PORT = 10250, 10248
PROXY_HEALTH_PORT, PROXY_METRICS_PORT = 10256, 10249
FLANNEL_HEALTH_PORT = 10247
CONTROLLERS_PORT, SCHEDULER_PORT = 10257, 10259
ETCD_CLIENT_PORT, ETCD_PEER_PORT, ETCD_METRICS_PORT = 2379, 2380, 2381

#: How much further up than the API server's port a server lets nodes in.
JOINING_ABOVE = 1

#: The place of the DNS service in the services' network, as k3s has it.
_DNS_PLACE = 10

#: The datastore-endpoint that is ours all the same: kine's file in the data directory.
OWN_SQLITE = "sqlite://"

#: The schemes of etcd servers that somebody else runs.
ETCD_SCHEMES = frozenset(("http", "https"))


@dataclasses.dataclass(frozen=True, slots=True)
class ClusterSettings:
    """A cluster as one of its nodes sees it. Names and defaults are those of k3s's flags, where it has one.

    Attributes:
        data_dir: The node's data directory; ``server/`` and ``agent/`` in it are the cluster's.
        state_dir: The node's state directory, for sockets.
        node_name: The Node object's name.
        node_ips: The node's addresses, at most one of each IP version; the first is the one that things listen at.
        cluster_cidrs: The networks of pods, at most one of each IP version.
        service_cidrs: The networks of services, of the same versions.
        cluster_dns: The DNS service's addresses; empty: the tenth of each services' network.
        cluster_domain: The domain of services' names.
        tls_sans: More names and addresses for the API server's certificate.
        https_listen_port: Where the API server listens.
        advertise_address: Where others reach the API server; empty: the node's first address.
        service_node_port_range: Ports of NodePort services, as ``FIRST-LAST``.
        datastore_endpoint: Where the cluster's state is: empty for sqlite through kine; else what kine takes (may hold a password:
            it is never shown), or etcd servers.
        datastore_cafile: The certificate authority of etcd servers.
        datastore_certfile: The certificate that we show them.
        datastore_keyfile: The key of that.
        embedded_etcd: Run etcd as the datastore.
        is_only_server: That etcd is for this server alone.
        is_standalone: There is no cluster, but a kubelet alone, which asks nobody and serves nobody.
        secrets_encryption: Secrets are encrypted in the datastore.
        proxy_mode: How kube-proxy works: ``iptables`` or ``nftables``.
        node_labels: Labels that the node registers with, as ``KEY=VALUE``.
        node_taints: Taints that the node registers with, as ``KEY=VALUE:EFFECT``.
        etcd_args: More arguments, as in ``arguments.merged``; the following are such for the programs that they are named after.
        kubelet_files: What a person's files of the kubelet's configuration say of where it listens, as arguments, which count more than those.
    """

    data_dir: str
    state_dir: str
    node_name: str
    node_ips: tuple[Address, ...]
    cluster_cidrs: tuple[Network, ...] = (ipaddress.IPv4Network("10.42.0.0/16"),)
    service_cidrs: tuple[Network, ...] = (ipaddress.IPv4Network("10.43.0.0/16"),)
    cluster_dns: tuple[Address, ...] = ()
    cluster_domain: str = "cluster.local"
    tls_sans: tuple[str, ...] = ()
    https_listen_port: int = 6443
    advertise_address: Address | None = None
    service_node_port_range: str = "30000-32767"
    datastore_endpoint: str = dataclasses.field(default="", repr=False)
    datastore_cafile: str = ""
    datastore_certfile: str = ""
    datastore_keyfile: str = ""
    embedded_etcd: bool = False
    is_only_server: bool = False
    is_standalone: bool = False
    secrets_encryption: bool = False
    proxy_mode: str = "iptables"
    node_labels: tuple[str, ...] = ()
    node_taints: tuple[str, ...] = ()
    etcd_args: tuple[str, ...] = ()
    kube_apiserver_args: tuple[str, ...] = ()
    kube_controller_manager_args: tuple[str, ...] = ()
    kube_scheduler_args: tuple[str, ...] = ()
    kubelet_args: tuple[str, ...] = ()
    kube_proxy_args: tuple[str, ...] = ()
    kubelet_files: tuple[str, ...] = ()

    @property
    def layout(self) -> Layout:
        """Where its files are."""
        return Layout(self.data_dir, self.state_dir)

    @property
    def node_ip(self) -> Address:
        """The address that the node's programs listen at."""
        return self.node_ips[0]

    @property
    def dns_addresses(self) -> tuple[Address, ...]:
        """Where the cluster's DNS answers."""
        return self.cluster_dns or tuple(
            network[_DNS_PLACE] for network in self.service_cidrs if network.num_addresses > _DNS_PLACE
        )

    @property
    def kubernetes_addresses(self) -> tuple[Address, ...]:
        """The addresses of the service ``kubernetes``: the first of each services' network."""
        return tuple(network[1] for network in self.service_cidrs)

    @property
    def server_url(self) -> str:
        """The API server, for what runs on this node."""
        return f"https://{bracketed(self.node_ip)}:{self.https_listen_port}"

    @property
    def joining_port(self) -> int:
        """Where a server lets nodes in."""
        return self.https_listen_port + JOINING_ABOVE

    @property
    def shares_datastore(self) -> bool:
        """Other servers may be at the same datastore: of controllers and schedulers one at a time may be at work."""
        return (self.embedded_etcd and not self.is_only_server) or self.datastore_is_elsewhere

    @property
    def datastore_is_elsewhere(self) -> bool:
        """The cluster's state is where a person says, and not in the data directory."""
        return self.datastore_endpoint not in {"", OWN_SQLITE}

    @property
    def datastore_is_etcd(self) -> bool:
        """The datastore is an etcd that somebody else runs."""
        return scheme(self.datastore_endpoint) in ETCD_SCHEMES


def bracketed(address: Address) -> str:
    """An address as it stands in front of a port."""
    return f"[{address}]" if address.version == 6 else str(address)


def scheme(endpoint: str) -> str:
    """What an endpoint is, by what stands before its ``://``."""
    return endpoint.partition("://")[0] if "://" in endpoint else ""


def addresses(text: str, *, what: str) -> tuple[Address, ...]:
    """Addresses, separated by commas.

    Raises:
        InvalidArgumentError: One is none.
    """
    found = []
    for part in _parts(text):
        try:
            address = ipaddress.ip_address(part)
        except ValueError as error:
            raise errors.InvalidArgumentError(f"{what} {part!r} is no IP address") from error
        if "%" in part:
            raise errors.InvalidArgumentError(f"{what} {part!r} has a zone, which other machines know nothing of")
        found.append(address)
    return tuple(found)


def networks(text: str, *, what: str) -> tuple[Network, ...]:
    """Networks in CIDR notation, separated by commas.

    Raises:
        InvalidArgumentError: One is none, or has bits set beyond its prefix.
    """
    found = []
    for part in _parts(text):
        try:
            network = ipaddress.ip_network(part, strict=False)
        except ValueError as error:
            raise errors.InvalidArgumentError(f"{what} {part!r} is no network", hint="such as 10.42.0.0/16") from error
        if "/" not in part or str(network.network_address) != str(ipaddress.ip_address(part.partition("/")[0])):
            raise errors.InvalidArgumentError(
                f"{what} {part!r} is an address and no network", hint=f"did you mean {network}?"
            )
        found.append(network)
    return tuple(found)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def taint(text: str) -> dict[str, str]:
    """A taint of the form ``KEY[=VALUE]:EFFECT``, as a kubelet's configuration has it.

    Raises:
        InvalidArgumentError: It has another form, or no such effect.
    """
    body, _, effect = text.rpartition(":")
    key, _, value = body.partition("=")
    if not key or effect not in {"NoSchedule", "PreferNoSchedule", "NoExecute"}:
        raise errors.InvalidArgumentError(
            f"node-taint {text!r} is no taint", hint="write it as key=value:NoSchedule, :PreferNoSchedule or :NoExecute"
        )
    return {"key": key, "value": value, "effect": effect} if value else {"key": key, "effect": effect}
