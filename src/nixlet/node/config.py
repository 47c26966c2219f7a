"""What a node is told (settings), and where it keeps things (layout)."""

import dataclasses
import ipaddress
import os
import re
from collections.abc import Sequence

from nixlet import errors

DEFAULT_DATA_DIR = "/var/lib/nixlet"
DEFAULT_STATE_DIR = "/run/nixlet"

#: Where ``nix:0`` references may name archives outside the store, on every node; k3s's own test has one there.
DEFAULT_ARCHIVE_DIRS = ("/tmp",)  # noqa: S108 (only files of trusted owners are taken)

#: Unix socket paths end at 108 bytes (unix(7)); containerd's shims add to ours.
_MAX_STATE_DIR = 60

#: Interface names end at 15 characters, and the kernel refuses slashes and blanks.
_BRIDGE = re.compile(r"[a-z][a-z0-9-]{0,14}")


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """What a person may set for a node.

    Attributes:
        data_dir: What must survive a reboot: containerd's content, snapshots, logs of pods, rendered configuration.
        state_dir: What must not: sockets, containerd's running state. Its length is limited by that of socket paths.
        snapshotter: containerd's snapshotter for images and containers.
        containerd: The containerd program, or a name to look up.
        runc: The OCI runtime program, or a name to look up.
        cni_bin_dirs: Where the CNI plugins are; the first that has them all is taken.
        pod_cidr: The addresses that pods get.
        bridge: The name of the bridge that pods are attached to.
        pause: The static program that holds a pod's namespaces, or a name to look up.
        archive_dirs: Where ``nix:0`` references may name archives outside the store; empty: the default ones.
        debug: Log more.
    """

    data_dir: str = DEFAULT_DATA_DIR
    state_dir: str = DEFAULT_STATE_DIR
    snapshotter: str = "nix"
    containerd: str = "containerd"
    runc: str = "runc"
    cni_bin_dirs: Sequence[str] = ("/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni")
    pod_cidr: str = "10.63.0.0/16"
    bridge: str = "nixlet0"
    pause: str = "catatonit"
    archive_dirs: Sequence[str] = ()
    debug: bool = False

    def checked(self) -> "Settings":
        """The settings with absolute directories.

        Raises:
            UsageError: A value can't be used; the sentence names the setting.
        """
        data_dir, state_dir = os.path.abspath(self.data_dir), os.path.abspath(self.state_dir)
        if self.snapshotter != "nix":
            raise errors.UsageError(
                f'the snapshotter "{self.snapshotter}" is not supported', hint="use --snapshotter nix"
            )
        for name, path in (("--data-dir", data_dir), ("--state-dir", state_dir)):
            if re.search(r"[:,\\\s\"]", path):
                raise errors.UsageError(f"{name} {path!r} holds a blank, colon, comma, quote or backslash")
        if len(state_dir) > _MAX_STATE_DIR:
            raise errors.UsageError(
                f"--state-dir {state_dir} is longer than {_MAX_STATE_DIR} characters, which socket paths don't allow"
            )
        if not _BRIDGE.fullmatch(self.bridge):
            raise errors.UsageError(
                f"--bridge {self.bridge!r} is no interface name of at most 15 lower-case characters"
            )
        try:
            network = ipaddress.ip_network(self.pod_cidr)
        except ValueError as error:
            raise errors.UsageError(f"--pod-cidr {self.pod_cidr!r} is not a network: {error}") from error
        if network.num_addresses < 8:
            raise errors.UsageError(f"--pod-cidr {self.pod_cidr} has room for fewer than five pods")
        for directory in self.archive_dirs:
            if not os.path.isabs(directory):
                raise errors.UsageError(f"--archive-dir {directory!r} must be an absolute path")
        return dataclasses.replace(self, data_dir=data_dir, state_dir=state_dir)


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """Where a node keeps things, derived from its two directories; the names are k3s's where it has one."""

    data_dir: str
    state_dir: str

    @property
    def agent(self) -> str:
        """All that this node keeps."""
        return os.path.join(self.data_dir, "agent")

    @property
    def lock(self) -> str:
        """Held by the node that uses the data directory."""
        return os.path.join(self.data_dir, "nixlet.lock")

    @property
    def containerd_root(self) -> str:
        """containerd's persistent data."""
        return os.path.join(self.agent, "containerd")

    @property
    def containerd_state(self) -> str:
        """containerd's running state."""
        return os.path.join(self.state_dir, "containerd")

    @property
    def containerd_socket(self) -> str:
        """containerd's API and CRI."""
        return os.path.join(self.containerd_state, "containerd.sock")

    @property
    def node_socket(self) -> str:
        """Our own services: snapshots, CRI images, node."""
        return os.path.join(self.containerd_state, "nix-snapshotter.sock")

    @property
    def containerd_config(self) -> str:
        """The rendered configuration."""
        return os.path.join(self.agent, "etc", "containerd", "config.toml")

    @property
    def containerd_log(self) -> str:
        """What containerd prints."""
        return os.path.join(self.containerd_root, "containerd.log")

    @property
    def cni_conf_dir(self) -> str:
        """The rendered network configuration."""
        return os.path.join(self.agent, "etc", "cni", "net.d")

    @property
    def cni_data_dir(self) -> str:
        """The address leases of host-local."""
        return os.path.join(self.state_dir, "cni")

    @property
    def images(self) -> str:
        """Image archives that ``nix:0`` references may name."""
        return os.path.join(self.agent, "images")

    @property
    def snapshotter_root(self) -> str:
        """The snapshotter's directory, where containerd would keep that of a plugin of its own."""
        return os.path.join(self.containerd_root, "io.containerd.snapshotter.v1.nix")

    @property
    def opt(self) -> str:
        """containerd's directory for installed programs."""
        return os.path.join(self.agent, "opt")

    @property
    def pods(self) -> str:
        """The logs of pods."""
        return os.path.join(self.agent, "pods")

    @property
    def runc_root(self) -> str:
        """runc's state."""
        return os.path.join(self.state_dir, "runc")

    @property
    def nri_socket(self) -> str:
        """containerd's socket for NRI plugins, kept from the system's path."""
        return os.path.join(self.containerd_state, "nri.sock")


def archive_dirs(settings: Settings, layout: Layout) -> tuple[str, ...]:
    """The directories below which ``nix:0`` references may name archives outside the store."""
    return tuple(settings.archive_dirs) or (layout.images, *DEFAULT_ARCHIVE_DIRS)
