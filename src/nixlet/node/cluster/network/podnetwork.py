"""The network of a node's pods in a cluster: the part of the cluster's that the node was given, learned once and remembered."""

import asyncio
import ipaddress
import logging
import os
from collections.abc import Awaitable, Callable

import msgspec

from nixlet import errors
from nixlet.cluster.layout import Layout
from nixlet.encoding import unreadable
from nixlet.host import files, network
from nixlet.kubeclient import resources
from nixlet.kubeclient.asynchronous import AsyncClient

#: Seconds between two looks at the Node object that has no network yet, and at one that has.
_PAUSE, _LATER = 0.1, 30.0

#: Seconds without a network after which somebody is told what the node waits for: others give it one in a second.
_PATIENCE = 15.0

_log = logging.getLogger("nixlet.cluster")


class _Remembered(msgspec.Struct, frozen=True):
    """What the node was given, and as whom.

    Attributes:
        node: The node's name.
        pod_cidr: The network.
        routed_mtu: The largest packet (bytes) where flannel brings packets to other nodes; 0: it doesn't.
        later: The network that it was given since then, when pods had addresses already; empty: none.
    """

    node: str
    pod_cidr: str
    routed_mtu: int = 0
    later: str = ""


def memory(layout: Layout) -> str:
    """The file by which it is remembered."""
    return os.path.join(layout.agent, "pod-network.json")


def remembered(layout: Layout) -> str:
    """The network that the node's pods had last; empty: none yet.

    Raises:
        FailedPreconditionError: It can't be read.
    """
    known = _read(layout)
    return "" if known is None else known.pod_cidr


def to_use(layout: Layout, bridge: str) -> str:
    """The network that the node's pods are to have: the one that they had, or, where none is there any more, the one that the node was given since.

    A node that was given another name, for instance, or was removed from its cluster and came back, is given another one.

    Args:
        layout: Where things are.
        bridge: The bridge of the node's pods.

    Raises:
        FailedPreconditionError: It can't be read.
    """
    known = _read(layout)
    if known is None:
        return ""
    return known.later if known.later and not network.bridge_members(bridge) else known.pod_cidr


def remembered_mtu(layout: Layout) -> int:
    """The largest packet that goes to other nodes' pods by flannel (bytes); 0: nothing of ours brings any there.

    Raises:
        FailedPreconditionError: It can't be read.
    """
    known = _read(layout)
    return 0 if known is None else known.routed_mtu


def remember_mtu(layout: Layout, routed_mtu: int) -> None:
    """Have it remembered, where a network is.

    Raises:
        NixletError: The file can't be read or written.
    """
    if (known := _read(layout)) is not None:
        _write(layout, msgspec.structs.replace(known, routed_mtu=routed_mtu))


def _write(layout: Layout, known: _Remembered) -> None:
    files.write_atomically(memory(layout), msgspec.json.encode(known), mode=0o600)


def _read(layout: Layout) -> _Remembered | None:
    path = memory(layout)
    try:
        with open(path, "rb") as file:
            found = msgspec.json.decode(file.read(), type=_Remembered)
        later = str(ipaddress.ip_network(found.later)) if found.later else ""
        return msgspec.structs.replace(found, pod_cidr=str(ipaddress.ip_network(found.pod_cidr)), later=later)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise files.refused(f"{path} can't be read", error) from error
    except (*unreadable.JSON, ValueError) as error:
        raise errors.FailedPreconditionError(
            f"{path} doesn't say what the network of this node's pods is: {error}",
            hint="remove the file: the cluster knows it",
        ) from error


async def keep(
    layout: Layout,
    node: str,
    there: str,
    client: AsyncClient,
    routed: Callable[[], Awaitable[int]],
    have: Callable[[str, int], None],
    first: asyncio.Event,
) -> None:
    """Have the network of pods that the cluster gives a node, now and for as long as this runs.

    Args:
        layout: Where things are.
        node: The node's name.
        there: The network that its pods have; empty: none yet.
        client: Asks the API server.
        routed: Gives, when the node has been given its first network, the largest packet that flannel brings to other nodes (bytes); 0: it doesn't.
        have: Makes the network of a range, with that.
        first: Is set when there is one.
    """
    told, later = "", ""
    if there:
        first.set()
    late = asyncio.get_running_loop().time() + _PATIENCE
    while True:
        missing, hint = "", ""
        try:
            found = _given(await client.get(resources.NODES, node))
            told = "" if found else told
            if not found:
                missing = f"the cluster has given the node {node} no network for its pods yet"
                hint = "kube-controller-manager gives them, where it runs with --allocate-node-cidrs"
            elif not there:
                mtu = await routed()
                # Written down first: what pods have of it must be known again.
                _write(layout, _Remembered(node, found, mtu))
                have(found, mtu)
                _log.info("pods of this node get addresses of %s", found)
                there = found
                first.set()
            else:
                _write(layout, _Remembered(node, there, remembered_mtu(layout), found if found != there else ""))
                if found not in {there, later}:
                    _log.warning(
                        "pods of this node have addresses of %s, and the cluster has given it %s since",
                        there,
                        found,
                        extra={"hint": "drain the node and start it anew: it takes the other one when no pod is there"},
                    )
                    later = found
        except errors.NotFoundError:
            missing = f"the cluster doesn't know the node {node} yet, which its kubelet tells it of"
            hint = f"see {layout.agent}/logs/kubelet.log"
        except errors.NixletError as error:
            if error.message != told:
                what = f"whether pods of this node are to get others than those of {there} isn't known"
                what = what if there else "the network of this node's pods can't be had yet"
                _log.warning("%s: %s", what, error, extra={"hint": error.hint})
            told = error.message
        if missing and not there and missing != told and asyncio.get_running_loop().time() > late:
            _log.warning("pods have no addresses, and the node isn't ready: %s", missing, extra={"hint": hint})
            told = missing
        await asyncio.sleep(_LATER if there else _PAUSE)


def _given(node: dict[str, object]) -> str:
    spec = node.get("spec")
    cidr = spec.get("podCIDR") if isinstance(spec, dict) else None
    try:
        return str(ipaddress.ip_network(cidr)) if isinstance(cidr, str) and cidr else ""
    except ValueError as error:
        raise errors.UnavailableError(f"the API server says {cidr!r} is a network") from error
