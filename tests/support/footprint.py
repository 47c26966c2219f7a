"""What pods are on a machine, by kind: what is there with them and must be gone with them."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from nixlet.host import network
from nixlet.node.ownership import claims
from support import kubernetes, nodes

#: Kinds, and their members.
Footprint = Mapping[str, frozenset[str]]

#: Below a data directory: what changes by itself, whatever pods do.
_UNSTEADY = ("server/db", "agent/containerd/io.containerd.content.v1.content", "agent/containerd/tmpmounts")

#: Where a kubelet puts logs of pods; it takes them away a minute later.
_LOGS = ("/var/log/pods", "/var/log/containers")


def of(cluster: kubernetes.Cluster, *, logs: bool = True) -> Footprint:
    """What there is at the moment.

    Args:
        cluster: The cluster, whose pods are the only ones here.
        logs: Whether pods' logs count.
    """
    shims = [
        pid for pid in nodes.processes_below(cluster.state_dir) if _argument(pid).endswith("containerd-shim-runc-v2")
    ]
    processes = nodes.with_descendants(shims)
    found = {
        "mounts": cluster.mounts(),
        "namespaces": [link for pid in processes for link in _namespaces(pid)],
        "processes": map(str, processes),
        "cgroups": cluster.cgroups("**/"),
        "rules": _rules(cluster.bridge),
        "bridge ports": network.bridge_members(cluster.bridge),
        "addresses": _addresses(),
        "directories": [each for place in (cluster.data_dir, cluster.state_dir) for each in _directories(place)],
        "snapshots": _snapshots(cluster),
        "containers": cluster.ok("ctr", "containers", "ls", "-q").split(),
        "GC roots": os.listdir(cluster.gc_roots) if cluster.gc_roots.is_dir() else (),
    }
    if logs:
        found["logs"] = [f"{place}/{name}" for place in _LOGS for name in os.listdir(place)]
    return {kind: frozenset(members) for kind, members in found.items()}


def more(after: Footprint, before: Footprint) -> dict[str, list[str]]:
    """What there is more than before, by kind; kinds of which there is no more are left out."""
    return {kind: sorted(members - before[kind]) for kind, members in after.items() if members - before[kind]}


def _argument(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0].decode()
    except OSError:
        return ""


def _namespaces(pid: int) -> list[str]:
    try:
        return [os.readlink(f"/proc/{pid}/ns/{kind}") for kind in ("mnt", "net", "pid", "ipc", "uts")]
    except OSError:
        return []


def _rules(bridge: str) -> list[str]:
    """The packet filter's rules of pods and services, without their counters, and the elements of kube-proxy's maps."""
    saved = subprocess.run(["iptables-save"], capture_output=True, text=True, check=True).stdout
    tables = subprocess.run(["nft", "list", "table", "ip", "kube-proxy"], capture_output=True, text=True, check=False)
    rules = [line for line in saved.splitlines() if line.startswith("-A ") and (bridge in line or "CNI" in line)]
    return rules + [line.strip() for line in tables.stdout.splitlines() if "endpoint-" in line or "service-" in line]


def _addresses() -> list[str]:
    """What host-local has given away (its own files' names)."""
    return [str(each) for each in Path(claims.DIRECTORY).rglob("*") if each.name[:1].isdigit()]


def _directories(place: Path) -> list[str]:
    found = []
    for directory, names, _ in os.walk(place):
        inside = os.path.relpath(directory, place)
        # What is in a container's root or a volume is the pod's own affair.
        names[:] = [
            name
            for name in names
            if not os.path.ismount(f"{directory}/{name}") and os.path.normpath(f"{inside}/{name}") not in _UNSTEADY
        ]
        found += [f"{directory}/{name}" for name in names]
    return found


def _snapshots(cluster: kubernetes.Cluster) -> list[str]:
    listed = cluster.ok("ctr", "snapshots", "--snapshotter", "nix", "ls").splitlines()[1:]
    return [line.split()[0] for line in listed]
