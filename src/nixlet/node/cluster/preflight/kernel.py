"""What a cluster needs of the machine's kernel: packets handed on, packets of bridges filtered, and how services can be made."""

import contextlib
import logging
import os
import re
from collections.abc import Collection

import msgspec

from nixlet import errors
from nixlet.cluster.layout import Layout
from nixlet.encoding import unreadable
from nixlet.host import files, process, procfs

NFTABLES, IPTABLES = "nftables", "iptables"

#: Pods' packets go by way of the node, and what goes from one port of a bridge to another passes the filter, too: a service's answers.
_SWITCHED_ON = {
    4: ("net/ipv4/ip_forward", "net/bridge/bridge-nf-call-iptables"),
    6: ("net/ipv6/conf/all/forwarding", "net/bridge/bridge-nf-call-ip6tables"),
}

#: The first nft that kube-proxy takes, and the first kernel (its own requirements for the nftables mode).
_NFT, _KERNEL = (1, 0, 1), (5, 13)

#: A transaction that changes nothing: it is only checked.
_TRIAL = b"add table ip nixlet-trial\nadd map ip nixlet-trial m { type ipv4_addr : verdict ; }\n"

#: What kubelets set for the whole machine (k8s.io/component-helpers, node/util/sysctl).
_OF_KUBELETS = {
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}

_log = logging.getLogger("nixlet.cluster")


class _Before(msgspec.Struct, frozen=True):
    """What the machine's settings were before there was a kubelet.

    Attributes:
        boot: In which boot of the machine: the next one begins with what people have said since.
        values: The settings.
    """

    boot: str
    values: dict[str, str]


async def prepare(versions: Collection[int] = (4,), root: str = "/proc/sys") -> None:
    """Have the kernel hand packets on between pods, services and the world.

    Args:
        versions: Of which IP versions. (A machine that hands IPv6 packets on takes no word of routers any more.)
        root: Where the kernel's settings are.
    """
    if not os.path.exists(os.path.join(root, "net/bridge")) and (modprobe := process.find_program("modprobe")):
        # It may be built in, or not be there at all.
        with contextlib.suppress(errors.NixletError):
            await process.run([modprobe, "--quiet", "br_netfilter"], timeout=10)
    if not os.path.exists(os.path.join(root, "net/bridge")):
        # The answer of a pod on the same bridge goes past the rules by which its service was found, and is nobody's then.
        _log.warning(
            "this kernel has no br_netfilter: a pod doesn't reach a service whose pod is on the same node",
            extra={"hint": "modprobe br_netfilter, where the kernel's package has it"},
        )
    for name in [name for version in versions for name in _SWITCHED_ON[version]]:
        _switch_on(os.path.join(root, name))


def _switch_on(path: str) -> None:
    try:
        with open(path, "r+", encoding="ascii") as file:
            if file.read().strip() == "0":
                file.seek(0)
                file.write("1")
    except FileNotFoundError:
        # A kernel without it has nothing to switch on.
        return
    except OSError as error:
        _log.warning("%s can't be set to 1, which services need: %s", path, error.strerror)


def switched_on(root: str = "/proc/sys") -> list[str]:
    """By which settings the kernel hands packets on, whoever has switched them on; names as sysctl(8) has them."""
    names = (name for name, _ in _SWITCHED_ON.values())
    return [name.replace("/", ".") for name in names if _read(os.path.join(root, name)) == "1"]


def settings_file(layout: Layout) -> str:
    """Where it stands what the machine's settings were before there was a kubelet."""
    return os.path.join(layout.agent, "sysctls.json")


def remember_settings(layout: Layout, root: str = "/proc/sys") -> None:
    """Write down what a kubelet is about to change, unless an earlier one has done so in this boot of the machine."""
    if (known := _before(layout)) is not None and known.boot == procfs.boot_id():
        return
    found = {name: value for name in _OF_KUBELETS if (value := _read(os.path.join(root, name))) is not None}
    before = _Before(procfs.boot_id(), found)
    files.write_atomically(settings_file(layout), msgspec.json.encode(before), mode=0o600)


def put_settings_back(layout: Layout, root: str = "/proc/sys") -> None:
    """Put the machine's settings back that a kubelet has changed, and nobody since then."""
    before = _before(layout)
    if before is None or before.boot != procfs.boot_id():
        return
    for name, ours in _OF_KUBELETS.items():
        path, value = os.path.join(root, name), before.values.get(name, ours)
        if value != ours and _read(path) == ours:
            try:
                with open(path, "w", encoding="ascii") as file:
                    file.write(value)
            except OSError as error:
                _log.warning("%s can't be set back to %s: %s", path, value, error.strerror)


def _before(layout: Layout) -> _Before | None:
    try:
        with open(settings_file(layout), "rb") as file:
            return msgspec.json.decode(file.read(), type=_Before)
    except (OSError, *unreadable.JSON):
        return None


def _read(path: str) -> str | None:
    with contextlib.suppress(OSError), open(path, encoding="ascii") as file:
        return file.read().strip()
    return None


def remark_on_cgroups(root: str = "/sys/fs/cgroup") -> str:
    """What becomes of a machine with cgroups of version 1, which Kubernetes gives up; empty: it has none."""
    if os.path.exists(os.path.join(root, "cgroup.controllers")):
        return ""
    return "this machine has cgroups of version 1: its kubelet is told to run all the same (failCgroupV1: false), and later ones won't"


def warn_of_cgroups(root: str = "/sys/fs/cgroup") -> None:
    """Say what becomes of a machine with cgroups of version 1."""
    if remark := remark_on_cgroups(root):
        _log.warning("%s", remark, extra={"hint": "boot with systemd.unified_cgroup_hierarchy=1"})


async def proxy_mode() -> str:
    """How kube-proxy can work here: ``nftables`` where the program and the kernel are good for it, else ``iptables``.

    Raises:
        UnavailableError: Neither program is there.
    """
    nft = process.find_program("nft")
    if nft is not None and await _nft_works(nft):
        return NFTABLES
    if process.find_program("iptables") is None:
        what = "neither nft nor iptables is" if nft is None else "nft does not work here, and iptables is not"
        raise errors.UnavailableError(
            f"{what} installed, and kube-proxy makes services with them",
            hint="install one of them (Debian: apt install nftables), or do without: --disable-kube-proxy",
        )
    return IPTABLES


async def _nft_works(nft: str) -> bool:
    if _numbers(os.uname().release) < _KERNEL:
        return False
    try:
        version = await process.run([nft, "--version"], timeout=10)
        tried = await process.run([nft, "--check", "--file", "-"], stdin=_TRIAL, timeout=10)
    except errors.NixletError:
        return False
    found = re.search(rb"v?(\d+\.\d+(?:\.\d+)?)", version.stdout)
    return found is not None and _numbers(found[1].decode()) >= _NFT and tried.returncode == 0


def _numbers(text: str) -> tuple[int, ...]:
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    return tuple(int(each or 0) for each in match.groups()) if match else ()
