"""What pods are on a machine, by kind: what is there with them and must be gone with them."""

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from nixlet.host import network
from nixlet.node.settings import config
from support import kubernetes, nodes

#: Kinds, and their members.
Footprint = Mapping[str, frozenset[str]]

#: Below a data directory: what changes by itself, whatever pods do.
_UNSTEADY = (
    *("server/db", "agent/containerd/io.containerd.content.v1.content", "agent/containerd/tmpmounts"),
    # Directories for the snapshots to come: some that are made before they are needed.
    "agent/containerd/io.containerd.snapshotter.v1.nix/spare",
)

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
        "cgroups": _cgroups(cluster),
        "rules": [*service_rules(), *_pod_rules(cluster.bridge)],
        "bridge ports": network.bridge_members(cluster.bridge),
        "addresses": _addresses(cluster),
        "directories": [each for place in (cluster.data_dir, cluster.state_dir) for each in _directories(place)],
        "snapshots": _snapshots(cluster),
        "containers": containers(cluster),
        "GC roots": os.listdir(cluster.gc_roots) if cluster.gc_roots.is_dir() else (),
    }
    if logs:
        found["logs"] = [f"{place}/{name}" for place in _LOGS for name in os.listdir(place)]
    return {kind: frozenset(members) for kind, members in found.items()}


def await_no_more_containers(cluster: kubernetes.Cluster, before: Footprint) -> None:
    """Wait until containerd has removed all containers that there were not before.

    Their snapshots go with its collector's next run, to which the removal of an image leads.
    """
    kubernetes.until(lambda: not containers(cluster) - before["containers"], "containerd has none of the containers")


def containers(cluster: kubernetes.Cluster) -> frozenset[str]:
    """containerd's containers, sandboxes too."""
    return frozenset(cluster.ok("ctr", "containers", "ls", "-q").split())


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


def service_rules() -> list[str]:
    """kube-proxy's chains for services, and each address that one leads to; none of the cluster's own, which come in their time."""
    listed = subprocess.run(["nft", "list", "table", "ip", "kube-proxy"], capture_output=True, text=True, check=False)
    found = []
    for chain in listed.stdout.split("\tchain ")[1:]:
        name, _, rules = chain.partition(" {")
        # One that isn't used any more is emptied, and goes later.
        is_used = bool(rules.replace("}", "").strip())
        if is_used and "-default/" in name and "-default/kubernetes/" not in name:
            found += [name, *(f"{name} to {address}" for address in re.findall(r"[\d.]+ \. \d+", rules))]
    return found


def _pod_rules(bridge: str) -> list[str]:
    """What the packet filter has for addresses and ports of pods."""
    saved = subprocess.run(["iptables-save"], capture_output=True, text=True, check=True).stdout
    return [line for line in saved.splitlines() if line.startswith("-A ") and (bridge in line or "CNI" in line)]


def _addresses(cluster: kubernetes.Cluster) -> list[str]:
    """What host-local has given away, by its own files' names."""
    layout = config.Layout(str(cluster.data_dir), str(cluster.state_dir))
    files = [f"{place}/{name}" for place, _, names in os.walk(layout.cni_data_dir) for name in names]
    return [each for each in files if os.path.basename(each)[:1].isdigit()]


def _cgroups(cluster: kubernetes.Cluster) -> list[str]:
    """Those of pods and containers; those of kinds of pods stay."""
    # (os.walk bears with directories that go meanwhile, which glob doesn't)
    places = [place for top in cluster.cgroups("kubepods") for place, _, _ in os.walk(top)]
    return [place for place in places if "/pod" in place.partition("/kubepods")[2]]


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
