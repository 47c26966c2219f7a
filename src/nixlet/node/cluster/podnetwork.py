"""The network of a node's pods in a cluster: the part of the cluster's that the node was given, learned once and remembered."""

import asyncio
import ipaddress
import logging
import os
from collections.abc import Awaitable, Callable

import msgspec

from nixlet import errors
from nixlet.encoding import unreadable
from nixlet.host import files
from nixlet.kubeclient import resources
from nixlet.kubeclient.asynchronous import AsyncClient
from nixlet.node.settings import config as node_config

#: Seconds between two looks at the Node object that has no network yet, and at one that has.
_PAUSE, _LATER = 0.1, 30.0

_log = logging.getLogger("nixlet.cluster")


class _Remembered(msgspec.Struct, frozen=True):
    """What the node was given, and as whom.

    Attributes:
        node: The node's name.
        pod_cidr: The network.
        routed_mtu: The largest packet (bytes) where flannel brings packets to other nodes; 0: it doesn't.
    """

    node: str
    pod_cidr: str
    routed_mtu: int = 0


def memory(layout: node_config.Layout) -> str:
    """The file by which it is remembered."""
    return os.path.join(layout.agent, "pod-network.json")


def remembered(layout: node_config.Layout) -> str:
    """The network that the node was given last; empty: none yet.

    Raises:
        FailedPreconditionError: It can't be read.
    """
    known = _read(layout)
    return "" if known is None else known.pod_cidr


def remembered_mtu(layout: node_config.Layout) -> int:
    """The largest packet that goes to other nodes' pods by flannel (bytes); 0: nothing of ours brings any there.

    Raises:
        FailedPreconditionError: It can't be read.
    """
    known = _read(layout)
    return 0 if known is None else known.routed_mtu


def remember_mtu(layout: node_config.Layout, routed_mtu: int) -> None:
    """Have it remembered, where a network is.

    Raises:
        NixletError: The file can't be read or written.
    """
    if (known := _read(layout)) is not None:
        _write(layout, msgspec.structs.replace(known, routed_mtu=routed_mtu))


def _write(layout: node_config.Layout, known: _Remembered) -> None:
    files.write_atomically(memory(layout), msgspec.json.encode(known), mode=0o600)


def _read(layout: node_config.Layout) -> _Remembered | None:
    path = memory(layout)
    try:
        with open(path, "rb") as file:
            found = msgspec.json.decode(file.read(), type=_Remembered)
        return msgspec.structs.replace(found, pod_cidr=str(ipaddress.ip_network(found.pod_cidr)))
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
    layout: node_config.Layout,
    node: str,
    client: AsyncClient,
    routed: Callable[[], Awaitable[int]],
    have: Callable[[str, int], None],
    first: asyncio.Event,
) -> None:
    """Have the network of pods that the cluster gives a node, now and for as long as this runs.

    Args:
        layout: Where things are.
        node: The node's name.
        client: Asks the API server.
        routed: Gives, when the node has been given its first network, the largest packet that flannel brings to other nodes (bytes); 0: it doesn't.
        have: Makes the network of a range, with that.
        first: Is set when there is one.
    """
    there, told = remembered(layout), ""
    if there:
        first.set()
    while True:
        try:
            found = _given(await client.get(resources.NODES, node))
            if found and found != there:
                mtu = remembered_mtu(layout) if there else await routed()
                # Written down first: what pods have of it must be known again.
                _write(layout, _Remembered(node, found, mtu))
                if there:
                    _log.warning(
                        "pods of this node have addresses of %s, and of %s from its next start on", there, found
                    )
                else:
                    have(found, mtu)
                    _log.info("pods of this node get addresses of %s", found)
                there = found
                first.set()
        except errors.NotFoundError:
            pass
        except errors.NixletError as error:
            if error.message != told:
                _log.warning("the network of this node's pods can't be had yet: %s", error, extra={"hint": error.hint})
            told = error.message
        await asyncio.sleep(_LATER if there else _PAUSE)


def _given(node: dict[str, object]) -> str:
    spec = node.get("spec")
    cidr = spec.get("podCIDR") if isinstance(spec, dict) else None
    try:
        return str(ipaddress.ip_network(cidr)) if isinstance(cidr, str) and cidr else ""
    except ValueError as error:
        raise errors.UnavailableError(f"the API server says {cidr!r} is a network") from error
