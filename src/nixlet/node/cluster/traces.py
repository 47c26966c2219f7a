"""What a cluster has on its machine, for whoever takes its node away: files, mounts, cgroups, a proxy's rules, logs in shared places."""

import contextlib
import logging
import os
from collections.abc import Collection, Iterator, Sequence

from nixlet import errors
from nixlet.cluster import kubeconfigs
from nixlet.host import iptables, mounts, process, unixsocket
from nixlet.node.cluster.children import preparing
from nixlet.node.cluster.controlplane import deploying
from nixlet.node.cluster.network import flannel, podnetwork
from nixlet.node.cluster.preflight import finding, kernel, made, mapping, others, versions
from nixlet.node.settings import config as node_config
from nixlet.node.settings import kubeletfiles

#: Where kubelets put logs of pods, and links to those of containers, whatever they are told about their own directory.
_POD_LOGS, _CONTAINER_LOGS = "/var/log/pods", "/var/log/containers"

#: Where device plugins look for a kubelet, likewise.
_DEVICE_PLUGINS = "/var/lib/kubelet/device-plugins"

#: The cgroup of all pods, and those of their classes in it.
_PODS, _CLASSES = "kubepods", ("", "burstable", "besteffort")

#: Seconds for systemd to give slices up.
_STOP_TIMEOUT = 30.0

#: A kubelet's chains in the packet filter (pkg/kubelet, kubelet_network_linux.go).
_CHAINS = ("KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY", "KUBE-FIREWALL")

#: Seconds for the proxy to take its rules back.
_CLEANUP_TIMEOUT = 60.0

_AGENT_FILES = (
    "kubelet.kubeconfig", "kubeproxy.kubeconfig", "client-ca.crt", "server-ca.crt", "client-kubelet.crt", "client-kubelet.key",
    "serving-kubelet.crt", "serving-kubelet.key", "client-kube-proxy.crt", "client-kube-proxy.key",
    "cluster.json", "node-password", "bootstrap.kubeconfig", "guest.json",
)  # fmt: skip

#: What a kubelet makes in its directory (pkg/kubelet, kubelet_getters.go and its state files): no more goes where a person has chosen it.
_OF_KUBELETS = (
    "pods", "plugins", "plugins_registry", "plugin-containers", "pod-resources", "pods-api", "checkpoints", "image_manager", "pki",
    "allocated_pods_state", "actuated_pods_state", "cpu_manager_state", "memory_manager_state", "dra_manager_state", "dra_health_state",
    "graceful_node_shutdown_state",
)  # fmt: skip

_SERVER_FILES = ("tls", "cred", "db", "token", "node-token", "agent-token", ".lock")

_log = logging.getLogger("nixlet.cluster")


def trees(settings: node_config.Settings, layouts: Collection[node_config.Layout]) -> Iterator[str]:
    """The files and directories of a cluster, whether they are there or not.

    Args:
        settings: Those of the node's last start.
        layouts: The node's directories, with each of its state directories.
    """
    for layout in layouts:
        yield os.path.dirname(layout.kine_socket)
        yield versions.memory(layout)
        yield deploying.cache(layout)
        yield os.path.dirname(flannel.subnet_file(layout))
    layout = settings.layout
    yield from (os.path.join(layout.server, name) for name in _SERVER_FILES)
    yield from (layout.node(name) for name in _AGENT_FILES)
    yield podnetwork.memory(layout)
    yield flannel.memory(layout)
    yield flannel.configuration(layout)
    yield made.memory(layout)
    yield kernel.settings_file(layout)
    yield from deploying.written(layout)
    yield preparing.logs_dir(layout)
    yield kubeletfiles.defaults(layout)
    yield kubeletfiles.named(layout)
    yield from of_kubelet(settings)
    if _is_our_kubeconfig(settings):
        yield mapping.kubeconfig_path(settings)


def of_kubelet(settings: node_config.Settings) -> list[str]:
    """What of its directory is the kubelet's: all of it, or where a person has named it, what it makes there; much else may be in that."""
    directory = preparing.kubelet_dir(settings)
    if not node_config.kubelet_argument(settings, "root-dir"):
        return [directory]
    return [os.path.join(directory, name) for name in _OF_KUBELETS]


def _is_our_kubeconfig(settings: node_config.Settings) -> bool:
    """Whether the administrator's file is for this cluster: another node may have written it since then."""
    with contextlib.suppress(OSError, errors.NixletError):
        found = kubeconfigs.read(mapping.kubeconfig_path(settings))
        with open(settings.layout.tls("server-ca.crt"), "rb") as file:
            return found.authority_data == file.read()
    return False


def pods(settings: node_config.Settings) -> frozenset[str]:
    """The UIDs of the pods that the node's kubelet has, running or not."""
    with contextlib.suppress(OSError):
        return frozenset(os.listdir(os.path.join(preparing.kubelet_dir(settings), "pods")))
    return frozenset()


def shared(uids: Collection[str]) -> list[str]:
    """What pods have left in places that all kubelets of a machine share."""
    logs = [
        os.path.join(_POD_LOGS, name) for name in _names(_POD_LOGS) if name.rpartition("_")[2] in uids and "_" in name
    ]
    found = list(logs)
    for name in _names(_CONTAINER_LOGS):
        link = os.path.join(_CONTAINER_LOGS, name)
        with contextlib.suppress(OSError):
            if any(os.readlink(link).startswith(f"{log}/") for log in logs):
                found.append(link)
    socket = os.path.join(_DEVICE_PLUGINS, "kubelet.sock")
    if uids and os.path.lexists(socket) and not unixsocket.is_served(socket):
        found.append(socket)
    return found


def _names(directory: str) -> list[str]:
    with contextlib.suppress(OSError):
        return sorted(os.listdir(directory))
    return []


async def remove_cgroups(settings: node_config.Settings, uids: Collection[str]) -> None:
    """Remove the cgroups of pods that have ended, and those around them.

    One that a process is in stays, since the kernel keeps it. One that is empty may be another kubelet's while that runs; then those of our own
    pods go alone. Else all go: of pods that are gone for longer there is no other trace.
    """
    another = others.run(others.KUBELET)
    root = _cgroup_root(settings).strip("/")
    above = root.split("/") if root else []
    classes = [[name] if name else [] for name in _CLASSES]
    doomed = [[_PODS, *name, f"pod{uid}"] for name in classes for uid in uids] if another else [[_PODS]]
    hierarchies = [entry.path for entry in mounts.table() if entry.fstype in {"cgroup", "cgroup2"}]
    slices = [_slice([*above, *names]) for names in doomed]
    await _stop_slices(slices, hierarchies)
    for hierarchy in hierarchies:
        top = os.path.join(hierarchy, root, _PODS)
        # (of version 1 systemd takes away those of its own controllers alone)
        for path in (
            os.path.join(hierarchy, each) for each in [*("/".join([*above, *names]) for names in doomed), *slices]
        ):
            # From the leaves on; the files in them are the kernel's, and go with them.
            for directory, _, _ in sorted(os.walk(path), key=lambda found: len(found[0]), reverse=True):
                with contextlib.suppress(OSError):
                    os.rmdir(directory)
        if os.path.isdir(top) and not another:
            _log.warning("the cgroup %s stays: there are processes in it", top)


def _cgroup_root(settings: node_config.Settings) -> str:
    """The cgroup that those of all pods are in."""
    try:
        return kubeletfiles.argument(settings, settings.layout, "cgroup-root")
    except errors.NixletError as error:
        _log.warning("cgroups of pods may stay: %s", error, extra={"hint": error.hint})
        return ""


def _slice(names: Sequence[str]) -> str:
    """The place of a kubelet's cgroup where systemd makes it: each slice is named after those that it is in (systemd.slice(5))."""
    escaped = [name.replace("-", "_") for name in names]
    return "/".join(f"{'-'.join(escaped[: end + 1])}.slice" for end in range(len(escaped)))


async def _stop_slices(places: Collection[str], hierarchies: Collection[str]) -> None:
    """Have systemd give up slices with nothing in them, and their cgroups with them."""
    there = [place for place in places if any(os.path.isdir(os.path.join(each, place)) for each in hierarchies)]
    busy = [place for place in there if any(_is_busy(os.path.join(each, place)) for each in hierarchies)]
    for place in busy:
        _log.warning("the slice %s stays: there are processes in it", os.path.basename(place))
    if idle := [os.path.basename(place) for place in there if place not in busy]:
        try:
            (await process.run(["systemctl", "stop", *idle], timeout=_STOP_TIMEOUT)).check()
        except errors.NixletError as error:
            _log.warning("systemd keeps the slices %s: %s", ", ".join(idle), error, extra={"hint": error.hint})


def _is_busy(top: str) -> bool:
    for directory, _, _ in os.walk(top):
        with contextlib.suppress(OSError), open(os.path.join(directory, "cgroup.procs"), encoding="ascii") as file:
            if file.read(1):
                return True
    return False


def put_settings_back(settings: node_config.Settings) -> None:
    """Put the machine's settings back that the kubelet has changed, unless another one relies on them."""
    if not others.run(others.KUBELET):
        kernel.put_settings_back(settings.layout)


async def remove_rules(settings: node_config.Settings) -> None:
    """Remove what the kubelet and flannel have in the packet filter, flannel's routes and interface, and have the proxy take its rules back.

    What can't be removed is told.
    """
    if os.path.exists(preparing.kubelet_dir(settings)) and not others.run(others.KUBELET, here=True):
        await iptables.remove_chains(_CHAINS)
    await flannel.remove(settings.layout)
    if not os.path.exists(settings.layout.node("kubeproxy.kubeconfig")):
        return
    if others.run(others.PROXY, here=True):
        # Its rules have the same names, and services of its cluster would be gone.
        _log.warning(
            "another kube-proxy runs on this machine: the rules of this node's stay until that one makes its own anew, or the machine starts anew"
        )
        return
    program = finding.program("kube-proxy", settings)
    if program is None:
        _log.warning(
            "kube-proxy is not there any more to take its rules back: they stay until the machine's next start"
        )
        return
    try:
        (await process.run([program, "--cleanup"], timeout=_CLEANUP_TIMEOUT)).check()
    except errors.NixletError as error:
        _log.warning("kube-proxy can't take its rules back: %s", error, extra={"hint": error.hint})
