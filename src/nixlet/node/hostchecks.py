"""What the host gives to containers: the kernel, cgroups, limits, the network, space on disks. Features are tried, not guessed."""

import ipaddress
import os
import resource
import socket
import sys
from collections.abc import Iterator

from nixlet import errors
from nixlet.host import cgroups, mounts, process
from nixlet.node import preflight
from nixlet.node.findings import Finding, Subject
from nixlet.store.daemon import client as nix

#: The namespaces that every pod has of its own (namespaces(7)).
_NAMESPACES = ("mnt", "pid", "net", "ipc", "uts")

#: The controllers by which requests and limits of containers are kept.
_CONTROLLERS = ("cpu", "cpuset", "memory", "pids")

_CGROUPS = "/sys/fs/cgroup"

#: A container takes a kernel key, which root's quota must have room for.
_KEYS = 10_000
_OPEN_FILES = 10_000
_PIDS = 32_768

#: inotify instances: of the shims, with version 2 of cgroups one for every container, else few.
_INSTANCES = {True: 512, False: 128}
_WATCHES = 8192

#: Below these, a pull or two fill a disk.
_FREE_BYTES = 1 << 30
_FREE_SHARE = 0.05

_PROBE_TIMEOUT = 20.0

_GIB = 1 << 30


def overlay(_: Subject, file_systems: str = "/proc/filesystems") -> Finding:
    """Whether the kernel knows overlayfs; whether that can be mounted is the snapshotter's check."""
    if "overlay" in _read(file_systems).split():
        return Finding("ok", f"overlay is in {file_systems} of Linux {os.uname().release}")
    evidence = f"overlay is not in {file_systems}: its module is not loaded, or there is none"
    return Finding("warning", evidence, "load it: modprobe overlay")


def namespaces(
    _: Subject, directory: str = "/proc/self/ns", limit: str = "/proc/sys/user/max_user_namespaces"
) -> Finding:
    """The namespaces that pods need, and those that they may ask for."""
    missing = [name for name in _NAMESPACES if not os.path.exists(os.path.join(directory, name))]
    if missing:
        raise errors.UnsupportedError(
            f"the kernel has no namespaces of the kinds {', '.join(missing)}, and pods need them",
            hint="use a kernel with CONFIG_NAMESPACES and all that belongs to it",
        )
    if not os.path.exists(os.path.join(directory, "user")) or _number(limit) == 0:
        return Finding("warning", "pods can't have user namespaces here", f"raise {limit}")
    return Finding("ok", ", ".join((*_NAMESPACES, "user")))


def seccomp(_: Subject, path: str = "/proc/sys/kernel/seccomp/actions_avail") -> Finding:
    """Whether system calls can be filtered (seccomp(2))."""
    if os.path.exists(path):
        return Finding("ok", f"the kernel filters: {_read(path)}")
    return Finding(
        "warning", "the kernel has no seccomp filters: containers may make every system call", "use another kernel"
    )


def cgroup_versions(mountinfo: str = "/proc/self/mountinfo") -> frozenset[int]:
    """The versions of cgroups that are mounted where container runtimes look for them (cgroups(7))."""
    kinds = {"cgroup": 1, "cgroup2": 2}
    return frozenset(
        kinds[entry.fstype]
        for entry in mounts.table(mountinfo)
        if entry.fstype in kinds and (entry.path == _CGROUPS or entry.path.startswith(f"{_CGROUPS}/"))
    )


def cgroup_layout(_: Subject, mountinfo: str = "/proc/self/mountinfo") -> Finding:
    """Which version of cgroups containers are kept by."""
    found = cgroup_versions(mountinfo)
    if not found:
        raise errors.UnsupportedError(
            f"no cgroups are mounted below {_CGROUPS}", hint=f"mount -t cgroup2 none {_CGROUPS}"
        )
    if found == {2}:
        return Finding("ok", f"version 2 at {_CGROUPS}")
    return Finding(
        "warning",
        ("versions 1 and 2 side by side (hybrid)" if 2 in found else "version 1")
        + ": that works, but containerd 2.2 and later warn of it, and kubelets from 1.35 on refuse it unless told otherwise",
        "start the machine with systemd.unified_cgroup_hierarchy=1",
    )


def cgroup_controllers(_: Subject, proc: str = "/proc/self", root: str = _CGROUPS) -> Finding:
    """Whether containers can be limited."""
    # Runtimes make their cgroups below the root, whatever our own cgroup was given.
    found = cgroups.controllers(proc, root) | set(_read(os.path.join(root, "cgroup.controllers")).split())
    missing = [name for name in _CONTROLLERS if name not in found]
    if missing:
        raise errors.UnsupportedError(
            f"there is no cgroup controller {', '.join(missing)}: containers can't be limited by it",
            hint="enable it at boot (cgroup_enable=memory), or have it delegated to this container or user",
        )
    at = root if os.path.exists(os.path.join(root, "cgroup.controllers")) else os.path.join(root, "pids")
    if os.geteuid() == 0 and not os.access(at, os.W_OK):
        raise errors.PermissionDeniedError(
            f"{at} can't be written, so that no cgroups can be made for pods",
            hint=f"mount {_CGROUPS} writable (in a container: -v {_CGROUPS}:{_CGROUPS}:rw)",
        )
    return Finding("ok", ", ".join(_CONTROLLERS))


def open_files(_: Subject) -> Finding:
    """How many files a process may have open; containerd, as Go programs do, takes the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
    if hard == resource.RLIM_INFINITY or hard >= _OPEN_FILES:
        return Finding("ok", f"up to {shown}")
    return Finding(
        "warning", f"up to {shown} (now {soft}), which many pods use up", "LimitNOFILE=1048576 in the service's unit"
    )


def keys(_: Subject, path: str = "/proc/sys/kernel/keys/root_maxkeys") -> Finding | None:
    """How many kernel keys root may have (keyrings(7))."""
    return _at_least(path, _KEYS, "each container takes a key")


def pids(_: Subject, path: str = "/proc/sys/kernel/pid_max") -> Finding | None:
    """How many processes there may be."""
    return _at_least(path, _PIDS, "containers share these with the host")


def inotify(
    _: Subject, directory: str = "/proc/sys/fs/inotify", mountinfo: str = "/proc/self/mountinfo"
) -> Finding | None:
    """The instances and watches that root may have (inotify(7))."""
    needed = _INSTANCES[2 in cgroup_versions(mountinfo) and 1 not in cgroup_versions(mountinfo)]
    why = "shims and programs in containers share these"
    instances = _at_least(os.path.join(directory, "max_user_instances"), needed, why)
    watches = _at_least(os.path.join(directory, "max_user_watches"), _WATCHES, why)
    if instances is None or watches is None or watches.status != "ok":
        return watches
    return instances._replace(evidence=f"{instances.evidence}; {watches.evidence}")


def oom_scores(_: Subject) -> Finding:
    """Whether containers can be given better OOM scores than our own."""
    if preflight.lacks_sys_resource():
        return Finding(
            "warning",
            "CAP_SYS_RESOURCE is missing: containerd is told restrict_oom_score_adj, and no container gets a better"
            " OOM score than nixlet itself",
            "give nixlet that capability",
        )
    return Finding("ok", "CAP_SYS_RESOURCE is there")


async def interfaces(_: Subject) -> Finding:
    """Make a bridge and a veth pair in a network namespace that ends with the attempt."""
    program = process.find_program("ip")
    if program is None:
        return Finding(
            "warning", "ip is not installed, so bridges and veth pairs were not tried", "apt install iproute2"
        )
    for kind in (["probe0", "type", "bridge"], ["probe0", "type", "veth", "peer", "name", "probe1"]):
        done = await process.run(["unshare", "--net", program, "link", "add", *kind], timeout=_PROBE_TIMEOUT)
        if done.returncode != 0:
            raise errors.UnsupportedError(
                f"the kernel makes no interface of the type {kind[2]}: {_last_line(done)}",
                hint=f"load its module: modprobe {kind[2]}",
            )
    return Finding("ok", "a bridge and a veth pair were made")


async def iptables(subject: Subject) -> Finding | None:
    """Have iptables masquerade in a network namespace that ends with the attempt, and see what the host forwards."""
    if not subject.has_own_containerd:
        return None
    name = "iptables" if ipaddress.ip_network(subject.settings.pod_cidr).version == 4 else "ip6tables"
    program = preflight.find_program(name, package="iptables", setting="PATH")
    version = (await process.run([program, "--version"], timeout=_PROBE_TIMEOUT)).check().stdout.decode().strip()
    rule = ["-t", "nat", "-A", "POSTROUTING", "-m", "comment", "--comment", "nixlet", "-j", "MASQUERADE"]
    done = await process.run(["unshare", "--net", program, "-w", "5", *rule], timeout=_PROBE_TIMEOUT)
    if done.returncode != 0:
        raise errors.UnsupportedError(
            f"{program} can't masquerade: {_last_line(done)}",
            hint="load the modules nf_nat, nf_conntrack and xt_MASQUERADE, or choose another alternative of iptables",
        )
    rules = (await process.run([program, "-w", "5", "-S", "FORWARD"], timeout=_PROBE_TIMEOUT)).stdout.decode()
    named = (subject.settings.bridge, subject.settings.pod_cidr)
    if "-P FORWARD DROP" in rules and not any(
        word in line for line in rules.splitlines() if line.endswith("ACCEPT") for word in named
    ):
        bridge = subject.settings.bridge
        return Finding(
            "warning",
            f"{program} ({version}) drops what is forwarded (policy of FORWARD, as Docker sets it): pods reach nobody outside",
            f"{name} -I FORWARD -i {bridge} -j ACCEPT; {name} -I FORWARD -o {bridge} -j ACCEPT",
        )
    return Finding("ok", f"{program} ({version}) masquerades")


def connections(_: Subject, directory: str = "/proc/sys/net/netfilter") -> Finding | None:
    """How full the table of tracked connections is; it exists once something is tracked."""
    count = _number(os.path.join(directory, "nf_conntrack_count"))
    most = _number(os.path.join(directory, "nf_conntrack_max"))
    if count is None or not most:
        return None
    if count > 0.9 * most:
        evidence = f"{count} of {most} connections are tracked: new ones are dropped soon"
        return Finding("warning", evidence, f"sysctl -w net.netfilter.nf_conntrack_max={most * 2}")
    return Finding("ok", f"{count} of {most} connections are tracked")


def forwarding(subject: Subject, path: str = "/proc/sys/net/ipv4/ip_forward") -> Finding:
    """Whether packets of pods are forwarded; the bridge plugin turns that on where it can."""
    if ipaddress.ip_network(subject.settings.pod_cidr).version == 6:
        path = "/proc/sys/net/ipv6/conf/all/forwarding"
    if _number(path) == 1:
        return Finding("ok", f"{path} is 1")
    if os.access(path, os.W_OK) or os.geteuid() != 0:
        return Finding("ok", f"{path} is not 1; the bridge plugin turns it on with the first pod")
    return Finding("warning", f"{path} is not 1 and can't be written: pods reach nobody outside", "turn it on outside")


def routes(subject: Subject, directory: str = "/proc/net") -> Finding:
    """Whether other routes of the host lead to addresses that pods get."""
    pods = ipaddress.ip_network(subject.settings.pod_cidr)
    for network, interface in _routes(directory, pods.version):
        if interface != subject.settings.bridge and network.version == pods.version and network.overlaps(pods):
            return Finding(
                "warning",
                f"the pods' addresses {pods} overlap the route to {network} by {interface}: one of the two is out of reach",
                "choose other addresses for pods: --pod-cidr",
            )
    return Finding("ok", f"no other route leads to {pods}")


Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def _routes(directory: str, version: int) -> Iterator[tuple[Network, str]]:
    """The routes but for those to everywhere, with their interfaces (proc_pid_net(5); the columns are the kernel's)."""
    if version == 4:
        for line in _read(os.path.join(directory, "route")).splitlines()[1:]:
            interface, destination, _, _, _, _, _, mask, *_ = line.split()
            # In the byte order of the machine.
            address, netmask = (
                socket.inet_ntoa(int(number, 16).to_bytes(4, sys.byteorder)) for number in (destination, mask)
            )
            network = ipaddress.ip_network(f"{address}/{netmask}", strict=False)
            if network.prefixlen:
                yield network, interface
        return
    for line in _read(os.path.join(directory, "ipv6_route")).splitlines():
        destination, length, *_, interface = line.split()
        if int(length, 16) and interface != "lo":
            yield ipaddress.ip_network((int(destination, 16), int(length, 16)), strict=False), interface


def data_space(subject: Subject) -> Finding:
    """Room for images, containers and logs."""
    return _space(subject.layout.data_dir, "--data-dir")


def store_space(subject: Subject) -> Finding | None:
    """Room for store paths."""
    if subject.settings.snapshotter != "nix":
        return None
    return _space(nix.DaemonSettings.from_environment(os.environ).store_dir, "")


def _space(directory: str, setting: str) -> Finding:
    at = preflight.existing(directory)
    found = os.statvfs(at)
    kind = preflight.file_system(at)
    if setting and found.f_flag & os.ST_RDONLY:
        raise errors.FailedPreconditionError(
            f"{at} is on a read-only file system ({kind})", hint=f"choose another directory: {setting}"
        )
    free, inodes = found.f_bavail * found.f_frsize, found.f_favail
    evidence = f"{free / _GIB:.1f} GiB" + (f" and {inodes} inodes" if found.f_files else "") + f" free at {at} ({kind})"
    scarce = free < _FREE_BYTES or found.f_bavail < _FREE_SHARE * found.f_blocks
    if scarce or (found.f_files and inodes < _FREE_SHARE * found.f_files):
        remedy = "make room: nix-collect-garbage" + (f", crictl rmi --prune, or another {setting}" if setting else "")
        return Finding("warning", evidence, remedy)
    return Finding("ok", evidence)


def _at_least(path: str, needed: int, why: str) -> Finding | None:
    number = _number(path)
    if number is None:
        return None
    name = path.removeprefix("/proc/sys/").replace("/", ".")
    if number >= needed:
        return Finding("ok", f"{name} is {number}")
    return Finding("warning", f"{name} is {number}: {why}", f"sysctl -w {name}={needed}")


def _number(path: str) -> int | None:
    """The number in a file of /proc/sys; None where the kernel has no such file."""
    text = _read(path).split()
    return int(text[0]) if text else None


def _read(path: str) -> str:
    """A file of the kernel's, on one line if it has but one; empty where there is none."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read().strip()
    except FileNotFoundError:
        return ""


def _last_line(done: process.Completed) -> str:
    lines = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"status {done.returncode}"
