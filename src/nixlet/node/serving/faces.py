"""The node's own services, and what they say of it and of its containerd."""

import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence

from nixlet.containerd import cri, tasks
from nixlet.containers import attaching, keeping, processes
from nixlet.host import children as host_children
from nixlet.host import keptchild, signals
from nixlet.images import obtaining
from nixlet.node.children import containerd_child
from nixlet.node.serving import proxyplugin
from nixlet.node.settings import config as node_config
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
from nixlet.varlink import server as varlink

#: The state directory of a containerd that is not ours.
_CONTAINERD_STATE = "/run/containerd"


@dataclasses.dataclass(frozen=True, slots=True)
class Containerd:
    """The node's containerd.

    Attributes:
        version: Its version.
        child: The node's child that it is; None when it is somebody else's.
    """

    version: str
    child: keptchild.Child | None = None

    def children(self) -> Sequence[nodestatus.ChildStatus]:
        """What the node says of it: nothing while it is not running."""
        if self.child is None:
            return [nodestatus.ChildStatus("containerd", 0, self.version)]
        running = self.child.current
        return [] if running is None else [nodestatus.ChildStatus(self.child.name, running.pid, self.version)]

    async def check(self, runtime: cri.RuntimeClient) -> None:
        """Check that it answers.

        Raises:
            NixletError: It doesn't, with the reason of its last death if that is why.
        """
        if self.child is not None:
            self.child.check()
        await runtime.version()


def status(
    settings: node_config.Settings, layout: node_config.Layout, programs: containerd_child.Programs | None
) -> nodestatus.NodeStatus:
    """What the node says of itself."""
    return nodestatus.NodeStatus(
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

    def __init__(
        self,
        status: nodestatus.NodeStatus,
        layout: node_config.Layout,
        images: cri.ImageClient,
        children: host_children.Children,
        remarks: Mapping[str, Callable[[], str]],
    ) -> None:
        """The services of a node.

        Args:
            status: What it is.
            layout: Where it keeps things.
            images: Its own image service.
            children: The programs that it keeps running.
            remarks: Tell what is not as somebody wants it, by what it is about.
        """
        self._remarks = remarks
        self._kept = children
        self._status = status
        self._layout = layout
        self._images = images
        self._closing: list[Callable[[signals.Ending], Awaitable[None]]] = []
        self._recovering: list[Callable[[], Awaitable[None]]] = []
        self._keeper: keeping.Keeper | None = None
        self.containerd: Containerd | None = None

    def interface(self, served: proxyplugin.Served) -> varlink.Interface:
        """What the command line asks, for what stands. To be made before containerd starts."""
        runtime, containerd, pods_dir = served.runtime, served.containerd, self._status.pod_log_dir
        service = tasks.Tasks(served.channel, self._status.containerd_address)
        # It looks for what an earlier node left, and containerd forgets the containers that have ended.
        keeper = keeping.Keeper(containerd, service, runtime, self._containerd_state())
        keeper.look()
        self._keeper = keeper
        removals = removal.Removals(runtime, pods_dir)
        undoings = undoing.Undoings(runtime, containerd, pods_dir=pods_dir, leases=self._layout.cni_data_dir)
        resolv_conf = self._status.resolv_conf
        plays = player.Player(runtime, containerd, undoings, removals, pods_dir=pods_dir, resolv_conf=resolv_conf)
        watcher = ended.Watcher(runtime, containerd, removals)
        pods = lifecycle.Pods(runtime, plays, undoings, removals, watcher, keeper, service)
        adds = processes.Processes(containerd, service, self._layout.state_dir)
        self._recovering += [adds.recover, pods.recover]
        self._closing += [lambda _: adds.close(), pods.close]
        calls, fronts = withdrawal.Withdrawals(), sessions.Sessions()
        obtainer = obtaining.Obtainer(self._images, served.exchange)
        attacher = attaching.Attacher(runtime, containerd, keeper)
        services = (
            nodestatus.StatusService(
                self._status, self._children, self._kept.status, served.snapshotter, runtime.version, self._remarks
            ),
            containers.ContainersService(runtime, containerd, service, removals),
            stopping.StoppingService(runtime, removals),
            nodelogs.LogService(runtime, containerd, removals),
            nodeimages.ImagesService(served.listing, served.loader, served.opener, containerd, served.images),
            calls,
            fronts,
            running.RunService(pods, service, obtainer, calls, fronts),
            manifests.ManifestService(pods, obtainer, containerd, calls),
            executing.ExecutingService(runtime, removals, service, adds, attacher, fronts),
        )
        return nodeinterface.interface(*(each.methods() for each in services))

    def writes_log(self, path: str) -> bool:
        """Whether the node itself writes the log of this path."""
        return self._keeper is not None and self._keeper.writes(path)

    def _containerd_state(self) -> str:
        own = self._status.containerd_address == self._layout.containerd_socket
        return self._layout.containerd_state if own else _CONTAINERD_STATE

    async def ready(self, containerd: Containerd) -> None:
        """Go on with what an earlier node began, and tell whoever asks that the node is ready: what its children are."""
        for recover in self._recovering:
            await recover()
        self.containerd = containerd

    def _children(self) -> Sequence[nodestatus.ChildStatus]:
        return [] if self.containerd is None else self.containerd.children()

    async def close(self, ending: signals.Ending) -> None:
        """End what they do by themselves."""
        for close in self._closing:
            await close(ending)
