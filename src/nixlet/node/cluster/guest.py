"""A node of anybody's cluster: its kubelet asks for its certificates by itself (Kubernetes: "TLS bootstrapping"), and all else is the cluster's affair."""

import asyncio
import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable

from nixlet import errors
from nixlet.cluster import kubeconfigs, programs
from nixlet.cluster.kubeconfigs import Kubeconfig
from nixlet.cluster.settings import ClusterSettings
from nixlet.host import children as host_children
from nixlet.host import files
from nixlet.kubeclient import discovery
from nixlet.kubeclient.asynchronous import AsyncClient
from nixlet.kubeclient.client import Client
from nixlet.kubeclient.endpoint import Endpoint
from nixlet.node.cluster import children as described
from nixlet.node.cluster import finding, kernel, ports, running, versions
from nixlet.node.settings import config as node_config

_log = logging.getLogger("nixlet.cluster")


class Guest(running.Member):
    """A node of a cluster that isn't nixlet's."""

    def __init__(
        self,
        settings: node_config.Settings,
        layout: node_config.Layout,
        found: finding.Found,
        cluster: ClusterSettings,
        way: Callable[[], Kubeconfig],
    ) -> None:
        """A node that is to join.

        Args:
            settings: The node's.
            layout: Where things are.
            found: The programs: the kubelet.
            cluster: What is known of the cluster.
            way: Finds out where it is, and as whom one may ask for a certificate there; it may wait.
        """
        super().__init__(settings, layout, found, cluster)
        self._way = way

    async def begin(self, children: host_children.Children) -> None:  # noqa: ARG002 (a server's are started here)
        """Find out about the cluster, and write down what the kubelet needs.

        Raises:
            NixletError: The cluster isn't found, or isn't the one that was meant.
        """
        await ports.free(list(ports.wanted(self._cluster, self._found.programs)))
        _, _, said = await asyncio.gather(
            kernel.prepare(), asyncio.to_thread(self._prepare), versions.ask(self._found, self._layout)
        )
        versions.check(said)
        _log.info("starting the kubelet", extra={"versions": dict(said)})
        self._described = described.Described(self._layout, self._found, self._cluster, self._administrator)

    def _prepare(self) -> None:
        places = self._cluster.layout
        own = places.node("kubelet.kubeconfig")
        try:
            config, facts = self._asked()
        except (errors.UnavailableError, errors.DeadlineExceededError, errors.PermissionDeniedError) as error:
            # A kubelet that has its certificates renews them by itself, and needs nobody to let it in.
            if not os.path.exists(own):
                raise
            _log.warning("the node starts with what it has from before: %s", error, extra={"hint": error.hint})
            return
        files.make_directory(places.agent)
        authority = config.authority_data
        if config.authority:
            with files.refusing(f"{config.authority} can't be read"), open(config.authority, "rb") as file:
                authority = file.read()
        if not authority:
            raise errors.FailedPreconditionError(
                "the kubeconfig names no certificate authority, and whoever calls the kubelet couldn't be recognised",
                hint="give it a certificate-authority",
            )
        # The API server shows the kubelet a certificate of the authority of its clients, which mostly is that of servers.
        files.write_atomically(places.node("client-ca.crt"), authority)
        kubeconfigs.write(places.node("bootstrap.kubeconfig"), config)
        if facts is not None and not self.settings.cluster_dns:
            self._cluster = dataclasses.replace(
                self._cluster, cluster_dns=facts.cluster_dns, cluster_domain=facts.cluster_domain
            )
        elif not self.settings.cluster_dns:
            _log.warning(
                "the cluster doesn't say where its DNS is, and pods of this node ask %s",
                ", ".join(map(str, self._cluster.dns_addresses)),
                extra={"hint": "--cluster-dns says it"},
            )

    def _asked(self) -> tuple[Kubeconfig, discovery.KubeletFacts | None]:
        config = self._way()
        return config, discovery.kubelet_facts(config)

    def _node(self, node: programs.Node) -> programs.Node:
        return dataclasses.replace(node, bootstraps=True)

    async def go_on(self, stack: contextlib.AsyncExitStack, children: host_children.Children) -> None:
        """Start the kubelet, and wait until it is ready and pods have their network, until ``stack`` is left.

        Raises:
            NixletError: It can't be started.
        """
        await self._start_agent(children)
        await children.ready(described.KUBELET)
        own = await asyncio.to_thread(kubeconfigs.read, self._cluster.layout.node("kubelet.kubeconfig"))
        client = await stack.enter_async_context(AsyncClient(Client(Endpoint.of_kubeconfig(own))))
        await self._settle(stack, children, client, set())
