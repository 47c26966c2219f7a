"""The network of a node's pods in a cluster: the part of the cluster's that the node was given, learned once and remembered."""

import asyncio
import ipaddress
import logging
import os
from collections.abc import Callable

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
    """What the node was given, and as whom."""

    node: str
    pod_cidr: str


def memory(layout: node_config.Layout) -> str:
    """The file by which it is remembered."""
    return os.path.join(layout.agent, "pod-network.json")


def remembered(layout: node_config.Layout) -> str:
    """The network that the node was given last; empty: none yet.

    Raises:
        FailedPreconditionError: It can't be read.
    """
    path = memory(layout)
    try:
        with open(path, "rb") as file:
            found = msgspec.json.decode(file.read(), type=_Remembered).pod_cidr
        return str(ipaddress.ip_network(found))
    except FileNotFoundError:
        return ""
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
    have: Callable[[str], None],
    first: asyncio.Event,
) -> None:
    """Have the network of pods that the cluster gives a node, now and for as long as this runs.

    Args:
        layout: Where things are.
        node: The node's name.
        client: Asks the API server.
        have: Makes the network of a range.
        first: Is set when there is one.
    """
    there, told = remembered(layout), ""
    if there:
        first.set()
    while True:
        try:
            found = _given(await client.get(resources.NODES, node))
            if found and found != there:
                # Written down first: what pods have of it must be known again.
                files.write_atomically(memory(layout), msgspec.json.encode(_Remembered(node, found)), mode=0o600)
                if there:
                    _log.warning(
                        "pods of this node have addresses of %s, and of %s from its next start on", there, found
                    )
                else:
                    have(found)
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
