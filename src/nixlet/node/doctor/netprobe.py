"""Whether pods can have a network: tried in a network namespace that ends with the attempt, so that nothing of it stays."""

import ipaddress
from collections.abc import Sequence

from nixlet import errors
from nixlet.host import network, process
from nixlet.node.doctor import machine
from nixlet.node.ownership import claims, marker
from nixlet.node.requirements import preflight
from nixlet.node.settings import config

#: Seconds for one attempt, which may wait for a module to be loaded.
_TIMEOUT = 20.0

#: What the bridge plugin makes for a pod, as ip-link(8) is told.
_INTERFACES = (("probe0", "type", "bridge"), ("probe0", "type", "veth", "peer", "name", "probe1"))

#: What flannel makes.
_VXLAN = ("probe0", "type", "vxlan", "id", "1", "dstport", "0")

#: What the bridge plugin (ipMasq) and portmap need at the least: NAT, tracking of connections, and comments.
_RULE = ("-t", "nat", "-A", "POSTROUTING", "-m", "comment", "--comment", "nixlet", "-j", "MASQUERADE")


async def interfaces() -> str:
    """Make a bridge and a veth pair.

    Raises:
        PermissionDeniedError: We may not.
        UnsupportedError: The kernel makes none.
        Worse: There is nothing to try it with.
    """
    await _made(_INTERFACES, "bridges and veth pairs were")
    return "a bridge and a veth pair can be made"


async def vxlan() -> str:
    """Make the interface that flannel's backend of that name needs.

    Raises:
        PermissionDeniedError: We may not.
        UnsupportedError: The kernel makes none.
        Worse: There is nothing to try it with.
    """
    await _made((_VXLAN,), "an interface of the type vxlan was")
    return "an interface of the type vxlan can be made"


async def _made(interfaces: Sequence[tuple[str, ...]], what: str) -> None:
    preflight.check_root()
    program = process.find_program("ip")
    if program is None:
        raise machine.Worse(f"ip is not installed, so {what} not tried", "apt install iproute2")
    for wanted in interfaces:
        done = await _apart([program, "link", "add", *wanted])
        if done.returncode != 0:
            raise errors.UnsupportedError(
                f"the kernel makes no interface of the type {wanted[2]}: {_last_line(done)}",
                hint=f"load its module: modprobe {wanted[2]}",
            )


def gateway(settings: config.Settings) -> str:
    """Whether the bridge has the address that pods need, or can be given it.

    Raises:
        FailedPreconditionError: It has another one.
    """
    known = marker.read(settings.data_dir)
    # A start removes one of the node's own that no pod is on.
    if known is not None and settings.bridge in known.bridges and not network.bridge_members(settings.bridge):
        return f"{settings.bridge} is in use by no pod"
    return claims.check_gateway(settings.bridge, settings.pod_cidr)


async def masquerading(settings: config.Settings) -> str:
    """Have iptables masquerade.

    Raises:
        PermissionDeniedError: We may not.
        UnavailableError: iptables is not installed.
        UnsupportedError: It can't masquerade.
    """
    program = _iptables(settings)
    preflight.check_root()
    done = await _apart([program, "-w", "5", *_RULE])
    if done.returncode != 0:
        raise errors.UnsupportedError(
            f"{program} can't masquerade: {_last_line(done)}",
            hint="load the modules nf_nat, nf_conntrack and xt_MASQUERADE, or choose the other iptables:"
            " update-alternatives --config iptables",
        )
    return f"{program} masquerades"


async def forwarded(settings: config.Settings) -> str:
    """Whether the host's firewall lets packets of pods through.

    Raises:
        PermissionDeniedError: We may not look.
        UnavailableError: iptables is not installed.
        Worse: It doesn't.
    """
    program = _iptables(settings)
    preflight.check_root()
    listed = (await process.run([program, "-w", "5", "-S", "FORWARD"], timeout=_TIMEOUT)).check().stdout
    if drops(listed.decode(errors="replace"), settings.bridge, settings.pod_cidr):
        name = program.rpartition("/")[2]
        raise machine.Worse(
            "the policy of the chain FORWARD is DROP, as Docker sets it, and no rule lets pods through: they reach nobody outside",
            f"{name} -I FORWARD -i {settings.bridge} -j ACCEPT; {name} -I FORWARD -o {settings.bridge} -j ACCEPT",
        )
    return "packets of pods are let through"


def drops(rules: str, bridge: str, pod_cidr: str) -> bool:
    """Whether a chain drops what comes from pods, as far as its policy and the rules that name them tell.

    Args:
        rules: The chain, as ``iptables -S`` prints it.
        bridge: The pods' bridge.
        pod_cidr: Their addresses.
    """
    lines = [line.split() for line in rules.splitlines()]
    if not any(line[:1] == ["-P"] and line[2:] == ["DROP"] for line in lines):
        return False
    lets_through = (line for line in lines if line[-2:] == ["-j", "ACCEPT"])
    return not any(bridge in line or pod_cidr in line for line in lets_through)


def _iptables(settings: config.Settings) -> str:
    name = "iptables" if ipaddress.ip_network(settings.pod_cidr).version == 4 else "ip6tables"
    return preflight.find_program(name, package="iptables", setting="PATH")


async def _apart(argv: list[str]) -> process.Completed:
    """Run a program in a network namespace of its own."""
    return await process.run(["unshare", "--net", *argv], timeout=_TIMEOUT)


def _last_line(done: process.Completed) -> str:
    lines = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"status {done.returncode}"
