"""A cluster around a node: its programs started beside containerd, its pods' network had when it is known."""

import asyncio
import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

from nixlet.cluster import flannel as flannel_model
from nixlet.cluster import kubeconfigs, programs, standing
from nixlet.cluster.settings import ClusterSettings
from nixlet.containerd import cri
from nixlet.host import children as host_children
from nixlet.host import iptables, supervisor, uncut
from nixlet.kubeclient.asynchronous import AsyncClient
from nixlet.kubeclient.client import Client
from nixlet.kubeclient.endpoint import Endpoint
from nixlet.node.children import cgroupdriver, containerd_child
from nixlet.node.cluster.children import described, preparing
from nixlet.node.cluster.controlplane import bootstrap, datastore, deploying, nodenames
from nixlet.node.cluster.network import flannel, podnetwork
from nixlet.node.cluster.preflight import finding, kernel, made, mapping, ports, versions
from nixlet.node.cluster.roles import renewing
from nixlet.node.images import coredns
from nixlet.node.manifests import deployer as deployers
from nixlet.node.ownership import claims, marker
from nixlet.node.settings import config as node_config
from nixlet.rpc import channel as channels
from nixlet.services import joining, joinserver

#: Seconds between two looks at what flannel says.
_PAUSE = 0.1

#: The chain of the packet filter where the plugins have what masquerades a pod.
_MASQUERADING = "POSTROUTING"

_log = logging.getLogger("nixlet.cluster")

T = TypeVar("T")


class Cluster:
    """A cluster that a node is, before any of its programs runs; ``of`` makes it.

    Attributes:
        settings: The node's, with the network of its pods; empty: it is not known yet.
        routed_mtu: The largest packet that flannel brings to other nodes' pods (bytes), as far as it is known; 0: it doesn't.
    """

    def __init__(
        self,
        settings: node_config.Settings,
        layout: node_config.Layout,
        found: finding.Found,
        cluster: ClusterSettings,
    ) -> None:
        self.settings = dataclasses.replace(settings, pod_cidr=podnetwork.to_use(layout, settings.bridge))
        self.routed_mtu = podnetwork.remembered_mtu(layout)
        self._layout, self._found, self._cluster, self._backend = layout, found, cluster, found.flannel
        administrator = kubeconfigs.of_server(cluster)[cluster.layout.cred("admin.kubeconfig")]
        self._administrator = administrator
        self._described = described.Described(layout, found, cluster, administrator)
        self._relief = datastore.Relief(datastore.etcd_of(cluster)) if found.datastore == finding.ETCD else None

    async def begin(self, stack: contextlib.AsyncExitStack, children: host_children.Children) -> None:
        """Prepare all, and start what needs no containerd.

        Args:
            stack: Owns what is made here.
            children: The node's.

        Raises:
            NixletError: It can't be prepared.
        """
        made.check_networks(self._layout, self._cluster)
        await ports.free(ports.of_node(self._cluster, self._found.programs))
        _, _, said = await asyncio.gather(
            kernel.prepare({network.version for network in self._cluster.cluster_cidrs}),
            asyncio.to_thread(preparing.prepare_server, self.settings, self._layout, self._cluster),
            versions.ask(self._found, self._layout),
        )
        versions.check(said)
        # Before the API server answers: a node that comes meanwhile sees whose cluster it is, and comes again.
        asked = stack.enter_context(Client(Endpoint.of_kubeconfig(self._administrator)))
        keeper = joining.Doorkeeper(self._cluster, asked, flannel_backend=self._backend)
        await stack.enter_async_context(joinserver.serve(keeper, self._cluster))
        _log.info("starting Kubernetes", extra={"versions": dict(said)})
        children.start(*self._described.of_server(hidden=await self._hidden()))
        if self._relief is not None:
            # (one that has raised an alarm isn't well, and no API server would start)
            await _owned(stack, self._relief.keep(), "relief of etcd")

    async def _hidden(self) -> bool:
        """Whether the address of a database, which may have a password in it, is kept out of kine's command line."""
        kine = self._found.programs.get(finding.KINE)
        if kine is None or not self._cluster.datastore_endpoint:
            return False
        hidden = await versions.takes_variable(kine, "KINE_ENDPOINT")
        if not hidden:
            _log.warning(
                "the datastore-endpoint stands in kine's command line, which all users of this machine can read",
                extra={
                    "hint": "install a later kine; or have the database know the node by a certificate: datastore-certfile"
                },
            )
        return hidden

    async def go_on(self, stack: contextlib.AsyncExitStack, children: host_children.Children) -> None:
        """Start the rest beside containerd, and wait until all is ready and pods have their network, until ``stack`` is left.

        Raises:
            NixletError: One can't be started, or one to which the node is tied was given up meanwhile.
        """
        await self._start_agent(children)
        await children.ready(described.API_SERVER)
        await asyncio.to_thread(made.remember, self.settings, self._layout, self._found.datastore, self._cluster)
        client = await stack.enter_async_context(AsyncClient(Client(Endpoint.of_kubeconfig(self._administrator))))
        await self._keep_certificates(stack)
        if deploying.has_dns(self.settings):
            await _owned(stack, nodenames.keep(client), "names of nodes")
        applying = bootstrap.apply(client, flannel=self._backend != flannel_model.NONE)
        await self._settle(stack, children, client, {await _owned(stack, applying, "bootstrap")})

    async def _keep_certificates(self, stack: contextlib.AsyncExitStack) -> None:
        """Have certificates renewed until ``stack`` is left."""
        due = functools.partial(standing.renewal, self._cluster.layout)
        await _owned(stack, renewing.keep(due, self._renew), "certificates")

    async def _renew(self) -> None:
        """Have the node's certificates made anew, those whose time it is.

        Raises:
            NixletError: They can't be.
        """
        making = asyncio.to_thread(preparing.renew, self.settings, self._cluster)
        await uncut.outcome(asyncio.ensure_future(making))

    async def _start_agent(self, children: host_children.Children) -> None:
        """Start the kubelet and the proxy, where they are wanted."""
        if self.settings.disable_agent:
            return
        kernel.warn_of_cgroups()
        kernel.remember_settings(self._layout)
        driver = await self._cgroup_driver()
        node = self._node(await asyncio.to_thread(preparing.node_of, self.settings, self._layout, driver))
        await asyncio.to_thread(preparing.prepare_agent, self.settings, self._layout, self._cluster, node)
        children.start(*self._agents(node, [child.name for child in children]))

    async def _cgroup_driver(self) -> str:
        """The runtime's. Kubelets ask it by themselves, but containerd 1 doesn't answer that."""
        address = self.settings.container_runtime_endpoint
        if not address:
            written = await asyncio.to_thread(cgroupdriver.written, self._layout)
            return written or cgroupdriver.wanted(self.settings, self._layout)
        async with channels.connect(address) as channel:
            systemd = await cri.RuntimeClient(channel, address).systemd_cgroup()
        return cgroupdriver.SYSTEMD if systemd else cgroupdriver.CGROUPFS

    def _node(self, node: programs.Node) -> programs.Node:
        """What the kubelet has to know of its node."""
        return node

    def _agents(self, node: programs.Node, others: list[str]) -> list[supervisor.Program]:
        """The kubelet and the proxy, described."""
        return self._described.of_agent(node, others)

    async def _settle(
        self,
        stack: contextlib.AsyncExitStack,
        children: host_children.Children,
        client: AsyncClient,
        awaited: "set[asyncio.Task[object]]",
    ) -> None:
        """Wait until all is ready and pods have their network, which goes on until ``stack`` is left.

        Args:
            stack: Owns it.
            children: The node's.
            client: Asks the API server.
            awaited: What is waited for beside that.
        """
        if not (self.settings.disable_agent or self.settings.container_runtime_endpoint):
            awaited |= await self._network(stack, children, client)
        awaited.add(await _owned(stack, children.ready(), "all children"))
        # (one that has started and then gives up ends the node, and there is nothing more to wait for)
        failing = await _owned(stack, children.gave_up(), "given up")
        while awaited and not failing.done():
            done, awaited = await asyncio.wait({*awaited, failing}, return_when=asyncio.FIRST_COMPLETED)
            awaited -= {failing}
            for task in done - {failing}:
                task.result()
        if failing.done():
            raise await children.gave_up()

    async def deploy(
        self, stack: contextlib.AsyncExitStack, maker: coredns.Maker | None
    ) -> dict[str, Callable[[], str]]:
        """Have the cluster hold what its manifests say, until ``stack`` is left; what there is to remark on, by name.

        Args:
            stack: Owns what is made here.
            maker: Makes an image of the machine's CoreDNS; None: the node's snapshotter can't have such images.
        """
        deployer = deploying.deployer(self.settings, self._layout, self._cluster, maker)
        await stack.enter_async_context(deployers.deploying(deployer))
        of_state = {} if self._relief is None else {"etcd's database": self._relief.remark}
        return {"manifests": deployer.remark, **of_state}

    async def _network(
        self, stack: contextlib.AsyncExitStack, children: host_children.Children, client: AsyncClient
    ) -> "set[asyncio.Task[object]]":
        """Have the network of this node's pods until ``stack`` is left; what ends when it is there."""
        first = asyncio.Event()
        own = stack.enter_context(contextlib.ExitStack())
        given, routed = asyncio.Event(), asyncio.get_running_loop().create_future()
        stack.callback(routed.cancel)
        awaited: set[asyncio.Task[object]] = set()
        if self._backend == flannel_model.NONE:
            routed.set_result(0)
            await self._have_routed(0)
        else:
            if self.settings.pod_cidr:
                given.set()
            awaited.add(await _owned(stack, self._route(children, given, routed), "flannel"))

        async def mtu() -> int:
            given.set()
            return await asyncio.shield(routed)

        def have(pod_cidr: str, mtu: int) -> None:
            self._have_network(own, pod_cidr, mtu)

        keeping = await _owned(
            stack,
            podnetwork.keep(self._layout, self._cluster.node_name, self.settings.pod_cidr, client, mtu, have, first),
            "pod network",
        )

        async def had() -> None:
            waiting = asyncio.ensure_future(first.wait())
            await asyncio.wait({waiting, keeping}, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            if keeping.done():
                keeping.result()

        return {*awaited, await _owned(stack, had(), "first pod network")}

    async def _route(
        self, children: host_children.Children, given: asyncio.Event, routed: "asyncio.Future[int]"
    ) -> None:
        """Start flannel when the node has been given its network, and have pods' network be as it says.

        Args:
            children: The node's.
            given: Is set when the node has its network: flannel ends where it hasn't.
            routed: Gets what flannel says.
        """
        arguments = await flannel.prepare(self.settings, self._layout, self._cluster, self._backend)
        await given.wait()
        children.start(self._flannel(arguments, [child.name for child in children]))
        await children.ready(described.FLANNEL)
        # (of an agent's it isn't waited for while the server is away: what is known from before holds)
        while not (mtu := flannel_model.mtu(flannel.subnet_file(self._layout)) or self.routed_mtu):
            await asyncio.sleep(_PAUSE)
        if self.settings.pod_cidr:
            await self._have_routed(mtu)
        if not routed.done():
            routed.set_result(mtu)

    def _flannel(self, arguments: list[str], others: list[str]) -> supervisor.Program:
        """flannel, described."""
        return self._described.of_flannel(arguments, others)

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

    def _have_network(self, stack: contextlib.ExitStack, pod_cidr: str, mtu: int) -> None:
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


class Member(Cluster):
    """A node of a cluster whose servers are elsewhere."""

    async def _beside(self, joining: Coroutine[Any, Any, T]) -> tuple[T, Mapping[str, str]]:
        """What joining gives, and the programs' versions. What this machine lacks is told also while the cluster is waited for.

        Raises:
            NixletError: As joining; or the machine lacks something.
        """
        task = asyncio.create_task(joining, name="join")
        try:
            _, said = await asyncio.gather(kernel.prepare(), versions.ask(self._found, self._layout))
            versions.check(said)
            return await task, said
        finally:
            await _ended(task)

    async def deploy(
        self,
        stack: contextlib.AsyncExitStack,  # noqa: ARG002 (a server needs it)
        maker: coredns.Maker | None,  # noqa: ARG002 (as above)
    ) -> dict[str, Callable[[], str]]:
        """Nothing: manifests are the servers'."""
        return {}


async def _owned(
    stack: contextlib.AsyncExitStack, work: Coroutine[Any, Any, object], name: str
) -> "asyncio.Task[object]":
    """A task that ends with ``stack`` at the latest."""
    task = asyncio.create_task(work, name=name)
    stack.push_async_callback(_ended, task)
    return task


async def _ended(task: "asyncio.Task[object]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def of(settings: node_config.Settings, layout: node_config.Layout, found: finding.Found) -> Cluster:
    """The cluster that a node is.

    Raises:
        NixletError: The settings make no cluster, or the machine lacks something.
    """
    mode = kernel.IPTABLES if described.PROXY not in found.programs else await kernel.proxy_mode()
    if not (settings.flannel_backend or settings.disable_agent or found.flannel != flannel_model.NONE):
        _log.info(
            "%s is not there: pods of this cluster's nodes can't reach each other from node to node", finding.FLANNEL
        )
    return Cluster(settings, layout, found, mapping.cluster_settings(settings, found, mode))
