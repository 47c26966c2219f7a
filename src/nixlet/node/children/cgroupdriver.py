"""Who makes the cgroups of pods: systemd, or the runtime by itself (Kubernetes: "cgroup drivers"). containerd and a kubelet must be of one mind.

A kubelet that finds no cgroup of its own kind for a pod that runs ends the pod and starts it anew. So a node changes its mind only where no
pod of a kubelet's is left.
"""

import contextlib
import glob
import json
import logging
import os
import tomllib
from collections.abc import Mapping
from typing import Any

from nixlet.containerd import runtimes
from nixlet.host import cgroups, userns
from nixlet.node.settings import config as node_config
from nixlet.node.settings import kubeletfiles

#: The drivers, in a kubelet's words.
SYSTEMD, CGROUPFS = "systemd", "cgroupfs"

#: The topmost cgroup of a kubelet's pods, as part of the names of those below it.
_PODS = "kubepods"

_log = logging.getLogger("nixlet.node")


def wanted(settings: node_config.Settings, layout: node_config.Layout) -> str:
    """The driver that the node would have: what its kubelet is told, that of the pods that are there, what the machine allows.

    Args:
        settings: The node's.
        layout: Where things are.

    Raises:
        NixletError: As ``kubeletfiles.said``.
    """
    return _decided(settings, layout) or of_machine()


def at_last_start(settings: node_config.Settings, layout: node_config.Layout) -> str:
    """The same for somebody who looks, and who isn't the service that the node is: what that would be allowed is known by its last start.

    Raises:
        NixletError: As ``kubeletfiles.said``.
    """
    return _decided(settings, layout) or of_last_start(layout) or of_machine()


def _decided(settings: node_config.Settings, layout: node_config.Layout) -> str:
    """The driver that it has to be whatever the machine allows; empty: there is none."""
    said = kubeletfiles.argument(settings, layout, "cgroup-driver")
    if said in {SYSTEMD, CGROUPFS}:
        return said
    # (of two kinds one has to start anew)
    there = of_pods(layout)
    return there.pop() if len(there) == 1 else ""


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
    there, default = runtimes.configured(table)
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


def of_last_start(layout: node_config.Layout) -> str:
    """The same, as far as it can be read."""
    # (k3s's is read as well, and may be of any version)
    with contextlib.suppress(OSError, ValueError, LookupError):
        return written(layout)
    return ""


def tell(settings: node_config.Settings, layout: node_config.Layout, driver: str, *, is_asked: bool) -> None:
    """Say what becomes of pods that were made in another way than the next ones.

    Args:
        settings: The node's.
        layout: Where things are.
        driver: What containerd is told.
        is_asked: Kubelets ask containerd itself (from 1.34 on), which has an answer.
    """
    there = of_pods(layout)
    if there - {driver}:
        _log.warning(
            "pods run in cgroups of the driver %s, and new ones get %s: the kubelet ends those and starts them anew",
            " and ".join(sorted(there)),
            driver,
        )
    elif there and driver != (best := of_machine()):
        _log.info(
            "pods stay with the cgroup driver %s, which those that run have; where none runs it is %s", driver, best
        )
    said = kubeletfiles.argument(settings, layout, "cgroup-driver")
    if said and said != driver:
        what = "which counts for kubelets from 1.34 on" if is_asked else "so that no pod will start"
        _log.warning(
            "the kubelet is told the cgroup driver %s, and containerd has %s, %s",
            said,
            driver,
            what,
            extra={
                "hint": "take it out of --kubelet-arg and of agent/etc/kubelet.conf.d, or SystemdCgroup out of containerd's template and drop-ins"
            },
        )
