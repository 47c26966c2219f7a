"""What a node is told (settings), and where it keeps things (layout)."""

import dataclasses
import os
from collections.abc import Sequence

from nixlet.cluster import layout
from nixlet.node.settings import names
from nixlet.services import nodeaddress

#: Where ``nix:0`` references may name archives outside the store, on every node; k3s's own test has one there.
DEFAULT_ARCHIVE_DIRS = ("/tmp",)  # noqa: S108 (only files of trusted owners are taken)

#: The values of ``containerd_restart``.
RESTARTS = ("on-failure", "never")

#: The value of ``health_address`` that stands for nowhere.
NO_HEALTH = "none"

#: What an endpoint may begin with; nothing else than Unix sockets is talked to.
UNIX = "unix://"

#: The values of ``kubernetes``.
KUBELET = "kubelet"
KUBERNETES = ("auto", "yes", "no", KUBELET)

#: The values of ``flannel_backend`` with which there is a flannel.
FLANNEL_BACKENDS = ("vxlan", "host-gw")

#: Settings whose values are secrets: shown nowhere, and written down nowhere but in files for them.
SECRET = frozenset(("token", "agent_token", "datastore_endpoint"))


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """What a person may set for a node.

    Attributes:
        rootless: The node is an ordinary user's, in namespaces that rootlesskit makes.
        data_dir: What must survive a reboot: containerd's content, snapshots, logs of pods, rendered configuration.
        state_dir: What must not: sockets, containerd's running state. Its length is limited by that of socket paths.
        snapshotter: containerd's snapshotter for images and containers.
        also_snapshotter: Further ones, each for the pods whose runtime has its name.
        containerd: The containerd program, or a name to look up.
        runc: The OCI runtime program, or a name to look up.
        cni_bin_dirs: Where the CNI plugins are; the first that has them all is taken.
        pod_cidr: The addresses that pods get.
        bridge: The name of the bridge that pods are attached to.
        pause: The static program that holds a pod's namespaces, or a name to look up.
        archive_dirs: Where ``nix:0`` references may name archives outside the store; empty: the default ones.
        container_runtime_endpoint: The socket of a containerd that is there already (``unix://`` or a path), to use
            instead of starting one; empty: start one.
        image_service_endpoint: The socket of another CRI image service (``unix://`` or a path), named to those who ask
            for one in place of ours; empty: ours.
        private_registry: The file that says how registries are reached (``registries.yaml``); it need not exist.
        pause_image: The image that holds a pod's namespaces; empty: one that is built around ``pause``.
        default_runtime: The containerd runtime of pods that name none; empty: runc.
        disable_default_registry_endpoint: Registries with mirrors are reached through those alone.
        system_default_registry: The registry that the node's own images come from; empty: the one they name.
        airgap_extra_registry: Registries whose names preloaded images get as well, for a node that can't reach them.
        resolv_conf: Where pods look names up, a file as resolv.conf(5) has it; empty: where the host does, or, if that leads to
            this host alone, behind systemd-resolved or at ``Layout.resolv_conf``.
        selinux: containerd labels containers for SELinux.
        nonroot_devices: Containers of ordinary users own the devices that they get.
        containerd_restart: "on-failure": containerd is started again, ever later, when it dies; "never": the node goes
            down with it.
        strategy: How containers get to see closures: "auto" (the first that works), "view" or "bind".
        unsigned_paths: Whether images may name store paths that nobody vouches for: "allow" or "deny".
        container_log_max_size: How large a container's log may get before it is put aside: a quantity of bytes as Kubernetes
            writes them.
        container_log_max_files: How many files a container's log may have, the one that is written included.
        health_address: Where the node's health and metrics are served: ``127.0.0.1:PORT`` or another loopback address;
            empty: at the Unix socket ``Layout.health_socket``; "none": nowhere.
        log: The file that the node's log goes to; empty: standard error.
        debug: Log more.
        kubernetes: Whether the node is a whole Kubernetes cluster: "auto" (where all programs for that are found), "yes" or "no"; or
            "kubelet": a kubelet without a cluster.
        kubernetes_bin_dir: Where Kubernetes' programs are, and the datastore's; empty: on PATH.
        server: The API server's URL of the cluster that an agent joins; empty: it joins none.
        kubeconfig: A kubeconfig file by which an agent's kubelet asks anybody's cluster for its certificates; empty: it joins by a token.
        token: The secret that other nodes join by; empty: one that is made. An agent's: the one that it joins by.
        token_file: A file that holds it.
        agent_token: Another one, by which nodes join as agents only; empty: the same.
        agent_token_file: A file that holds it.
        node_name: The Node object's name; empty: the machine's.
        node_ip: The node's addresses, at most one of each IP version; empty: the one that the default route goes out from.
        node_label: Labels that the node registers with.
        node_taint: Taints that the node registers with.
        cluster_cidr: The networks that nodes' pods get parts of.
        service_cidr: The networks of services.
        cluster_dns: The addresses of the cluster's DNS service; empty: the tenth of each services' network.
        cluster_domain: The domain of services' names.
        service_node_port_range: Ports of NodePort services, as ``FIRST-LAST``.
        flannel_backend: How flannel brings pods' packets to other nodes: one of ``FLANNEL_BACKENDS``, or ``none``: nothing of ours does; empty:
            by vxlan where there is a flannel.
        flannel_iface: The interface by which it does; empty: the one with the node's address.
        flannel_conf: A file with flannel's configuration; empty: one that is made.
        tls_san: More names and addresses for the API server's certificate.
        https_listen_port: Where the API server listens.
        advertise_address: Where others reach the API server; empty: the node's address.
        write_kubeconfig: Where the administrator's kubeconfig goes; empty: as ``node.cluster.preflight.mapping.kubeconfig_path`` says.
        write_kubeconfig_mode: Its mode, in octal digits.
        write_kubeconfig_group: Its group; empty: root's.
        datastore_endpoint: Where the cluster's state is kept; empty: in ``server/db`` by a kine of ours, or an etcd where there is no kine.
        datastore_cafile: The authority of the datastore's servers.
        datastore_certfile: The certificate that they are shown.
        datastore_keyfile: The key of that.
        cluster_init: Keep the cluster's state in an etcd of ours, which others can join.
        secrets_encryption: Secrets are encrypted in the datastore.
        disable: Manifests whose objects are deleted from the cluster, by their names without endings, or directories of such.
        coredns_image: The image of the cluster's DNS server; empty: made of the program that the machine has.
        disable_agent: Run no kubelet and no kube-proxy.
        disable_kube_proxy: Run no kube-proxy.
        disable_scheduler: Run no kube-scheduler.
        disable_controller_manager: Run no kube-controller-manager.
        etcd_arg: Arguments for etcd, as ``cluster.arguments.merged`` takes them; the following are such for the programs that they are
            named after.
    """

    rootless: bool = False
    data_dir: str = names.DEFAULT_DATA_DIR
    state_dir: str = names.DEFAULT_STATE_DIR
    snapshotter: str = "nix"
    also_snapshotter: Sequence[str] = ()
    containerd: str = "containerd"
    runc: str = "runc"
    cni_bin_dirs: Sequence[str] = ("/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni")
    pod_cidr: str = "10.63.0.0/16"
    bridge: str = "nixlet0"
    pause: str = "catatonit"
    archive_dirs: Sequence[str] = ()
    container_runtime_endpoint: str = ""
    image_service_endpoint: str = ""
    private_registry: str = names.DEFAULT_PRIVATE_REGISTRY
    pause_image: str = ""
    default_runtime: str = ""
    disable_default_registry_endpoint: bool = False
    system_default_registry: str = ""
    airgap_extra_registry: Sequence[str] = ()
    resolv_conf: str = ""
    selinux: bool = False
    nonroot_devices: bool = False
    containerd_restart: str = "on-failure"
    strategy: str = "auto"
    unsigned_paths: str = "allow"
    container_log_max_size: str = "10Mi"
    container_log_max_files: str = "5"
    health_address: str = ""
    log: str = ""
    debug: bool = False
    kubernetes: str = "auto"
    kubernetes_bin_dir: str = ""
    server: str = ""
    kubeconfig: str = ""
    token: str = dataclasses.field(default="", repr=False)
    token_file: str = ""
    agent_token: str = dataclasses.field(default="", repr=False)
    agent_token_file: str = ""
    node_name: str = ""
    node_ip: Sequence[str] = ()
    node_label: Sequence[str] = ()
    node_taint: Sequence[str] = ()
    cluster_cidr: Sequence[str] = ("10.42.0.0/16",)
    service_cidr: Sequence[str] = ("10.43.0.0/16",)
    cluster_dns: Sequence[str] = ()
    cluster_domain: str = "cluster.local"
    service_node_port_range: str = "30000-32767"
    flannel_backend: str = ""
    flannel_iface: str = ""
    flannel_conf: str = ""
    tls_san: Sequence[str] = ()
    https_listen_port: str = "6443"
    advertise_address: str = ""
    write_kubeconfig: str = ""
    write_kubeconfig_mode: str = "600"
    write_kubeconfig_group: str = ""
    datastore_endpoint: str = dataclasses.field(default="", repr=False)
    datastore_cafile: str = ""
    datastore_certfile: str = ""
    datastore_keyfile: str = ""
    cluster_init: bool = False
    secrets_encryption: bool = False
    disable: Sequence[str] = ()
    coredns_image: str = ""
    disable_agent: bool = False
    disable_kube_proxy: bool = False
    disable_scheduler: bool = False
    disable_controller_manager: bool = False
    etcd_arg: Sequence[str] = ()
    kube_apiserver_arg: Sequence[str] = ()
    kube_controller_manager_arg: Sequence[str] = ()
    kube_scheduler_arg: Sequence[str] = ()
    kubelet_arg: Sequence[str] = ()
    kube_proxy_arg: Sequence[str] = ()

    @property
    def layout(self) -> "Layout":
        """Where a node with these settings keeps things."""
        return Layout(self.data_dir, self.state_dir)


class Layout(layout.Layout):
    """Where a node keeps things, derived from its two directories; the names are k3s's where it has one."""

    __slots__ = ()

    @property
    def lock(self) -> str:
        """Held by the node that uses the data directory."""
        return os.path.join(self.data_dir, "nixlet.lock")

    @property
    def state_lock(self) -> str:
        """Held by the node that uses the state directory."""
        return os.path.join(self.state_dir, "state.lock")

    @property
    def rootlesskit_state(self) -> str:
        """What rootlesskit says of the namespaces of an ordinary user's node."""
        return os.path.join(self.state_dir, "rootlesskit")

    @property
    def containerd_root(self) -> str:
        """containerd's persistent data."""
        return os.path.join(self.agent, "containerd")

    @property
    def containerd_database(self) -> str:
        """What containerd knows: images, containers, pods."""
        return os.path.join(self.containerd_root, "io.containerd.metadata.v1.bolt", "meta.db")

    @property
    def containerd_state(self) -> str:
        """containerd's running state."""
        return os.path.join(self.state_dir, "containerd")

    @property
    def containerd_socket(self) -> str:
        """containerd's API and CRI."""
        return os.path.join(self.containerd_state, "containerd.sock")

    @property
    def control_socket(self) -> str:
        """Where the command line asks the node (Varlink)."""
        return os.path.join(self.state_dir, nodeaddress.SOCKET)

    @property
    def node_socket(self) -> str:
        """What containerd and CRI clients ask us for: snapshots and images."""
        return os.path.join(self.containerd_state, "nix-snapshotter.sock")

    @property
    def containerd_answers(self) -> str:
        """What its containerd said of itself when it was asked, in this boot of the machine."""
        return os.path.join(self.state_dir, "containerd.json")

    @property
    def containerd_config(self) -> str:
        """The rendered configuration."""
        return os.path.join(self.agent, "etc", "containerd", "config.toml")

    @property
    def certs_dir(self) -> str:
        """How containerd reaches registries: ``HOST/hosts.toml`` (CRI's ``config_path``)."""
        return os.path.join(self.agent, "etc", "containerd", "certs.d")

    def template(self, version: int) -> str:
        """The user's template of the rendered configuration, for a version of containerd's format (2, 3 or 4)."""
        return os.path.join(self.agent, "etc", "containerd", f"{_config_stem(version)}.toml.tmpl")

    def dropin_dir(self, version: int) -> str:
        """The user's additions to the rendered configuration, for a version of containerd's format (2, 3 or 4)."""
        return os.path.join(self.agent, "etc", "containerd", f"{_config_stem(version)}.toml.d")

    @property
    def crictl_config(self) -> str:
        """crictl's configuration (``crictl --config``), with this node's sockets."""
        return os.path.join(self.agent, "etc", "crictl.yaml")

    @property
    def resolv_conf(self) -> str:
        """Where pods look names up if the host does it in itself."""
        return os.path.join(self.agent, "etc", "resolv.conf")

    @property
    def health_socket(self) -> str:
        """The node's health and metrics, where no other address is set."""
        return os.path.join(self.state_dir, "health.sock")

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
        """Image archives that are imported at start, and that ``nix:0`` references may name."""
        return os.path.join(self.agent, "images")

    def snapshotter_root(self, name: str) -> str:
        """A snapshotter's directory, where containerd would keep that of a plugin of its own."""
        return os.path.join(self.containerd_root, f"io.containerd.snapshotter.v1.{name}")

    def snapshotter_socket(self, name: str) -> str:
        """Where a snapshotter serves that is a program of its own."""
        return os.path.join(self.containerd_state, f"{name}-snapshotter.sock")

    def snapshotter_log(self, name: str) -> str:
        """What such a program prints."""
        return os.path.join(self.containerd_root, f"{name}-snapshotter.log")

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


def _config_stem(version: int) -> str:
    """k3s's names: the format without a number is version 2, those after it carry theirs."""
    return "config" if version == 2 else f"config-v{version}"


def kubelet_argument(settings: Settings, key: str) -> str:
    """What a person has said for one of the kubelet's arguments; empty: nothing."""
    said = [each.removeprefix("--").partition("=") for each in settings.kubelet_arg]
    return next((value for name, _, value in reversed(said) if name == key), "")


def archive_dirs(settings: Settings, layout: Layout) -> tuple[str, ...]:
    """The directories below which ``nix:0`` references may name archives outside the store."""
    return tuple(settings.archive_dirs) or (layout.images, *DEFAULT_ARCHIVE_DIRS)
