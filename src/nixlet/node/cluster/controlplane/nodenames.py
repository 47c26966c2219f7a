"""The names of a cluster's nodes, kept in the configuration of its DNS while its server runs: pods reach a node by its name, as with k3s."""

import asyncio
import contextlib
import logging

import msgspec

from nixlet import errors
from nixlet.cluster import coredns, nodehosts
from nixlet.cluster.settings import Address
from nixlet.kubeclient import failures, following, resources
from nixlet.kubeclient.asynchronous import AsyncClient
from nixlet.kubeclient.client import DELETED, Object, version_of

#: Seconds until what couldn't be written is tried again.
_PAUSE = 5.0

_log = logging.getLogger("nixlet.cluster")


class _Metadata(msgspec.Struct):
    name: str


class _ConfigMap(msgspec.Struct):
    data: dict[str, str] | None = None


class _Named(msgspec.Struct):
    metadata: _Metadata


async def keep(client: AsyncClient) -> None:
    """Have the DNS's ConfigMap name all nodes, for ever. Where there is none, none is made.

    Raises:
        NixletError: A request is wrong, as in ``following.follow``.
    """
    await _Names(client).keep()


class _Names:
    """What is known of nodes and of the ConfigMap; None: nothing yet, and for the ConfigMap also that there is none."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._nodes: dict[str, tuple[Address, ...]] | None = None
        self._config: Object | None = None
        self._changed = asyncio.Event()

    async def keep(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow_nodes())
            group.create_task(self._follow_config())
            group.create_task(self._write())

    async def _follow_nodes(self) -> None:
        async with contextlib.aclosing(following.follow(self._client, resources.NODES)) as changes:
            async for change in changes:
                nodes = {} if change.kind == following.LISTED or self._nodes is None else dict(self._nodes)
                for each in change.objects:
                    name = msgspec.convert(each, type=_Named).metadata.name
                    nodes.pop(name, None)
                    # (a node that has just registered may have no address yet)
                    if change.kind != DELETED and (found := nodehosts.addresses(each)):
                        nodes[name] = found
                if nodes != self._nodes:
                    self._nodes = nodes
                    self._changed.set()

    async def _follow_config(self) -> None:
        only = f"metadata.name={coredns.NAME}"
        following_it = following.follow(self._client, resources.CONFIG_MAPS, namespace=coredns.NAMESPACE, fields=only)
        async with contextlib.aclosing(following_it) as changes:
            async for change in changes:
                there = change.objects if change.kind != DELETED else []
                self._config = there[0] if there else None
                self._changed.set()

    async def _write(self) -> None:
        told = ""
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self._nodes is None or self._config is None:
                continue
            data = msgspec.convert(self._config, type=_ConfigMap).data or {}
            before = data.get(nodehosts.KEY, "")
            text = nodehosts.with_nodes(before, self._nodes)
            if text == before:
                continue
            change = {"metadata": {"resourceVersion": version_of(self._config)}, "data": {nodehosts.KEY: text}}
            try:
                await self._client.patch(resources.CONFIG_MAPS, coredns.NAME, change, namespace=coredns.NAMESPACE)
            except (failures.ConflictError, errors.NotFoundError):
                # Somebody was quicker, which we are told of.
                continue
            except errors.NixletError as error:
                if error.message != told:
                    _log.warning("the cluster's DNS can't be told the names of nodes: %s", error)
                told = error.message
                await asyncio.sleep(_PAUSE)
                self._changed.set()
            else:
                told = ""
                _log.info("the cluster's DNS knows the names of nodes", extra={"nodes": sorted(self._nodes)})
