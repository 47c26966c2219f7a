"""The snapshotters that containerd reaches over sockets: who serves each, and where, what it needs, and what it leaves running."""

import dataclasses
import os

from nixlet import errors
from nixlet.containerd import config as containerd_config
from nixlet.containerd import proxyplugins
from nixlet.host import fuseoverlay, process
from nixlet.node.settings import config as node_config
from nixlet.snapshots import model

#: containerd's own snapshotter for fuse-overlayfs, as a program (github.com/containerd/fuse-overlayfs-snapshotter).
_FUSE_OVERLAYFS_DAEMON = "containerd-fuse-overlayfs-grpc"

#: The program that is the stargz snapshotter (github.com/containerd/stargz-snapshotter).
_STARGZ_DAEMON = "containerd-stargz-grpc"

#: What a program of containerd's family keeps its snapshots in: containerd's metastore.
_THEIR_DATABASE = "metadata.db"


@dataclasses.dataclass(frozen=True, slots=True)
class Need:
    """A program that a snapshotter needs, and the package of Debian that has it; empty: none has."""

    program: str
    package: str = ""

    def check(self) -> str:
        """Its path.

        Raises:
            UnavailableError: It is not installed.
        """
        found = process.find_program(self.program)
        if found is None:
            what = f"install it (Debian: apt install {self.package})" if self.package else "install it"
            raise errors.UnavailableError(f"{self.program} not installed", hint=f"{what}, or put its directory on PATH")
        return found


@dataclasses.dataclass(frozen=True, slots=True)
class Plugin:
    """A snapshotter that is a proxy plugin of the node's containerd.

    Attributes:
        proxy: What containerd is told of it.
        daemon: The program that serves it; empty: the node does.
        arguments: Its arguments.
        goes_on: Whether it goes on without the node, as what lies below running containers is its.
        images: Where it serves CRI's image service in front of containerd's, to know what a pull shows registries; empty: nowhere.
        overlay: Who makes containers' roots of its snapshots.
        needs: The programs that it needs.
        leaves: What of it goes on when the node has ended; empty: nothing.
    """

    proxy: proxyplugins.ProxyPlugin
    daemon: str = ""
    arguments: tuple[str, ...] = ()
    goes_on: bool = False
    images: str = ""
    overlay: model.Overlay = model.Overlay.KERNEL
    needs: tuple[Need, ...] = ()
    leaves: str = ""

    @property
    def is_ours(self) -> bool:
        """Whether it is nixlet's own snapshotter, which shows store paths."""
        return not self.daemon

    def has_snapshots_of_ours(self) -> bool:
        """Whether nixlet's own snapshotter has been at its root."""
        # sqlite, for which other nodes need not wait here.
        from nixlet.snapshots import metadata  # noqa: PLC0415 (see above)

        return os.path.exists(metadata.database_path(self.proxy.root))

    def told(self) -> str:
        """Who it is, in words."""
        who = self.daemon or "nixlet's own snapshotter"
        return ", ".join(filter(None, (f"{self.proxy.name}, served by {who}", self.leaves and f"leaves {self.leaves}")))


def of(settings: node_config.Settings, layout: node_config.Layout) -> Plugin | None:
    """The plugin that is a node's snapshotter; None: its containerd has that built in, or a drop-in says where it is."""
    if settings.snapshotter == containerd_config.NIX:
        return Plugin(_own(settings.snapshotter, layout))
    if settings.snapshotter == containerd_config.FUSE_OVERLAYFS and not settings.container_runtime_endpoint:
        return _fuse_overlayfs(layout)
    if settings.snapshotter == containerd_config.STARGZ and not settings.container_runtime_endpoint:
        return _stargz(layout)
    return None


def of_node(settings: node_config.Settings, layout: node_config.Layout) -> list[Plugin]:
    """The plugins among a node's snapshotters; at most the first of them is ours."""
    first = of(settings, layout)
    return [*([] if first is None else [first]), *further(settings, layout)]


def further(settings: node_config.Settings, layout: node_config.Layout) -> list[Plugin]:
    """The plugins among a node's further snapshotters, each served by a program of its own."""
    named = (dataclasses.replace(settings, snapshotter=name, also_snapshotter=()) for name in settings.also_snapshotter)
    found = (of(each, layout) for each in named)
    return [each if each.daemon else _fuse_overlayfs(layout, daemon=True) for each in found if each is not None]


def going_on(layout: node_config.Layout) -> list[Plugin]:
    """Those that a node at these places may have left running, whatever its snapshotter was later."""
    return [_stargz(layout)]


def _own(name: str, layout: node_config.Layout) -> proxyplugins.ProxyPlugin:
    """Ours. A pod's user namespace is its business: else containerd would copy the whole closure to change its owners."""
    root = layout.snapshotter_root(name)
    return proxyplugins.ProxyPlugin(name, layout.node_socket, root, (proxyplugins.REMAP_IDS,), reads_annotations=True)


def _fuse_overlayfs(layout: node_config.Layout, *, daemon: bool = False) -> Plugin:
    # sqlite, for which other nodes need not wait here.
    from nixlet.snapshots import metadata  # noqa: PLC0415 (see above)

    name = containerd_config.FUSE_OVERLAYFS
    root = layout.snapshotter_root(name)
    # containerd knows what was unpacked: whoever has made the snapshots goes on with them.
    theirs = os.path.exists(os.path.join(root, _THEIR_DATABASE))
    ours = os.path.exists(metadata.database_path(root))
    daemon = daemon or theirs or (not ours and process.find_program(_FUSE_OVERLAYFS_DAEMON) is not None)
    needs = (
        Need(fuseoverlay.PROGRAM, "fuse-overlayfs"),
        # By it containerd mounts what is of this type.
        Need("mount.fuse3", "fuse3"),
        *([Need(_FUSE_OVERLAYFS_DAEMON)] if daemon else ()),
    )
    address = layout.snapshotter_socket(name)
    return Plugin(
        proxyplugins.ProxyPlugin(name, address, root) if daemon else _own(name, layout),
        daemon=_FUSE_OVERLAYFS_DAEMON if daemon else "",
        arguments=(address, root) if daemon else (),
        overlay=model.Overlay.FUSE_OVERLAYFS,
        needs=needs,
        leaves="one fuse-overlayfs for each container that runs",
    )


def stargz_config(layout: node_config.Layout) -> str:
    """The stargz snapshotter's configuration."""
    return os.path.join(layout.snapshotter_root(containerd_config.STARGZ), "config.toml")


def _stargz(layout: node_config.Layout) -> Plugin:
    name = containerd_config.STARGZ
    address, root = layout.snapshotter_socket(name), layout.snapshotter_root(name)
    return Plugin(
        proxyplugins.ProxyPlugin(name, address, root, reads_annotations=True, asks_registries=True),
        daemon=_STARGZ_DAEMON,
        arguments=("--address", address, "--root", root, "--config", stargz_config(layout)),
        goes_on=True,
        images=address,
        needs=(Need("fusermount", "fuse3"), Need(_STARGZ_DAEMON)),
        leaves="itself running, with the file systems of layers",
    )
