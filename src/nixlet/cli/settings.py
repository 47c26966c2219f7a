"""The options that set a node's settings, for every verb that makes up a node or looks at how one would be."""

import os
from typing import TYPE_CHECKING, Any, NamedTuple

from nixlet.cli import grammar
from nixlet.node.settings import config, k3skeys, names

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nixlet.node.settings import configfile

_DEFAULTS = config.Settings()


class _Said(NamedTuple):
    """An option beside its flag, which the setting's name gives.

    Attributes:
        metavar: What its value is called; "BOOL" may be left out.
        text: The help.
        short: The flag of one letter.
        default: What stands for an empty default in the help.
    """

    metavar: str
    text: str
    short: str = ""
    default: str = ""


def _argument(program: str) -> _Said:
    return _Said("KEY=VALUE", f"A further argument for {program}; may be given several times.")


_SAID = {
    "rootless": _Said(
        "BOOL",
        "Run the node as an ordinary user, whose root a container's root is; its directories are the user's own then.",
    ),
    "data_dir": _Said("DIR", "What survives a reboot.", "-d"),
    "state_dir": _Said("DIR", "Sockets and running state."),
    "snapshotter": _Said(
        "NAME", "containerd's snapshotter: nix, overlayfs, native, fuse-overlayfs, or another that it has."
    ),
    "also_snapshotter": _Said(
        "NAME", "A further snapshotter, for pods whose runtime class has its name; may be given several times."
    ),
    "container_runtime_endpoint": _Said(
        "SOCKET", "Use the containerd at this socket, and start none.", default="our own containerd"
    ),
    "image_service_endpoint": _Said(
        "SOCKET", "Use the CRI image service at this socket instead of ours.", default="our own"
    ),
    "default_runtime": _Said("NAME", "containerd's runtime for pods that name none.", default="runc"),
    "pause_image": _Said("IMAGE", "The image that holds a pod's namespaces.", default="one made from --pause"),
    "private_registry": _Said("FILE", "How registries are reached (registries.yaml)."),
    "disable_default_registry_endpoint": _Said("BOOL", "Reach registries that have mirrors through those alone."),
    "system_default_registry": _Said("HOST", "The registry that the node's own images come from."),
    "airgap_extra_registry": _Said(
        "HOST", "Name preloaded images after this registry as well; may be given several times."
    ),
    "resolv_conf": _Said(
        "FILE", "Where pods look names up (resolv.conf).", default="the host's, unless that leads to this host alone"
    ),
    "selinux": _Said("BOOL", "Let containerd label containers for SELinux."),
    "nonroot_devices": _Said("BOOL", "Let a container's user own the devices that it gets."),
    "containerd": _Said("PROGRAM", "The containerd program."),
    "containerd_restart": _Said("WHEN", "on-failure: start containerd again when it dies; never: go down with it."),
    "runc": _Said("PROGRAM", "The OCI runtime program."),
    "pause": _Said("PROGRAM", "The static program that holds a pod's namespaces."),
    "cni_bin_dirs": _Said("DIR", "Where the CNI plugins are; may be given several times."),
    "pod_cidr": _Said("NETWORK", "The addresses that pods get."),
    "bridge": _Said("NAME", "The bridge that pods are attached to."),
    "archive_dirs": _Said(
        "DIR",
        "Where nix:0 references may name archives outside the store; may be given several times.",
        default="DATA_DIR/agent/images, /tmp",
    ),
    "strategy": _Said("NAME", "How containers get to see closures: auto, view or bind."),
    "unsigned_paths": _Said("RULE", "Whether images may name store paths that nobody vouches for: allow or deny."),
    "container_log_max_size": _Said("SIZE", "How large a container's log may get before it is put aside."),
    "container_log_max_files": _Said("COUNT", "How many files a container's log may have."),
    "health_address": _Said(
        "HOST:PORT",
        "Where health and metrics are served, for this host alone; none: nowhere.",
        default="STATE_DIR/health.sock",
    ),
    "log": _Said("FILE", "Write the log to a file.", "-l", default="standard error"),
    "debug": _Said("BOOL", "Log more."),
    "kubernetes": _Said(
        "WHEN",
        "Whether the node is a whole Kubernetes cluster: auto (where all programs for that are found), yes or no; or kubelet: a kubelet without a cluster, for agent/pod-manifests.",
    ),
    "kubernetes_bin_dir": _Said(
        "DIR", "Where kube-apiserver, kubelet and the others are, and kine or etcd.", default="PATH"
    ),
    "server": _Said("URL", "The server of the cluster that an agent joins, as https://HOST:6443.", "-s"),
    "kubeconfig": _Said(
        "FILE", "A kubeconfig by which an agent's kubelet asks a cluster that isn't nixlet's for its certificates."
    ),
    "token": _Said("SECRET", "What other nodes join the cluster by.", "-t", default="one that is made"),
    "token_file": _Said("FILE", "A file that holds the token."),
    "agent_token": _Said("SECRET", "What nodes join by as agents only.", default="the token"),
    "agent_token_file": _Said("FILE", "A file that holds the agents' token."),
    "node_name": _Said("NAME", "The node's name in the cluster.", default="the machine's"),
    "node_ip": _Said(
        "ADDRESS",
        "The node's address; may be given several times.",
        "-i",
        default="the one that the default route goes out from",
    ),
    "node_label": _Said("KEY=VALUE", "A label that the node registers with; may be given several times."),
    "node_taint": _Said("KEY=VALUE:EFFECT", "A taint that the node registers with; may be given several times."),
    "cluster_cidr": _Said("NETWORK", "The network that nodes' pods get parts of."),
    "service_cidr": _Said("NETWORK", "The network of services."),
    "cluster_dns": _Said("ADDRESS", "The cluster's DNS service.", default="the tenth address of --service-cidr"),
    "cluster_domain": _Said("DOMAIN", "The domain of services' names."),
    "service_node_port_range": _Said("FIRST-LAST", "The ports of NodePort services."),
    "flannel_backend": _Said(
        "NAME",
        "How flannel brings pods' packets to other nodes: vxlan or host-gw; none: nothing of nixlet's does. On agents their server's holds.",
        default="vxlan where there is a flanneld, else none",
    ),
    "flannel_iface": _Said(
        "NAME", "The interface by which flannel reaches other nodes.", default="the one with the node's address"
    ),
    "flannel_conf": _Said("FILE", "flannel's configuration (net-conf.json).", default="one that is made"),
    "tls_san": _Said("NAME", "A further name or address of the API server's; may be given several times."),
    "https_listen_port": _Said("PORT", "Where the API server listens."),
    "advertise_address": _Said("ADDRESS", "Where others reach the API server.", default="the node's address"),
    "write_kubeconfig": _Said(
        "FILE",
        "Where the administrator's kubeconfig goes.",
        default="/etc/nixlet/kubeconfig.yaml, or DATA_DIR/kubeconfig.yaml where --data-dir is not the default one",
    ),
    "write_kubeconfig_mode": _Said("MODE", "The kubeconfig's mode."),
    "write_kubeconfig_group": _Said("GROUP", "The kubeconfig's group.", default="root's"),
    "datastore_endpoint": _Said(
        "URL",
        "Where the cluster's state is kept: a database by kine, or etcd.",
        default="sqlite by kine, or an etcd of ours",
    ),
    "datastore_cafile": _Said("FILE", "The authority of the datastore's servers."),
    "datastore_certfile": _Said("FILE", "The certificate that the datastore is shown."),
    "datastore_keyfile": _Said("FILE", "The key of that certificate."),
    "cluster_init": _Said("BOOL", "Keep the cluster's state in an etcd of ours."),
    "secrets_encryption": _Said("BOOL", "Encrypt secrets in the datastore."),
    "disable": _Said(
        "NAME",
        "A manifest in DATA_DIR/server/manifests, without its ending, whose objects are deleted; coredns is the cluster's DNS. "
        "May be given several times.",
    ),
    "coredns_image": _Said("IMAGE", "The image of the cluster's DNS server.", default="made of the program coredns"),
    "disable_agent": _Said("BOOL", "Run no kubelet and no kube-proxy."),
    "disable_kube_proxy": _Said("BOOL", "Run no kube-proxy."),
    "disable_scheduler": _Said("BOOL", "Run no kube-scheduler."),
    "disable_controller_manager": _Said("BOOL", "Run no kube-controller-manager."),
    "etcd_arg": _argument("etcd"),
    "kube_apiserver_arg": _argument("kube-apiserver"),
    "kube_controller_manager_arg": _argument("kube-controller-manager"),
    "kube_scheduler_arg": _argument("kube-scheduler"),
    "kubelet_arg": _argument("kubelet"),
    "kube_proxy_arg": _argument("kube-proxy"),
}


def _option(name: str, said: _Said) -> grammar.Option:
    value = getattr(_DEFAULTS, name)
    default = said.default or (", ".join(value) if isinstance(value, tuple) else value)
    ending = f"env var: {names.variable(name)}" + (f"; default: {default}" if default else "")
    # As k3s has it: --selinux and --selinux=true say the same, and --selinux=false undoes what a file says.
    truth = isinstance(value, bool)
    kind = grammar.Truth if truth else grammar.Values if isinstance(value, tuple) else grammar.Value
    return kind(
        names.flag(name),
        *([said.short] if said.short else []),
        name=name,
        metavar="" if truth else said.metavar,
        text=f"{said.text}  [{ending}]",
    )


def _of_k3s(key: str, *, truth: bool) -> grammar.Option:
    """An option that k3s has and that means nothing here: it is told so."""
    flag = f"--{key}" if len(key) > 1 else f"-{key}"
    return (grammar.Truth if truth else grammar.Values)(flag, name=key.replace("-", "_"), hidden=True)


#: ``--config`` and an option for every setting; the verb gets them as keyword arguments, for ``load``. None has a default of its own,
#: nor an environment variable: ``configfile.load`` knows both, and what is said elsewhere.
OPTIONS = (
    grammar.Value(
        "--config",
        "-c",
        metavar="FILE",
        text="Read settings from this file and from FILE.d/*.yaml: keys are the flags below without dashes.  "
        f"[env var: {names.FILE_VARIABLE}; default: {names.DEFAULT_FILE}]",
    ),
    *(_option(name, said) for name, said in _SAID.items()),
    *(_of_k3s(key, truth=truth) for key, (_, truth) in {**k3skeys.PASSED_OVER, **k3skeys.REFUSED}.items()),
)


def shown(name: str, settings: config.Settings) -> object:
    """A setting's value for people to look at: of a secret only whether there is one."""
    value: object = getattr(settings, name)
    return "(secret)" if name in config.SECRET and value else value


def what_holds(name: str, settings: config.Settings) -> str:
    """What a setting means for a node with these settings, for a person: also where nobody said anything."""
    value = shown(name, settings)
    if isinstance(value, bool):
        return "true" if value else "false"
    text = (", ".join(value) if isinstance(value, tuple | list) else str(value)) or _SAID[name].default or "none"
    return text.replace("DATA_DIR", settings.data_dir).replace("STATE_DIR", settings.state_dir)


def described() -> "Iterator[tuple[str, str, str]]":
    """Every setting for a configuration file: its key, what it means, and its default as YAML has it."""
    import json

    for name, said in _SAID.items():
        value = getattr(_DEFAULTS, name)
        text = said.text + (f" Default: {said.default}." if said.default else "")
        yield names.key(name), text.replace("--", ""), json.dumps(value)


def load(given: dict[str, Any]) -> "configfile.Configuration":
    """The configuration that the command line, the environment and the files make together.

    Args:
        given: What ``OPTIONS`` gave the verb; other options are not looked at.

    Raises:
        NixletError: As ``configfile.load`` does.
    """
    from nixlet.node.settings import configfile

    return configfile.load(given, os.environ, file=given["config"])
