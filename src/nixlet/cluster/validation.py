"""Whether settings make a cluster: told in words before anything is made of them."""

import dataclasses
import ipaddress
import re
import urllib.parse
from collections.abc import Iterable, Iterator

from nixlet import errors
from nixlet.cluster import settings as model
from nixlet.cluster.settings import ClusterSettings

#: Ports that other parts of a node have, and what they are.
_TAKEN = {
    model.KUBELET_PORT: "the kubelet's",
    model.KUBELET_HEALTH_PORT: "the kubelet's health",
    model.PROXY_HEALTH_PORT: "kube-proxy's health",
    model.PROXY_METRICS_PORT: "kube-proxy's metrics",
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

_LABEL = r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?"
_SUBDOMAIN = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_MAX_NAME = 253

#: Kubelets are called ``system:node:NAME`` in their certificates, where 64 characters are the limit (X.520, ub-common-name).
_MAX_NODE_NAME = 64 - len("system:node:")

_ARGUMENT = re.compile(r"(?:--)?[A-Za-z0-9][-A-Za-z0-9_.]*[-+]?(?:=.*)?", re.DOTALL)


def is_name(text: str) -> bool:
    """Whether a text is a DNS subdomain in Kubernetes' sense (RFC 1123, small letters)."""
    return len(text) <= _MAX_NAME and _SUBDOMAIN.fullmatch(text) is not None


def check(settings: ClusterSettings) -> None:
    """Check that settings make a cluster.

    Raises:
        InvalidArgumentError: They don't; the sentence names the first thing that is wrong, and never holds a secret.
    """
    for problem in _problems(settings):
        raise problem


def _problems(settings: ClusterSettings) -> Iterator[errors.InvalidArgumentError]:
    yield from _names(settings)
    yield from _node_addresses(settings)
    yield from _networks(settings)
    yield from _dns(settings)
    yield from _ports(settings)
    yield from _datastore(settings)
    yield from _extra(settings)


def _names(settings: ClusterSettings) -> Iterator[errors.InvalidArgumentError]:
    name, domain = settings.node_name, settings.cluster_domain
    if not is_name(name):
        lower = name.lower().replace("_", "-")
        hint = f"--node-name {lower}" if is_name(lower) else "--node-name gives it another one"
        problem = "small letters, digits, - and . make a name, which begins and ends with a letter or digit"
        yield errors.InvalidArgumentError(f"{name!r} can't be a node's name: {problem}", hint=hint)
    elif len(name) > _MAX_NODE_NAME:
        problem = f"it has {len(name)} characters, and a kubelet's certificate has room for {_MAX_NODE_NAME}"
        yield errors.InvalidArgumentError(
            f"{name!r} can't be a node's name: {problem}", hint="--node-name gives it another one"
        )
    if not is_name(domain):
        yield errors.InvalidArgumentError(
            f"the cluster domain {domain!r} is no domain name", hint="such as cluster.local"
        )
    for san in settings.tls_sans:
        if not _is_address(san) and not is_name(san.removeprefix("*.").lower()):
            yield errors.InvalidArgumentError(f"tls-san {san!r} is neither a name nor an address")


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _node_addresses(settings: ClusterSettings) -> Iterator[errors.InvalidArgumentError]:
    if not settings.node_ips:
        yield errors.InvalidArgumentError("the node has no address", hint="--node-ip names one")
    yield from _one_of_each(settings.node_ips, "node-ip")
    advertised = () if settings.advertise_address is None else (settings.advertise_address,)
    for address in settings.node_ips + advertised:
        if address.is_loopback or address.is_unspecified or address.is_multicast:
            kind = "a loopback" if address.is_loopback else "a multicast" if address.is_multicast else "no particular"
            hint = "name an address of the machine that other machines, and its pods, can reach"
            yield errors.InvalidArgumentError(f"the node's address {address} is {kind} address", hint=hint)


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
    yield from _sizes(settings)
    yield from _overlaps(settings)


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
    for address in settings.node_ips:
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
    yield from _one_of_each(settings.dns_addresses, "cluster-dns")


def _ports(settings: ClusterSettings) -> Iterator[errors.InvalidArgumentError]:
    port = settings.https_listen_port
    if not 0 < port < 1 << 16:
        yield errors.InvalidArgumentError(f"https-listen-port {port} is no port")
    elif port in _TAKEN:
        yield errors.InvalidArgumentError(f"https-listen-port {port} is {_TAKEN[port]}")
    given = settings.service_node_port_range
    match = re.fullmatch(r"(\d{1,5})-(\d{1,5})", given)
    if match is None or not 0 < int(match[1]) <= int(match[2]) < 1 << 16:
        yield errors.InvalidArgumentError(
            f"service-node-port-range {given!r} is no range of ports", hint="such as 30000-32767"
        )
        return
    first, last = int(match[1]), int(match[2])
    for taken, whose in ((port, "the API server's"), *_TAKEN.items()):
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
            url = urllib.parse.urlsplit(part)
            if (
                url.scheme not in model.ETCD_SCHEMES
                or not url.hostname
                or url.username is not None
                or url.password is not None
            ):
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
    for label in settings.node_labels:
        if not label.partition("=")[0] or "," in label:
            yield errors.InvalidArgumentError(f"node-label {label!r} is no label", hint="write it as key=value")
    for text in settings.node_taints:
        model.taint(text)
