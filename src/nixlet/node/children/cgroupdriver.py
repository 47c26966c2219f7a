"""Who makes the cgroups of pods: systemd, or the runtime by itself (Kubernetes: "cgroup drivers"). containerd and a kubelet must be of one mind.

A kubelet that finds no cgroup of its own kind for a pod that runs ends the pod and starts it anew. So a node changes its mind only where no
pod of a kubelet's is left.
"""

import glob
import json
import os
import tomllib
from collections.abc import Mapping
from typing import Any

from nixlet.containerd import runtimes, tomlread
from nixlet.host import cgroups, userns
from nixlet.node.settings import config as node_config

#: The drivers, in a kubelet's words.
SYSTEMD, CGROUPFS = "systemd", "cgroupfs"

#: The topmost cgroup of a kubelet's pods, as part of the names of those below it.
_PODS = "kubepods"


def wanted(settings: node_config.Settings, layout: node_config.Layout) -> str:
    """The driver that the node would have: what its kubelet is told, that of the pods that are there, what the machine allows.

    Args:
        settings: The node's.
        layout: Where things are.
    """
    said = node_config.kubelet_argument(settings, "cgroup-driver")
    if said in {SYSTEMD, CGROUPFS}:
        return said
    # (of two kinds one has to start anew)
    there = of_pods(layout)
    return there.pop() if len(there) == 1 else of_machine()


def of_machine() -> str:
    """What the machine allows: systemd, where this process is a service of its, and is handed what pods need."""
    booted = cgroups.systemd_runs() and cgroups.systemd_makes_ours()
    return SYSTEMD if booted and not userns.is_inside() else CGROUPFS


def of_pods(layout: node_config.Layout) -> set[str]:
    """The drivers by which kubelets had the containers made that are there now.

    containerd keeps each container's specification beside its state (OCI runtime specification: ``linux.cgroupsPath``), and runc obeys it until the
    container's end.
    """
    bundles = os.path.join(glob.escape(layout.containerd_state), "io.containerd.runtime.v2.task", "k8s.io", "*")
    found = set()
    for path in glob.iglob(os.path.join(bundles, "config.json")):
        place = _cgroup(path)
        if _PODS in place:
            # runc's words for systemd: slice, prefix and name.
            found.add(SYSTEMD if place.partition(":")[0].endswith(".slice") else CGROUPFS)
    return found


def _cgroup(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return str(json.load(file)["linux"]["cgroupsPath"])
    except (OSError, ValueError, LookupError, TypeError):
        # It goes at this moment, or has no cgroup.
        return ""


def of_containerd(table: Mapping[str, Any]) -> str:
    """What a containerd with this configuration tells a kubelet that asks it (containerd 2): the default runtime's, else the first one's that has any."""
    plugin = "io.containerd.grpc.v1.cri" if table["version"] == 2 else "io.containerd.cri.v1.runtime"
    said: Mapping[str, Any] = tomlread.at(table, ("plugins", plugin, "containerd")) or {}
    there: Mapping[str, Any] = said.get("runtimes") or {}
    default = said.get("default_runtime_name")
    for name in sorted(there, key=lambda each: (each != default, each)):
        if there[name].get("runtime_type") == runtimes.RUNC_V2:
            return SYSTEMD if (there[name].get("options") or {}).get("SystemdCgroup") else CGROUPFS
    return SYSTEMD if cgroups.systemd_runs() else CGROUPFS


def written(layout: node_config.Layout) -> str:
    """What the node's containerd was told at its last start; empty: it hasn't been started yet.

    Raises:
        OSError: Its configuration can't be read.
    """
    try:
        with open(layout.containerd_config, "rb") as file:
            return of_containerd(tomllib.load(file))
    except FileNotFoundError:
        return ""
