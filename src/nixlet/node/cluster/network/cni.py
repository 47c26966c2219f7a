"""The network of a node's pods in the CNI configuration: made when the node is given it, and as flannel says."""

import asyncio
import contextlib
import dataclasses
from collections.abc import Awaitable, Callable

from nixlet.cluster import flannel as model
from nixlet.cluster.settings import ClusterSettings
from nixlet.host import iptables, waits
from nixlet.kubeclient.asynchronous import AsyncClient
from nixlet.node.children import containerd_child
from nixlet.node.cluster.network import flannel, podnetwork
from nixlet.node.ownership import claims, marker
from nixlet.node.settings import config as node_config

#: Seconds between two looks at what flannel says.
_PAUSE = 0.1

#: The chain of the packet filter where the plugins have what masquerades a pod.
_MASQUERADING = "POSTROUTING"


class PodNetwork:
    """The network of a node's pods.

    Attributes:
        settings: The node's, with the network; empty: it is not known yet.
        routed_mtu: The largest packet that flannel brings to other nodes' pods (bytes), as far as it is known; 0: it doesn't.
    """

    def __init__(self, settings: node_config.Settings) -> None:
        """What is known of it from before.

        Args:
            settings: The node's.

        Raises:
            FailedPreconditionError: What is written down of it can't be read.
        """
        self._layout = settings.layout
        self.settings = dataclasses.replace(settings, pod_cidr=podnetwork.to_use(self._layout, settings.bridge))
        self.routed_mtu = podnetwork.remembered_mtu(self._layout)

    def keep(
        self,
        stack: contextlib.AsyncExitStack,
        cluster: ClusterSettings,
        backend: str,
        client: AsyncClient,
        start_flannel: Callable[[list[str]], Awaitable[None]],
    ) -> "tuple[asyncio.Task[None], ...]":
        """Have it until ``stack`` is left; what ends when it is there.

        Args:
            stack: Owns it.
            cluster: The cluster.
            backend: How flannel brings packets to other nodes; "none": it doesn't.
            client: Asks the API server.
            start_flannel: Starts flannel with these arguments, and waits until it is ready.
        """
        own = stack.enter_context(contextlib.ExitStack())
        first, given = asyncio.Event(), asyncio.Event()
        routed: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        stack.callback(routed.cancel)
        if self.settings.pod_cidr:
            # (flannel ends where the node hasn't its network)
            given.set()

        async def route() -> None:
            mtu = 0
            if backend != model.NONE:
                arguments = await flannel.prepare(self.settings, cluster, backend)
                await given.wait()
                await start_flannel(arguments)
                mtu = await self._said()
            if self.settings.pod_cidr:
                await self._have_routed(mtu)
            if not routed.done():
                routed.set_result(mtu)

        async def mtu() -> int:
            given.set()
            return await asyncio.shield(routed)

        def have(pod_cidr: str, mtu: int) -> None:
            self._have(own, pod_cidr, mtu)

        routing = waits.owned(stack, route(), "flannel")
        keeping = waits.owned(
            stack,
            podnetwork.keep(self._layout, cluster.node_name, self.settings.pod_cidr, client, mtu, have, first),
            "pod network",
        )

        async def had() -> None:
            await waits.first(keeping, first.wait())
            if keeping.done():
                keeping.result()

        return routing, waits.owned(stack, had(), "first pod network")

    async def _said(self) -> int:
        """The largest packet, as flannel says or, of an agent's that isn't waited for while the server is away, as is known from before."""
        while not (mtu := model.mtu(flannel.subnet_file(self._layout)) or self.routed_mtu):
            await asyncio.sleep(_PAUSE)
        return mtu

    async def _have_routed(self, mtu: int) -> None:
        """Have a network of pods that is there already be as flannel says; pods that are on it keep what they have, but for their sender."""
        if mtu == self.routed_mtu:
            return
        masqueraded, self.routed_mtu = not self.routed_mtu, mtu
        podnetwork.remember_mtu(self._layout, mtu)
        containerd_child.write_network(self.settings, self._layout, mtu)
        if masqueraded:
            # By rules of each pod's own, which hide it from other nodes' pods, and which nobody would take back any more.
            await iptables.remove_rules(network=containerd_child.network_name(self.settings), chain=_MASQUERADING)

    def _have(self, stack: contextlib.ExitStack, pod_cidr: str, mtu: int) -> None:
        """Make the network of this node's pods, with a claim on it."""
        settings = dataclasses.replace(self.settings, pod_cidr=pod_cidr)
        bridge = settings.bridge
        # (it is tried again where it fails, and then the claim is free again)
        with contextlib.ExitStack() as claimed:
            claimed.enter_context(claims.pod_network(bridge, pod_cidr))
            known = marker.read(self._layout.data_dir)
            claims.clear_gateway(bridge, pod_cidr, ours=known is not None and bridge in known.bridges)
            containerd_child.write_network(settings, self._layout, mtu)
            stack.push(claimed.pop_all())
        self.settings, self.routed_mtu = settings, mtu
