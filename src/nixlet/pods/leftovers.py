"""What a runtime that was killed leaves of a pod and never looks at again: shims, processes, network namespaces, addresses.

Only what belongs to the IDs of a pod that is known to be unfinished is touched.
"""

import contextlib
import glob
import json
import os
import signal
from collections.abc import Collection, Iterator
from typing import Any

from nixlet import errors
from nixlet.host import iptables, mounts

#: Where containerd's CNI library keeps what the plugins answered, by network, container and interface.
_RESULTS = "/var/lib/cni/results"

#: What the CNI library calls the pod's UID among its arguments.
_UID = "K8S_POD_UID"

#: Where containerd mounts the network namespaces of pods.
_NAMESPACES = ("/run/netns/", "/var/run/netns/")


def networked(uid: str) -> set[str]:
    """The sandboxes, by ID, that the CNI plugins gave a network for the pod of a UID."""
    found = set()
    for path in glob.iglob(os.path.join(glob.escape(_RESULTS), "*")):
        result = _read(path)
        arguments = {str(each[0]): str(each[1]) for each in result.get("cniArgs") or () if len(each) == 2}
        if arguments.get(_UID) == uid:
            found.add(str(result.get("containerId", "")))
    return found - {""}


async def end(ids: Collection[str], leases: str) -> None:
    """End what is left of containers and sandboxes, and give back what they hold.

    Args:
        ids: Theirs.
        leases: The directory below which the addresses' leases are, by network.
    """
    for pid in _processes(ids):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for each in ids:
        held = glob.glob(os.path.join(glob.escape(_RESULTS), f"*-{glob.escape(each)}-*"))
        for path in held:
            _release_namespaces(_read(path))
        _release_leases(each, leases)
        # Whether or not anything else of its network is there: whoever took that away may have got no further.
        await iptables.remove_rules(container=each)
        for path in held:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def _read(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            result = json.load(file)
    except (OSError, ValueError):
        return {}
    return result if isinstance(result, dict) else {}


def _processes(ids: Collection[str]) -> Iterator[int]:
    """Shims, known by their command line, and what runs in the cgroups of the containers."""
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            with open(f"/proc/{entry}/cmdline", "rb") as file:
                words = file.read().decode(errors="replace").split("\0")
            with open(f"/proc/{entry}/cgroup", encoding="utf-8", errors="replace") as file:
                cgroups = file.read()
            shim = "-id" in words[:-1] and "containerd-shim" in words[0] and words[words.index("-id") + 1] in ids
            if shim or _names(cgroups, ids):
                yield int(entry)


def _names(cgroups: str, ids: Collection[str]) -> bool:
    """Whether a process's cgroups (cgroups(7): ``/proc/[pid]/cgroup``) are a container's: named after it, or its systemd scope."""
    for part in cgroups.replace("\n", "/").replace(":", "/").split("/"):
        # The runtime puts its own name and a hyphen before the ID, which has none.
        scope = part.removesuffix(".scope").rpartition("-")[2] if part.endswith(".scope") else part
        if part in ids or scope in ids:
            return True
    return False


def _release_namespaces(result: dict[str, Any]) -> None:
    answer = result.get("result")
    interfaces = answer.get("interfaces") if isinstance(answer, dict) else None
    for interface in interfaces or ():
        path = str(interface.get("sandbox", "")) if isinstance(interface, dict) else ""
        if path.startswith(_NAMESPACES) and os.path.normpath(path) == path:
            with contextlib.suppress(errors.FailedPreconditionError):
                mounts.unmount(path, mounts.UMOUNT_NOFOLLOW | mounts.MNT_DETACH)
            with contextlib.suppress(OSError):
                os.unlink(path)


def _release_leases(container: str, leases: str) -> None:
    """Give the addresses of a container back. The file of an address names who has it (host-local)."""
    for path in glob.iglob(os.path.join(glob.escape(leases), "*", "*")):
        with contextlib.suppress(OSError):
            with open(path, encoding="utf-8", errors="replace") as file:
                holder = file.readline().strip()
            if holder == container:
                os.unlink(path)
