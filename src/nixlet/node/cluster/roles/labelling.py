"""The labels by which a node says what it can do, for pods that need it: how it shows closures, and which runtimes it has.

A kubelet gives a node its labels when it registers it, and never again; what a node can do may change with each of its starts.
"""

import asyncio
import logging
import tomllib
from collections.abc import Iterable, Mapping

import msgspec

from nixlet import errors
from nixlet.cluster import names
from nixlet.containerd import runtimes
from nixlet.kubeclient import resources
from nixlet.kubeclient.asynchronous import AsyncClient
from nixlet.node.settings import config as node_config

#: How containers get to see closures ("view", "bind").
_STRATEGY = "nixlet.io/strategy"

#: The domain of a label for each runtime, whose name is the rest of its key.
_RUNTIME = "runtime.nixlet.io/"

#: Seconds until what couldn't be written is tried again.
_PAUSE = 5.0

_log = logging.getLogger("nixlet.cluster")


class _Metadata(msgspec.Struct):
    labels: dict[str, str] = {}


class _Node(msgspec.Struct):
    metadata: _Metadata


def abilities(settings: node_config.Settings, strategy: str) -> dict[str, str]:
    """What a node says of itself by now; a person's word on it counts more.

    Args:
        settings: The node's.
        strategy: How containers get to see closures; empty: they don't.

    Raises:
        OSError: containerd's configuration can't be read.
    """
    found = {_STRATEGY: strategy} if strategy else {}
    if not settings.container_runtime_endpoint:
        with open(settings.layout.containerd_config, "rb") as file:
            there, _ = runtimes.configured(tomllib.load(file))
        found |= {f"{_RUNTIME}{name}": "true" for name in there}
    said = {each.partition("=")[0] for each in settings.node_label}
    return {key: value for key, value in found.items() if names.is_key(key) and key not in said}


async def have(client: AsyncClient, name: str, wanted: Mapping[str, str], said: Iterable[str]) -> None:
    """Have a node's object say what the node can do, and nothing of that kind that it can't any more.

    Args:
        client: As whoever may change the node.
        name: The node's.
        wanted: As ``abilities`` has it.
        said: The labels (KEY=VALUE) that a person gives the node: they stay as they are.
    """
    kept = {each.partition("=")[0] for each in said}
    told = ""
    while True:
        try:
            found = msgspec.convert(await client.get(resources.NODES, name), type=_Node).metadata.labels
            change: dict[str, str | None] = {key: value for key, value in wanted.items() if found.get(key) != value}
            change |= {
                key: None for key in found.keys() - wanted.keys() - kept if key == _STRATEGY or key.startswith(_RUNTIME)
            }
            if change:
                await client.patch(resources.NODES, name, {"metadata": {"labels": change}})
        except errors.NotFoundError:
            # Its kubelet has not registered it yet.
            pass
        except errors.NixletError as error:
            if error.message != told:
                _log.warning("the node's labels can't be written yet: %s", error)
            told = error.message
        else:
            return
        await asyncio.sleep(_PAUSE)
