"""Whether settings make a cluster: told in words before anything is made of them."""

import dataclasses
import ipaddress
import re
import urllib.parse
from collections.abc import Iterable, Iterator

from nixlet import errors
from nixlet.cluster import arguments, names
from nixlet.cluster import settings as model
from nixlet.cluster.settings import ClusterSettings

#: Ports that other parts of a node have, and what they are.
_TAKEN = {
    model.KUBELET_PORT: "the kubelet's",
    model.KUBELET_HEALTH_PORT: "the kubelet's health",
    model.PROXY_HEALTH_PORT: "kube-proxy's health",
    model.PROXY_METRICS_PORT: "kube-proxy's metrics",
    model.CONTROLLERS_PORT: "the controller manager's",
    model.SCHEDULER_PORT: "the scheduler's",
    model.ETCD_CLIENT_PORT: "etcd's",
    model.ETCD_PEER_PORT: "etcd's",
    model.ETCD_METRICS_PORT: "etcd's metrics",
}

#: How long a network's prefix may be for services, by IP version: kube-apiserver's limits (at most 20 bits, at least 8 addresses).
_SERVICE_PREFIXES = {4: (12, 29), 6: (108, 125)}

#: The size of a node's part of the cluster's network, and of the largest network (kube-controller-manager's: 16 bits of nodes).
_NODE_PREFIXES = {4: 24, 6: 64}
_NODE_BITS = 16

#: What kine takes.
_KINE_SCHEMES = frozenset(("sqlite", "mysql", "postgres", "postgresql", "nats"))

#: Kubelets are called ``system:node:NAME`` in their certificates, where 64 characters are the limit (X.520, ub-common-name).
_MAX_NODE_NAME = 64 - len("system:node:")

_BROADCAST = ipaddress.IPv4Address("255.255.255.255")

#: No network of pods or services may be among these: Linux routes them otherwise or not at all.
_OTHERS = tuple(
    ipaddress.ip_network(text)
    for text in (
        "0.0.0.0/8",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "224.0.0.0/4",
        "240.0.0.0/4",
        "::/64",
        "::ffff:0:0/96",
        "fe80::/10",
        "ff00::/8",
    )
)

#: Arguments of one program that others have to know of: what says it to all of them.
_SAID_OTHERWISE = {
    ("etcd_args", "data-dir"): "have what is to keep the state mounted at server/db in the data directory",
    ("kube_apiserver_args", "secure-port"): "--https-listen-port says it to all of them",
    ("kube_apiserver_args", "etcd-servers"): "--datastore-endpoint says it to all of them",
    ("kube_apiserver_args", "service-cluster-ip-range"): "--service-cidr says it to all of them",
    ("kube_controller_manager_args", "service-cluster-ip-range"): "--service-cidr says it to all of them",
    ("kube_controller_manager_args", "cluster-cidr"): "--cluster-cidr says it to all of them",
    ("kubelet_args", "hostname-override"): "--node-name says it to all of them",
    ("kubelet_args", "node-ip"): "--node-ip says it to all of them",
    ("kube_proxy_args", "hostname-override"): "--node-name says it to all of them",
}

_ARGUMENT = re.compile(r"(?:--)?[A-Za-z0-9][-A-Za-z0-9_.]*[-+]?(?:=.*)?", re.DOTALL)


def node_name_problem(name: str) -> str:
    """Why a text can't be a node's name; empty: it can."""
    if not names.is_name(name):
        return "small letters, digits, - and . make a name, which begins and ends with a letter or digit"
    if len(name) > _MAX_NODE_NAME:
        return f"it has {len(name)} characters, and a kubelet's certificate has room for {_MAX_NODE_NAME}"
    return ""


def address_problem(address: model.Address) -> str:
    """What an address is in place of a node's; empty: other machines, and pods, may reach the node at it."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            return "an address with a zone"
        if address.ipv4_mapped is not None:
            return "an IPv4 address written as an IPv6 one"
    if address.is_loopback:
        return "a loopback address"
    if address.is_unspecified:
        return "no particular address"
    if address.is_multicast:
        return "a multicast address"
    if address.is_link_local:
        return "a link-local address"
    return "the broadcast address" if address == _BROADCAST else ""


def check(settings: ClusterSettings, *, joins: bool = False) -> None:
    """Check that settings make a cluster.

    Args:
        settings: These.
        joins: They are those of a node that doesn't know yet which networks its cluster has.

    Raises:
        InvalidArgumentError: They don't; the sentence names the first thing that is wrong, and never holds a secret.
    """
    for problem in _problems(settings, joins=joins):
        raise problem


def check_arguments(settings: ClusterSettings) -> None:
    """Check what a person adds to the programs' arguments, of a kubelet without a cluster, too.

    Raises:
        InvalidArgumentError: One is none.
    """
    for problem in _extra(settings):
        raise problem


def _problems(settings: ClusterSettings, *, joins: bool) -> Iterator[errors.InvalidArgumentError]:
    yield from _names(settings)
    yield from _node_addresses(settings)
    if not joins:
        yield from _networks(settings)
        yield from _dns(settings)
        yield from _ports(settings)
        yield from _datastore(settings)
    yield from _extra(settings)


def _names(settings: ClusterSettings) -> Iterator[errors.InvalidArgumentError]:
    name, domain = settings.node_name, settings.cluster_domain
    if problem := node_name_problem(name):
        lower = name.lower().replace("_", "-")
        hint = f"--node-name {lower}" if not node_name_problem(lower) else "--node-name gives it another one"
        yield errors.InvalidArgumentError(f"{name!r} can't be a node's name: {problem}", hint=hint)
    if not names.is_name(domain):
        yield errors.InvalidArgumentError(
            f"the cluster domain {domain!r} is no domain name", hint="such as cluster.local"
        )
    for san in settings.tls_sans:
        if not _is_address(san) and not names.is_name(san.removeprefix("*.").lower()):
            yield errors.InvalidArgumentError(f"tls-san {san!r} is neither a name nor an address")


def _is_address(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    # Certificates have no room for a zone, and no client asks for an IPv4 address in IPv6's form.
    return isinstance(address, ipaddress.IPv4Address) or (address.scope_id is None and address.ipv4_mapped is None)


def _node_addresses(settings: ClusterSettings) -> Iterator[errors.InvalidArgumentError]:
    if not settings.node_ips:
        yield errors.InvalidArgumentError("the node has no address", hint="--node-ip names one")
    yield from _one_of_each(settings.node_ips, "node-ip")
    advertised = () if settings.advertise_address is None else (settings.advertise_address,)
    for address in settings.node_ips + advertised:
        if problem := address_problem(address):
            hint = "name an address of the machine that other machines, and its pods, can reach"
            yield errors.InvalidArgumentError(f"the node's address {address} is {problem}", hint=hint)


def _one_of_each(items: Iterable[model.Address | model.Network], what: str) -> Iterator[errors.InvalidArgumentError]:
    versions = [item.version for item in items]
    if len(versions) != len(set(versions)):
        yield errors.InvalidArgumentError(f"{what} names more than one of the same IP version")


def _networks(settings: ClusterSettings) -> Iterator[errors.InvalidArgumentError]:
    pods, services = settings.cluster_cidrs, settings.service_cidrs
    for what, found in (("cluster-cidr", pods), ("service-cidr", services)):
        if not found:
            yield errors.InvalidArgumentError(f"{what} names no network")
        yield from _one_of_each(found, what)
    if {network.version for network in pods} != {network.version for network in services}:
        yield errors.InvalidArgumentError("cluster-cidr and service-cidr are not of the same IP versions")
    if missing := {network.version for network in pods} - {address.version for address in settings.node_ips}:
        yield errors.InvalidArgumentError(
            f"cluster-cidr has a network of IPv{min(missing)}, and the node no such address"
        )
    yield from _first(settings)
    for what, found in (("cluster-cidr", pods), ("service-cidr", services)):
        for network in found:
            if any(network.version == other.version and network.overlaps(other) for other in _OTHERS):
                yield errors.InvalidArgumentError(f"{what} {network} has addresses in it that are not for networks")
    yield from _sizes(settings)
    yield from _overlaps(settings)


def _first(settings: ClusterSettings) -> Iterator[errors.InvalidArgumentError]:
    """The API server's own address is of the IP version of the services' first network, which pods have to have as well."""
    version = settings.service_cidrs[0].version
    advertised = settings.advertise_address or settings.node_ip
    for what, item in (
        ("cluster-cidr", settings.cluster_cidrs[0]),
        ("node-ip", settings.node_ip),
        ("advertise-address", advertised),
    ):
        if item.version != version:
            yield errors.InvalidArgumentError(
                f"{what} begins with IPv{item.version}, and service-cidr with IPv{version}",
                hint="name addresses and networks of the same IP version first",
            )


def _sizes(settings: ClusterSettings) -> Iterator[errors.InvalidArgumentError]:
    for network in settings.cluster_cidrs:
        longest = _NODE_PREFIXES[network.version]
        if not longest - _NODE_BITS <= network.prefixlen <= longest:
            yield errors.InvalidArgumentError(
                f"cluster-cidr {network} can't be divided among nodes: its prefix must be /{longest - _NODE_BITS} to /{longest}"
            )
    for network in settings.service_cidrs:
        shortest, longest = _SERVICE_PREFIXES[network.version]
        if not shortest <= network.prefixlen <= longest:
            yield errors.InvalidArgumentError(f"service-cidr {network} must have a prefix of /{shortest} to /{longest}")


def _overlaps(settings: ClusterSettings) -> Iterator[errors.InvalidArgumentError]:
    pods, services = settings.cluster_cidrs, settings.service_cidrs
    for network in pods:
        for other in services:
            # (networks of different versions never overlap, and can't be asked)
            if network.version == other.version and network.overlaps(other):
                yield errors.InvalidArgumentError(f"cluster-cidr {network} and service-cidr {other} overlap")
    advertised = () if settings.advertise_address is None else (settings.advertise_address,)
    for address in settings.node_ips + advertised:
        for network in (*pods, *services):
            if address in network:
                what = "cluster-cidr" if network in pods else "service-cidr"
                yield errors.InvalidArgumentError(f"the node's address {address} lies in {what} {network}")


def _dns(settings: ClusterSettings) -> Iterator[errors.InvalidArgumentError]:
    if not settings.dns_addresses:
        yield errors.InvalidArgumentError(
            f"service-cidr {settings.service_cidrs[0]} has no tenth address for the DNS service",
            hint="--cluster-dns names one",
        )
    for address in settings.dns_addresses:
        if not any(address in network for network in settings.service_cidrs):
            shown = ", ".join(str(network) for network in settings.service_cidrs)
            yield errors.InvalidArgumentError(f"cluster-dns {address} lies outside of service-cidr {shown}")
        elif address in settings.kubernetes_addresses or any(address == net[0] for net in settings.service_cidrs):
            yield errors.InvalidArgumentError(
                f"cluster-dns {address} is taken: the first address is the service kubernetes"
            )
        elif any(address == network[-1] and network.version == 4 for network in settings.service_cidrs):
            yield errors.InvalidArgumentError(
                f"cluster-dns {address} is no service's: the last address is not given out"
            )
    yield from _one_of_each(settings.dns_addresses, "cluster-dns")


def _ports(settings: ClusterSettings) -> Iterator[errors.InvalidArgumentError]:
    port = settings.https_listen_port
    if not 0 < port < 1 << 16:
        yield errors.InvalidArgumentError(f"https-listen-port {port} is no port")
    elif port in _TAKEN:
        yield errors.InvalidArgumentError(f"https-listen-port {port} is {_TAKEN[port]}")
    elif settings.joining_port in _TAKEN or settings.joining_port >= 1 << 16:
        whose = _TAKEN.get(settings.joining_port, "none")
        yield errors.InvalidArgumentError(
            f"https-listen-port {port}: nodes join at the port above, and {settings.joining_port} is {whose}"
        )
    given = settings.service_node_port_range
    match = re.fullmatch(r"([0-9]{1,5})-([0-9]{1,5})", given)
    if match is None or not 0 < int(match[1]) <= int(match[2]) < 1 << 16:
        yield errors.InvalidArgumentError(
            f"service-node-port-range {given!r} is no range of ports", hint="such as 30000-32767"
        )
        return
    first, last = int(match[1]), int(match[2])
    ours = ((port, "the API server's"), (settings.joining_port, "where nodes join"))
    for taken, whose in (*ours, *_TAKEN.items()):
        if first <= taken <= last:
            yield errors.InvalidArgumentError(
                f"service-node-port-range {given} has port {taken} in it, which is {whose}"
            )


def _datastore(settings: ClusterSettings) -> Iterator[errors.InvalidArgumentError]:
    endpoint, files = settings.datastore_endpoint, (settings.datastore_certfile, settings.datastore_keyfile)
    if endpoint and settings.embedded_etcd:
        yield errors.InvalidArgumentError("a cluster has either its own etcd or a datastore-endpoint, not both")
    if endpoint and model.scheme(endpoint) not in _KINE_SCHEMES | model.ETCD_SCHEMES:
        known = ", ".join(f"{each}://" for each in sorted(_KINE_SCHEMES | model.ETCD_SCHEMES))
        # The endpoint itself isn't shown, nor what may be its scheme: without one it may be a password and no more.
        yield errors.InvalidArgumentError(
            "the datastore-endpoint is of no kind that is known", hint=f"it begins with one of {known}"
        )
    if settings.datastore_is_etcd:
        for part in endpoint.split(","):
            if not _is_etcd_url(part):
                yield errors.InvalidArgumentError(
                    "the datastore-endpoint must be etcd servers' URLs, separated by commas, without users"
                )
    if any(files) != all(files):
        yield errors.InvalidArgumentError(
            "datastore-certfile and datastore-keyfile belong together: one of them is missing"
        )
    if settings.proxy_mode not in {"iptables", "nftables"}:
        yield errors.InvalidArgumentError(
            f"kube-proxy has no mode {settings.proxy_mode!r}", hint="use iptables or nftables"
        )


def _is_etcd_url(text: str) -> bool:
    # Errors about a URL tell what is in it: no cause may go on from here.
    try:
        url = urllib.parse.urlsplit(text)
        # (the port is looked at when it is asked for)
        named = bool(url.hostname) and url.username is None and url.password is None and url.port != 0
    except ValueError:
        return False
    plain = text.isascii() and text.isprintable() and " " not in text
    return (
        plain
        and named
        and url.scheme in model.ETCD_SCHEMES
        and url.path in {"", "/"}
        and not (url.query or url.fragment)
    )


def _serving(settings: ClusterSettings) -> Iterator[errors.InvalidArgumentError]:
    """The API server may listen at more addresses than the node's, and has to at that one."""
    said = arguments.last({}, settings.kube_apiserver_args).get("bind-address")
    if said is None:
        return
    try:
        address = ipaddress.ip_address(said)
    except ValueError:
        yield errors.InvalidArgumentError(f"--kube-apiserver-arg bind-address: {said!r} is no IP address")
        return
    if not address.is_unspecified and address != settings.node_ip:
        yield errors.InvalidArgumentError(
            f"--kube-apiserver-arg bind-address {said}: the node's programs reach the API server at {settings.node_ip}",
            hint="name 0.0.0.0 for all addresses, or that one; --node-ip says another one to all of them",
        )


def _extra(settings: ClusterSettings) -> Iterator[errors.InvalidArgumentError]:
    for field in dataclasses.fields(settings):
        if not field.name.endswith("_args"):
            continue
        flag = field.name.removesuffix("s").replace("_", "-")
        for number, argument in enumerate(getattr(settings, field.name), 1):
            if not _ARGUMENT.fullmatch(argument) or "\0" in argument:
                # What stands there may be a secret that lost its key.
                yield errors.InvalidArgumentError(
                    f"--{flag} number {number} is no argument", hint="write it as key=value"
                )
                continue
            key = argument.removeprefix("--").partition("=")[0].rstrip("+-")
            if hint := _SAID_OTHERWISE.get((field.name, key)):
                yield errors.InvalidArgumentError(
                    f"--{flag} {key}: other programs of the node have to know it, too", hint=hint
                )
    yield from _serving(settings)
    yield from names.label_problems(settings.node_labels)
    yield from names.taint_problems(settings.node_taints)
