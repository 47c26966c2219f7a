"""What a node needs of the kernel and of the machine's limits; looked at, never derived from a version."""

import ipaddress
import json
import os
import resource
import socket
import struct
from collections.abc import Callable, Mapping

from nixlet import errors
from nixlet.containers import model
from nixlet.host import cgroups, network, process
from nixlet.node.requirements import preflight

#: Bytes below which nothing can be pulled, and below which it gets tight; the same for inodes.
_LITTLE_SPACE, _TIGHT_SPACE = 256 << 20, 2 << 30
_LITTLE_INODES, _TIGHT_INODES = 1_000, 50_000

#: The share of a bridge's ports from which on it gets tight.
_NEARLY_FULL = 0.9

#: Namespaces that every container gets, and those that some pods ask for (namespaces(7)).
_NAMESPACES = ("mnt", "net", "pid", "ipc", "uts")
_MORE_NAMESPACES = ("user", "cgroup")

_CONTROLLERS = ("cpu", "memory", "pids")
_MORE_CONTROLLERS = ("cpuset", "devices", "freezer", "io", "blkio", "hugetlb")

#: Each pod takes a key of a session, and about as many watches as it has files to tail.
_KEYS, _WATCH_INSTANCES, _OPEN_FILES, _PROCESSES = 10_000, 128, 65_536, 32_768

#: A route of these flags is in use and not by way of another host (linux/route.h: RTF_UP, RTF_GATEWAY).
_ROUTE_UP, _ROUTE_GATEWAY = 1, 2

Look = Callable[[], str]


class Worse(Exception):
    """A node runs, but something could be better."""

    def __init__(self, evidence: str, remedy: str) -> None:
        super().__init__(evidence)
        self.evidence = evidence
        self.remedy = remedy


def _number(path: str) -> int:
    with open(path, encoding="ascii") as file:
        return int(file.read())


def _at_least(name: str, wanted: int, consequence: str) -> Look:
    """A look at a kernel setting (sysctl(8)) that should not be lower."""

    def look() -> str:
        path = f"/proc/sys/{name.replace('.', '/')}"
        try:
            found = _number(path)
        except FileNotFoundError:
            return f"this kernel has no {name}"
        if found < wanted:
            raise Worse(f"{name} is {found}: {consequence}", f"sysctl -w {name}={wanted}")
        return f"{name} is {found}"

    return look


def file_systems(path: str = "/proc/filesystems") -> frozenset[str]:
    """The file systems that the kernel has at the moment; modules may bring more."""
    with open(path, encoding="ascii") as file:
        return frozenset(line.split()[-1] for line in file if line.strip())


def _overlay() -> str:
    if "overlay" in file_systems():
        return "the kernel has it"
    raise Worse("it is not loaded yet", "modprobe overlay, if the mount strategies below don't work")


def _namespaces() -> str:
    there = set(os.listdir("/proc/self/ns"))
    if lacking := [name for name in _NAMESPACES if name not in there]:
        raise errors.UnsupportedError(
            f"the kernel has no {', '.join(lacking)} namespaces",
            hint="use a kernel with CONFIG_NAMESPACES and its parts",
        )
    if lacking := [name for name in _MORE_NAMESPACES if name not in there]:
        raise Worse(f"the kernel has no {', '.join(lacking)} namespaces", "pods that ask for them can't run")
    return ", ".join((*_NAMESPACES, *_MORE_NAMESPACES))


def _seccomp() -> str:
    if os.path.exists("/proc/sys/kernel/seccomp/actions_avail"):
        return "system calls can be filtered"
    raise errors.UnsupportedError(
        "the kernel has no seccomp, and every pod's own process is started with a filter of system calls",
        hint="use a kernel with CONFIG_SECCOMP_FILTER",
    )


def _sys_resource() -> str:
    if preflight.lacks_sys_resource():
        raise Worse(
            "CAP_SYS_RESOURCE is missing: containers can't be spared when memory runs out (restrict_oom_score_adj is set)",
            "give the node that capability, if pods of class Guaranteed are to be the last to go",
        )
    return "OOM scores can be lowered"


KERNEL: Mapping[str, Look] = {
    "overlay": _overlay,
    "namespaces": _namespaces,
    "seccomp": _seccomp,
    "capabilities": _sys_resource,
}


def _layout() -> str:
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        kinds = [line.partition(" - ")[2].split()[0] for line in table]
    unified, legacy = "cgroup2" in kinds, "cgroup" in kinds
    if not unified and not legacy:
        raise errors.UnsupportedError("no cgroups are mounted", hint="mount them: systemd, or cgroupfs-mount, does so")
    if unified and legacy:
        return "version 1, with version 2 beside it (hybrid)"
    return "version 2" if unified else "version 1"


def _controllers() -> str:
    found = cgroups.controllers()
    if lacking := [name for name in _CONTROLLERS if name not in found]:
        raise errors.UnsupportedError(
            f"the cgroup controllers {', '.join(lacking)} are missing: limits of containers would not hold",
            hint="enable them on the kernel's command line (cgroup_enable=memory), or delegate them",
        )
    return ", ".join(name for name in (*_CONTROLLERS, *_MORE_CONTROLLERS) if name in found)


CGROUPS: Mapping[str, Look] = {"layout": _layout, "controllers": _controllers}


def _open_files() -> str:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < _OPEN_FILES:
        raise Worse(
            f"a process may open {hard} files: containers get no more",
            "raise it: LimitNOFILE= in the unit, or ulimit -n",
        )
    return "a process may open as many files as it likes" if hard == resource.RLIM_INFINITY else f"{hard} for a process"


LIMITS: Mapping[str, Look] = {
    "open files": _open_files,
    "processes": _at_least("kernel.pid_max", _PROCESSES, "many pods have more processes together"),
    "keys": _at_least("kernel.keys.root_maxkeys", _KEYS, "each container takes one, and further ones fail to start"),
    "inotify": _at_least("fs.inotify.max_user_instances", _WATCH_INSTANCES, "programs that watch files fail to start"),
}


def _forwarding() -> str:
    if _number("/proc/sys/net/ipv4/ip_forward"):
        return "packets are forwarded"
    raise Worse(
        "net.ipv4.ip_forward is 0 until the first pod's network is made",
        "nothing; a firewall that resets it cuts pods off",
    )


NETWORK: Mapping[str, Look] = {"forwarding": _forwarding}


async def iptables() -> str:
    """iptables, which the CNI plugins use for addresses and ports.

    Raises:
        UnavailableError: It is missing.
    """
    path = preflight.find_program("iptables", package="iptables", setting="PATH")
    printed = (await process.run([path, "--version"], timeout=10)).check().stdout
    return f"{path}, {printed.decode(errors='replace').strip()}"


async def runc(name: str) -> str:
    """The OCI runtime, and whether it can filter system calls (``runc features``, from 1.1 on; crun has the same).

    Raises:
        UnavailableError: It is missing.
        UnsupportedError: It was built without seccomp.
    """
    path = preflight.find_program(name, package="runc", setting="--runc")
    result = await process.run([path, "features"], timeout=10)
    try:
        said = json.loads(result.stdout) if result.returncode == 0 else None
        enabled = None if said is None else bool((said["linux"].get("seccomp") or {}).get("enabled"))
    except (ValueError, KeyError, TypeError, AttributeError):
        enabled = None
    if enabled is None:
        raise Worse(
            f"{path} does not tell whether it filters system calls", "use runc 1.1 or later, built with libseccomp"
        )
    if not enabled:
        raise errors.UnsupportedError(
            f"{path} was built without seccomp, and every pod's own process is started with a filter of system calls",
            hint="use one with libseccomp (Debian: apt install runc): --runc",
        )
    return f"{path}, filters system calls"


def routes(path: str = "/proc/net/route") -> dict[str, list[ipaddress.IPv4Network]]:
    """The networks that are reached directly, by interface (proc_pid_net(5))."""
    found: dict[str, list[ipaddress.IPv4Network]] = {}
    with open(path, encoding="ascii") as file:
        for line in list(file)[1:]:
            name, target, _, flags, _, _, _, mask, *_ = line.split()
            if int(flags, 16) & _ROUTE_UP and not int(flags, 16) & _ROUTE_GATEWAY:
                address, netmask = (socket.inet_ntoa(struct.pack("=I", int(number, 16))) for number in (target, mask))
                found.setdefault(name, []).append(ipaddress.IPv4Network(f"{address}/{netmask}"))
    return found


def addresses_free(pod_cidr: str, bridge: str, path: str = "/proc/net/route") -> str:
    """Whether pods' addresses are nobody else's.

    Raises:
        Worse: A route leads elsewhere for some of them.
    """
    wanted = ipaddress.ip_network(pod_cidr)
    for name, networks in routes(path).items():
        for theirs in networks:
            if name != bridge and theirs.overlaps(wanted) and theirs.prefixlen:
                raise Worse(
                    f"{pod_cidr} overlaps {theirs}, which is on {name}: what is there can't be reached from pods, or not from here",
                    "choose other addresses for pods: --pod-cidr",
                )
    return f"{pod_cidr} is free"


def bridge_ports(bridge: str) -> str:
    """How many more pods a bridge has room for.

    Raises:
        FailedPreconditionError: None.
        Worse: Few.
    """
    used = len(network.bridge_members(bridge))
    said = f"{bridge}: {used:,} of {model.BRIDGE_PORTS:,} ports are in use"
    remedy = "remove pods that are no longer needed: nixlet ps -a, nixlet rm"
    if used >= model.BRIDGE_PORTS:
        raise errors.FailedPreconditionError(f"the bridge is full: {said}", hint=remedy)
    if used > model.BRIDGE_PORTS * _NEARLY_FULL:
        raise Worse(said, remedy)
    return said


def space(directory: str, *, remedy: str = "make room: nix-collect-garbage, or crictl rmi --prune") -> str:
    """How much room a file system has.

    Args:
        directory: A directory of it.
        remedy: What to do where there is too little.

    Raises:
        UnavailableError: None to speak of.
        Worse: Little.
    """
    status = os.statvfs(directory)
    free, inodes = status.f_bavail * status.f_frsize, status.f_favail
    said = f"{free / (1 << 30):.1f} GiB free at {directory}"
    # Some file systems (btrfs) count no inodes.
    if status.f_files:
        said += f", {inodes} inodes"
    if free < _LITTLE_SPACE or (status.f_files and inodes < _LITTLE_INODES):
        raise errors.UnavailableError(f"the disk is full: {said}", hint=remedy)
    if free < _TIGHT_SPACE or (status.f_files and inodes < _TIGHT_INODES):
        raise Worse(said, remedy)
    return said
