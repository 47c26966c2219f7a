"""The node's own services, and what they say of it and of its containerd."""

import asyncio
import dataclasses
from collections.abc import Sequence

from nixlet import errors
from nixlet.containerd import cri, tasks
from nixlet.containers import attaching, foreground, processes, streams
from nixlet.host import signals, supervisor
from nixlet.images import obtaining
from nixlet.node import config as node_config
from nixlet.node import containerd_child, proxyplugin
from nixlet.pods import ended, lifecycle, player, removal, resolvconf, undoing
from nixlet.services import (
    containers,
    executing,
    manifests,
    nodeimages,
    nodeinterface,
    nodelogs,
    nodestatus,
    running,
    sessions,
    stopping,
    withdrawal,
)
from nixlet.services import node as node_service
from nixlet.services import pods as pods_service
from nixlet.varlink import server as varlink

#: The state directory of a containerd that is not ours.
_CONTAINERD_STATE = "/run/containerd"


@dataclasses.dataclass(frozen=True, slots=True)
class Containerd:
    """The node's containerd.

    Attributes:
        version: Its version.
        kept: How it is kept running; None when it is somebody else's.
    """

    version: str
    kept: supervisor.KeptChild | None = None

    async def gave_up(self) -> errors.NixletError:
        """Wait until it died for good; why. Somebody else's containerd is theirs to look after."""
        if self.kept is None:
            await asyncio.Event().wait()
        assert self.kept is not None
        return await self.kept.gave_up()

    def children(self) -> Sequence[node_service.ChildStatus]:
        """What the node says of it: nothing while it is not running."""
        if self.kept is None:
            return [node_service.ChildStatus("containerd", 0, self.version)]
        child = self.kept.current
        return [] if child is None else [node_service.ChildStatus(child.name, child.pid, self.version)]

    async def check(self, runtime: cri.RuntimeClient) -> None:
        """Check that it answers.

        Raises:
            NixletError: It doesn't, with the reason of its last death if that is why.
        """
        if self.kept is not None and self.kept.current is None:
            raise errors.UnavailableError(f"containerd is not running: {self.kept.failure or 'it is being started'}")
        await runtime.version()


def status(
    settings: node_config.Settings, layout: node_config.Layout, programs: containerd_child.Programs | None
) -> node_service.NodeStatus:
    """What the node says of itself."""
    return node_service.NodeStatus(
        snapshotter=settings.snapshotter,
        data_dir=layout.data_dir,
        state_dir=layout.state_dir,
        containerd_address=settings.container_runtime_endpoint or layout.containerd_socket,
        containerd_config_version=0 if programs is None else programs.containerd.config_version,
        pod_log_dir=layout.pods,
        resolv_conf=resolvconf.for_pods(settings.resolv_conf, layout.resolv_conf),
    )


class Faces:
    """The services on the node's socket that are the node's own: they serve before containerd is there."""

    def __init__(self, status: node_service.NodeStatus, layout: node_config.Layout, images: cri.ImageClient) -> None:
        """The services of a node.

        Args:
            status: What it is.
            layout: Where it keeps things.
            images: Its own image service.
        """
        self._status = status
        self._layout = layout
        self._images = images
        self._made: list[node_service.NodeService] = []
        self._pods: list[lifecycle.Pods] = []
        self._removals: list[removal.Removals] = []
        self._keepers: list[streams.Keeper] = []
        self._processes: list[processes.Processes] = []
        self.containerd: Containerd | None = None

    def services(self, served: proxyplugin.Served) -> Sequence[node_service.NodeService]:
        """The services, for what stands."""
        kept = self._kept(served)
        plays = pods_service.Pods(kept, self._images)
        self._pods.append(kept)
        self._made.append(
            node_service.NodeService(self._status, self._children, served.exchange, served.snapshotter, plays, kept)
        )
        return self._made

    def _kept(self, served: proxyplugin.Served) -> lifecycle.Pods:
        """The node's pods."""
        pods_dir = self._status.pod_log_dir
        undoings = undoing.Undoings(
            served.runtime, served.containerd, pods_dir=pods_dir, leases=self._layout.cni_data_dir
        )
        plays = player.Player(
            served.runtime, served.containerd, undoings, pods_dir=pods_dir, resolv_conf=self._status.resolv_conf
        )
        removals = removal.Removals(served.runtime, pods_dir)
        self._removals.append(removals)
        watcher = ended.Watcher(served.runtime, served.containerd, removals)
        service = tasks.Tasks(served.channel, self._status.containerd_address)
        state_dirs = [self._layout.containerd_state, _CONTAINERD_STATE]
        foregrounds = foreground.Foregrounds(served.containerd, service, served.runtime, state_dirs)
        keeper = streams.Keeper(served.containerd, service, served.runtime, state_dirs)
        # Before containerd starts, which forgets the containers that have ended.
        keeper.look()
        self._keepers.append(keeper)
        return lifecycle.Pods(served.runtime, plays, undoings, removals, watcher, foregrounds, keeper, service)

    def interface(self, served: proxyplugin.Served) -> varlink.Interface:
        """What the command line asks."""
        status = nodestatus.StatusService(self._status, self._children, served.snapshotter, served.runtime.version)
        service = tasks.Tasks(served.channel, self._status.containerd_address)
        there = containers.ContainersService(served.runtime, served.containerd, service)
        stops = stopping.StoppingService(served.runtime, self._removals[0])
        logs = nodelogs.LogService(served.runtime, served.containerd)
        images = nodeimages.ImagesService(
            served.listing, served.loader, served.opener, served.containerd, served.images
        )
        calls = withdrawal.Withdrawals()
        obtainer = obtaining.Obtainer(self._images, served.exchange)
        runs = running.RunService(self._pods[0], obtainer, calls)
        plays = manifests.ManifestService(self._pods[0], obtainer, served.containerd, calls)
        adds = processes.Processes(served.containerd, service, self._layout.state_dir)
        self._processes.append(adds)
        attacher = attaching.Attacher(served.runtime, served.containerd, self._keepers[0])
        fronts = sessions.Sessions()
        executes = executing.ExecutingService(served.runtime, service, adds, attacher, fronts)
        services = (status, there, stops, logs, images, calls, runs, plays, fronts, executes)
        return nodeinterface.interface(*(each.methods() for each in services))

    async def ready(self, containerd: Containerd) -> None:
        """Go on with what an earlier node began, and tell whoever asks that the node is ready: what its children are."""
        for adds in self._processes:
            await adds.recover()
        for made in self._pods:
            await made.recover()
        self.containerd = containerd

    def _children(self) -> Sequence[node_service.ChildStatus]:
        return [] if self.containerd is None else self.containerd.children()

    async def close(self, ending: signals.Ending) -> None:
        """End what they do by themselves."""
        for service in self._made:
            service.close()
        for adds in self._processes:
            await adds.close()
        for made in self._pods:
            await made.close(ending)
