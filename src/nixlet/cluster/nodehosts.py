"""The names of a cluster's nodes for its DNS: a hosts file in CoreDNS's ConfigMap, under k3s's key ``NodeHosts``.

A line is an address, a node's name, and a mark by which we know our own lines again; CoreDNS passes over what stands behind ``#``
(plugin "hosts"). All other lines are people's, and stay.
"""

import ipaddress
from collections.abc import Mapping, Sequence

import msgspec

from nixlet.cluster.settings import Address

#: The key of the ConfigMap, and the file's name.
KEY = "NodeHosts"

_MARK = "# node"

#: Kinds of addresses in a Node's status (core/v1 NodeAddressType).
_INTERNAL = "InternalIP"


class _Address(msgspec.Struct):
    type: str = ""
    address: str = ""


class _Status(msgspec.Struct):
    addresses: list[_Address] | None = None


class _Node(msgspec.Struct):
    status: _Status = msgspec.field(default_factory=_Status)


def addresses(node: Mapping[str, object]) -> tuple[Address, ...]:
    """Where a node is within its cluster: its first address of each IP version, by its Node object.

    Raises:
        msgspec.ValidationError: It is none.
    """
    found: dict[int, Address] = {}
    for each in msgspec.convert(node, type=_Node).status.addresses or ():
        if each.type == _INTERNAL:
            address = _parsed(each.address)
            if address is not None:
                found.setdefault(address.version, address)
    return tuple(found.values())


def _parsed(text: str) -> Address | None:
    """None: a kubelet said what is no address."""
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def with_nodes(text: str, nodes: Mapping[str, Sequence[Address]]) -> str:
    """A hosts file with these nodes and no other ones, and with all that people have written there.

    Args:
        text: The file as it is.
        nodes: The nodes' addresses, by name.
    """
    kept = [line for line in text.splitlines() if line.strip() and not _is_node(line, nodes)]
    ours = [f"{address} {name} {_MARK}" for name in sorted(nodes) for address in nodes[name]]
    return "".join(f"{line}\n" for line in (*kept, *ours))


def _is_node(line: str, nodes: Mapping[str, object]) -> bool:
    """Whether a line is for a node alone: one of ours, or such as k3s writes."""
    return line.rstrip().endswith(f" {_MARK}") or _alone(line.split()) in nodes


def _alone(fields: Sequence[str]) -> str | None:
    return fields[1] if len(fields) == 2 else None
