"""A node of Kubernetes, whatever its role: how it begins beside its containerd, and goes on with it."""

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterable
from typing import TypeVar

from nixlet.cluster.settings import ClusterSettings
from nixlet.containerd import cri
from nixlet.host import children as host_children
from nixlet.host import supervisor, waits
from nixlet.node.children import cgroupdriver
from nixlet.node.cluster.children import described, preparing
from nixlet.node.cluster.preflight import finding, kernel, ports, versions
from nixlet.node.images import coredns
from nixlet.node.settings import config as node_config
from nixlet.rpc import channel as channels

_log = logging.getLogger("nixlet.cluster")

T = TypeVar("T")


class Node:
    """A node before any of its programs runs. A subclass is a role, and says what is its own in the methods that do nothing here.

    Attributes:
        settings: The node's, with the network of its pods; empty: it is not known yet.
        routed_mtu: The largest packet that flannel brings to other nodes' pods (bytes), as far as it is known; 0: it doesn't.
        remarks: What there is to remark on while it runs, by name.
    """

    #: What is started, for the log.
    starts = "Kubernetes"

    #: Its kubelet asks the cluster for certificates by itself.
    bootstraps = False

    def __init__(self, settings: node_config.Settings, found: finding.Found, cluster: ClusterSettings) -> None:
        """A node that is to start.

        Args:
            settings: The node's.
            found: The programs.
            cluster: What is known of the cluster.
        """
        self.settings, self.routed_mtu = settings, 0
        self.remarks: dict[str, Callable[[], str]] = {}
        self._layout, self._found, self._cluster = settings.layout, found, cluster

    @property
    def _described(self) -> described.Described:
        """Its programs, by what is known of the cluster now."""
        return described.Described(self._found, self._cluster)

    async def begin(self, stack: contextlib.AsyncExitStack, children: host_children.Children) -> None:
        """Prepare all, and start what needs no containerd.

        Args:
            stack: Owns what is made here.
            children: The node's.

        Raises:
            NixletError: It can't be prepared: the machine lacks something, or the cluster doesn't let it in.
        """
        await ports.free(ports.of_node(self._cluster, self._found.programs))
        # (what this machine lacks is told also while a cluster is waited for)
        said, _ = await waits.both(versions.checked(self._found, self._layout), self._prepare())
        _log.info("starting %s", self.starts, extra={"versions": dict(said)})
        await self._start_first(stack, children)

    async def _prepare(self) -> None:
        """Have what its programs find when they start."""

    async def _start_first(self, stack: contextlib.AsyncExitStack, children: host_children.Children) -> None:
        """Start what needs no containerd."""

    async def go_on(
        self, stack: contextlib.AsyncExitStack, children: host_children.Children, strategy: str = ""
    ) -> None:
        """Start the rest beside containerd, and wait until all is ready and pods have their network, until ``stack`` is left.

        Args:
            stack: Owns what is made here.
            children: The node's.
            strategy: How containers get to see closures; empty: they don't.

        Raises:
            NixletError: One can't be started, or one to which the node is tied was given up meanwhile.
        """
        if not self.settings.disable_agent:
            await self._know_abilities(strategy)
            await self._start_agent(children)
        await self._settle(stack, children)

    async def _know_abilities(self, strategy: str) -> None:
        """Know what the node can do, as in ``go_on``, to tell others."""

    async def _start_agent(self, children: host_children.Children) -> None:
        """Start the kubelet and the proxy."""
        kernel.warn_of_cgroups()
        kernel.remember_settings(self._layout)
        driver = await self._cgroup_driver()
        known = await asyncio.to_thread(preparing.node_of, self.settings, driver)
        node = dataclasses.replace(known, bootstraps=self.bootstraps)
        await asyncio.to_thread(preparing.prepare_agent, self.settings, self._cluster, node)
        self._start(children, self._described.of_agent(node, [child.name for child in children]))

    async def _cgroup_driver(self) -> str:
        """The runtime's. Kubelets ask it by themselves, but containerd 1 doesn't answer that."""
        address = self.settings.container_runtime_endpoint
        if not address:
            written = await asyncio.to_thread(cgroupdriver.written, self._layout)
            return written or cgroupdriver.wanted(self.settings, self._layout)
        async with channels.connect(address) as channel:
            systemd = await cri.RuntimeClient(channel, address).systemd_cgroup()
        return cgroupdriver.SYSTEMD if systemd else cgroupdriver.CGROUPFS

    def _start(self, children: host_children.Children, programs: Iterable[supervisor.Program]) -> None:
        children.start(*map(self._as_child, programs))

    def _as_child(self, program: supervisor.Program) -> supervisor.Program:
        """A program as it is started in this role."""
        return program

    async def _settle(self, stack: contextlib.AsyncExitStack, children: host_children.Children) -> None:
        """Have what is to be had beside the programs, and wait until all is ready."""
        await self._all_ready(stack, children)

    async def _all_ready(
        self, stack: contextlib.AsyncExitStack, children: host_children.Children, *awaited: "asyncio.Task[None]"
    ) -> None:
        """Wait until all children are ready, and tasks have ended."""

        async def there() -> None:
            await asyncio.gather(children.ready(), *awaited)

        await self._unless_given_up(stack, children, waits.owned(stack, there(), "all children"))

    async def _unless_given_up(
        self, stack: contextlib.AsyncExitStack, children: host_children.Children, work: "asyncio.Task[T]"
    ) -> T:
        """What a task gives when it has ended."""
        # (a child that has started and then gives up ends the node, and there is nothing more to wait for)
        failing = waits.owned(stack, children.gave_up(), "given up")
        await waits.first(work, failing)
        if failing.done():
            raise failing.result()
        return work.result()

    async def deploy(self, stack: contextlib.AsyncExitStack, maker: coredns.Maker | None) -> None:
        """Have the cluster hold what a server's manifests say, until ``stack`` is left.

        Args:
            stack: Owns what is made here.
            maker: Makes an image of the machine's CoreDNS; None: the node's snapshotter can't have such images.
        """
