"""flannel, which brings pods' packets to other nodes: its configuration, its arguments, and what it says of the network that it has made.

flannel's documentation: "Configuration", "Backends"; what it leaves on a machine is told in its sources (backend/vxlan, trafficmngr).
"""

import ipaddress
import json
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from nixlet import errors
from nixlet.cluster import arguments
from nixlet.cluster import settings as model
from nixlet.cluster.settings import ClusterSettings, Network

VXLAN, HOST_GW, NONE = "vxlan", "host-gw", "none"

#: The chains of the packet filter that it makes, and its tables where it works with nftables.
CHAINS = ("FLANNEL-POSTRTG", "FLANNEL-FWD")
TABLES = (("ip", "flannel-ipv4"), ("ip6", "flannel-ipv6"))

#: The number of its VXLAN where the configuration names none.
_NETWORK_IDENTIFIER = 1

#: The keys of the network of all pods, by IP version, as it writes them.
_NETWORKS = MappingProxyType({4: "Network", 6: "IPv6Network"})

_EXAMPLE = 'as in {"Network": "10.42.0.0/16", "Backend": {"Type": "vxlan"}}'

_MTU = re.compile(r"FLANNEL_MTU=([1-9][0-9]{2,4})")


class Configuration(msgspec.Struct, frozen=True):
    """What of flannel's configuration others have to know.

    Attributes:
        text: The file's.
        backend: ``VXLAN`` or ``HOST_GW``.
        interface: The interface that it makes; empty: none.
        nftables: It works with nftables.
        networks: The networks of all pods, one of each IP version.
    """

    text: str
    backend: str
    interface: str
    nftables: bool
    networks: tuple[Network, ...]


def configuration(settings: ClusterSettings, backend: str) -> Configuration:
    """The configuration for a cluster.

    Args:
        settings: The cluster.
        backend: ``VXLAN`` or ``HOST_GW``.
    """
    (network,) = settings.cluster_cidrs[:1]
    said: dict[str, Any] = {"Network": str(network)}
    if network.version == 6:
        said = {"EnableIPv4": False, "EnableIPv6": True, "IPv6Network": str(network)}
    return read(json.dumps({**said, "Backend": {"Type": backend}}, indent=2) + "\n", what="flannel's configuration")


def read(text: str, *, what: str) -> Configuration:
    """A configuration that is there.

    Args:
        text: JSON.
        what: What errors call it.

    Raises:
        InvalidArgumentError: It is none.
        UnsupportedError: It has another backend than ours.
    """
    try:
        said = _folded(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise errors.InvalidArgumentError(f"{what} is no JSON: {error}") from error
    chosen = _folded(said.get("backend"))
    if not isinstance(chosen.get("type"), str):
        raise errors.InvalidArgumentError(f"{what} names no backend", hint=_EXAMPLE)
    backend = chosen["type"].lower()
    if backend not in {VXLAN, HOST_GW}:
        raise errors.UnsupportedError(
            f"{what} has the backend {backend[:40]!r}, which nixlet doesn't know how to take away again",
            hint=f"use {VXLAN} or {HOST_GW}",
        )
    number = chosen.get("vni", _NETWORK_IDENTIFIER)
    if not isinstance(number, int) or isinstance(number, bool) or not 0 < number < 1 << 24:
        raise errors.InvalidArgumentError(f"{what}: VNI is no number from 1 to {(1 << 24) - 1}")
    networks = tuple(_networks(said, what))
    name = "flannel" if any(each.version == 4 for each in networks) else "flannel-v6"
    interface = f"{name}.{number}" if backend == VXLAN else ""
    return Configuration(text, backend, interface, said.get("enablenftables") is True, networks)


def _folded(said: object) -> dict[str, Any]:
    """An object of JSON by its keys as Go knows them, which takes them whatever the case of their letters is."""
    return {key.casefold(): value for key, value in said.items()} if isinstance(said, dict) else {}


def _networks(said: Mapping[str, Any], what: str) -> Iterator[Network]:
    for version, wanted in ((4, said.get("enableipv4") is not False), (6, said.get("enableipv6") is True)):
        if not wanted:
            continue
        key = _NETWORKS[version]
        text = str(said.get(key.casefold(), ""))
        try:
            yield (
                ipaddress.IPv4Network(text, strict=False) if version == 4 else ipaddress.IPv6Network(text, strict=False)
            )
        except ValueError as error:
            raise errors.InvalidArgumentError(
                f"{what}: {key} {text[:40]!r} is no network of IPv{version}", hint=_EXAMPLE
            ) from error


def check(found: Configuration, settings: ClusterSettings, *, what: str) -> None:
    """Check that a configuration is for a cluster's pods: flannel ends where a node's part isn't in its network, or where there is no such part.

    Args:
        found: The configuration.
        settings: The cluster.
        what: What the error calls it.

    Raises:
        InvalidArgumentError: It is for others.
    """
    for pods in settings.cluster_cidrs:
        if len(found.networks) != len(settings.cluster_cidrs) or not any(
            each.version == pods.version and each.supernet_of(pods)  # type: ignore[arg-type]
            for each in found.networks
        ):
            raise errors.InvalidArgumentError(
                f"{what} is for pods in {' and '.join(map(str, found.networks)) or 'no network'}, and the cluster's are in {pods}",
                hint=f"have it say {_NETWORKS[pods.version]}: {pods} and no other network, or leave it out",
            )


def flanneld(settings: ClusterSettings, file: str, subnet_file: str, interface: str) -> list[str]:
    """flannel's daemon.

    Args:
        settings: The cluster.
        file: Its configuration.
        subnet_file: Where it says what it has made (``mtu``).
        interface: The interface by which it reaches other nodes; empty: the one with the node's address.
    """
    address = settings.node_ip
    ours = {
        "kube-subnet-mgr": "true",
        # It is its node, as which it may write into no other one (admission plugin NodeRestriction).
        "kubeconfig-file": settings.layout.node("kubelet.kubeconfig"),
        "net-config-path": file,
        "subnet-file": subnet_file,
        # What pods send to each other keeps its sender, which the plugin that attaches them knows nothing of.
        "ip-masq": "true",
        "iface": interface or str(address),
        "healthz-ip": "127.0.0.1",
        "healthz-port": str(model.FLANNEL_HEALTH_PORT),
    }
    if not interface:
        ours["public-ip" if address.version == 4 else "public-ipv6"] = str(address)
    return arguments.merged(ours, ())


def mtu(subnet_file: str) -> int:
    """The largest packet that goes from node to node, by flannel's own word (bytes); 0: it hasn't said anything yet."""
    try:
        with open(subnet_file, encoding="utf-8", errors="replace") as file:
            found = _MTU.search(file.read(4096))
    except OSError:
        return 0
    return int(found[1]) if found else 0
