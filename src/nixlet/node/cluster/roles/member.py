"""A node of a cluster: it asks an API server, and its pods have a part of the cluster's network."""

import asyncio
import contextlib
import dataclasses
import functools
from collections.abc import Awaitable, Callable

from nixlet.cluster import standing
from nixlet.cluster.settings import ClusterSettings
from nixlet.host import children as host_children
from nixlet.host import waits
from nixlet.kubeclient.asynchronous import AsyncClient
from nixlet.node.cluster.children import described
from nixlet.node.cluster.network import cni
from nixlet.node.cluster.preflight import finding, kernel, mapping
from nixlet.node.cluster.roles import labelling, node, renewing
from nixlet.node.settings import config as node_config


class Member(node.Node):
    """A node of a cluster; a server is one of its own."""

    def __init__(self, settings: node_config.Settings, found: finding.Found, cluster: ClusterSettings) -> None:
        """As ``node.Node``."""
        self._pods = cni.PodNetwork(settings)
        super().__init__(self._pods.settings, found, cluster)
        self.routed_mtu, self._backend = self._pods.routed_mtu, found.flannel
        self._abilities: dict[str, str] = {}

    async def _prepare(self) -> None:
        await self._have_credentials()
        # (of an agent's its cluster has said by now which networks there are)
        await kernel.prepare({network.version for network in self._cluster.cluster_cidrs})

    async def _have_credentials(self) -> None:
        """Have the certificates by which its programs are known in the cluster, and know what the cluster says of itself."""

    async def _know_abilities(self, strategy: str) -> None:
        self._abilities = await asyncio.to_thread(labelling.abilities, self.settings, strategy)
        own = tuple(f"{key}={value}" for key, value in self._abilities.items())
        self._cluster = dataclasses.replace(self._cluster, node_labels=(*own, *self._cluster.node_labels))

    def _keep_certificates(self, stack: contextlib.AsyncExitStack, renew: Callable[[], Awaitable[object]]) -> None:
        """Have certificates renewed until ``stack`` is left."""
        waits.owned(
            stack, renewing.keep(functools.partial(standing.renewal, self._cluster.layout), renew), "certificates"
        )

    async def _have_pods(
        self,
        stack: contextlib.AsyncExitStack,
        children: host_children.Children,
        client: AsyncClient,
        *awaited: "asyncio.Task[None]",
    ) -> None:
        """Wait until all is ready and pods have their network, which goes on until ``stack`` is left.

        Args:
            stack: Owns it.
            children: The node's.
            client: Asks the API server.
            awaited: What is waited for beside that.
        """

        async def start_flannel(arguments: list[str]) -> None:
            self._start(children, [self._described.of_flannel(arguments, [child.name for child in children])])
            await children.ready(described.FLANNEL)

        if not (self.settings.disable_agent or self.settings.container_runtime_endpoint):
            awaited += self._pods.keep(stack, self._cluster, self._backend, client, start_flannel)
        await self._all_ready(stack, children, *awaited)
        if not self.settings.disable_agent:
            having = labelling.have(client, self._cluster.node_name, self._abilities, self.settings.node_label)
            waits.owned(stack, having, "labels")


async def cluster_settings(settings: node_config.Settings, found: finding.Found) -> ClusterSettings:
    """The settings of a node's cluster, with a proxy as this machine can have it.

    Raises:
        NixletError: They make no cluster, or the machine lacks something.
    """
    mode = kernel.IPTABLES if described.PROXY not in found.programs else await kernel.proxy_mode()
    return mapping.cluster_settings(settings, found, mode)
