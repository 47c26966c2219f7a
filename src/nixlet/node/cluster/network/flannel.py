"""flannel on a node: what it finds when it starts, and what it has made there, for whoever takes it away.

What it makes outlives it, as pods do: routes, an interface, rules of the packet filter. That it is ours is written down before it starts.
"""

import asyncio
import contextlib
import ipaddress
import json
import logging
import os
import socket
from collections.abc import Collection, Sequence

import msgspec

from nixlet import errors
from nixlet.cluster import flannel as model
from nixlet.cluster.layout import Layout
from nixlet.cluster.settings import ClusterSettings
from nixlet.encoding import unreadable
from nixlet.host import files, iptables, process, procfs
from nixlet.node.cluster.preflight import others
from nixlet.node.settings import config as node_config
from nixlet.node.settings import trusted

#: A configuration is no larger (bytes).
_MAX_CONFIG = 64 << 10

#: Seconds for one call of ip or nft.
_TIMEOUT = 10.0

#: What flannel wants to find, by the version of the pods' addresses: packets of bridges pass the filter.
_FILTERED = {4: "net/bridge/bridge-nf-call-iptables", 6: "net/bridge/bridge-nf-call-ip6tables"}

_log = logging.getLogger("nixlet.cluster")


class _Made(msgspec.Struct, frozen=True):
    """What there may be of it on the machine.

    Attributes:
        machine: In which boot of the machine, and which network namespace.
        interfaces: The interfaces.
        networks: The networks of the cluster's pods, to which it has routes.
        nftables: It has tables of nftables.
    """

    machine: str
    interfaces: tuple[str, ...]
    networks: tuple[str, ...]
    nftables: bool = False


def memory(layout: Layout) -> str:
    """The file by which it is remembered."""
    return os.path.join(layout.agent, "flannel.json")


def configuration(layout: Layout) -> str:
    """Its configuration's file, where k3s has it."""
    return os.path.join(layout.agent, "etc", "flannel", "net-conf.json")


def subnet_file(layout: Layout) -> str:
    """Where it says what it has made."""
    return os.path.join(layout.state_dir, "flannel", "subnet.env")


async def prepare(settings: node_config.Settings, cluster: ClusterSettings, backend: str) -> list[str]:
    """Have all that flannel needs before it starts; its arguments.

    Args:
        settings: The node's.
        cluster: The cluster.
        backend: How it is to bring packets to other nodes.

    Raises:
        InvalidArgumentError: The configuration that a person names is none, or has another backend than the cluster.
        UsageError: It can't be read, or there is no such interface.
        UnsupportedError: There is no such backend, or the kernel lacks something.
        FailedPreconditionError: Another flannel is at work on this machine.
        NixletError: The file system refuses.
    """
    layout = cluster.layout
    made, wanted = await asyncio.to_thread(_prepare, settings, cluster, backend)
    # What others were to lead to is reached otherwise now.
    for name in sorted({*made.interfaces} & {*_interfaces()} - {wanted}):
        await _told("ip", ["link", "delete", name])
    # (one of that name is somebody else's from now on)
    left = tuple(name for name in made.interfaces if name == wanted or name in _interfaces())
    await asyncio.to_thread(_remember, layout, msgspec.structs.replace(made, interfaces=left))
    return model.flanneld(cluster, configuration(layout), subnet_file(layout), settings.flannel_iface)


def _prepare(settings: node_config.Settings, cluster: ClusterSettings, backend: str) -> tuple[_Made, str]:
    """The same; what there may be then, interfaces of earlier flannels of ours among it, and the one that is wanted, if one is."""
    if backend not in node_config.FLANNEL_BACKENDS:
        raise errors.UnsupportedError(
            f"the cluster's flannel-backend is {backend}, which this version of nixlet doesn't have",
            hint="nodes and servers have to be of one version",
        )
    interfaces = _interfaces()
    if settings.flannel_iface and settings.flannel_iface not in interfaces:
        raise errors.UsageError(
            f"flannel-iface {settings.flannel_iface}: this machine has no such interface",
            hint=f"it has {', '.join(interfaces)}",
        )
    wanted = _configuration(settings, cluster, backend)
    _check_filter(cluster, wanted)
    layout = cluster.layout
    before = _made(layout)
    known = before.interfaces if before is not None and before.machine == _machine() else ()
    if wanted.interface in interfaces and wanted.interface not in known:
        raise errors.FailedPreconditionError(
            f"there is an interface {wanted.interface} already, which this node has not made: another flannel works on this machine",
            hint=f"end that one, and: ip link delete {wanted.interface}; or do without: --flannel-backend none",
        )
    networks = {*map(str, cluster.cluster_cidrs), *(before.networks if before is not None else ())}
    nftables = wanted.nftables or (before is not None and before.nftables)
    there = sorted({*known, wanted.interface} - {""})
    made = _Made(_machine(), tuple(there), tuple(sorted(networks)), nftables)
    _remember(layout, made)
    for path in (configuration(layout), subnet_file(layout)):
        files.make_directory(os.path.dirname(path), mode=0o700)
    files.write_atomically(configuration(layout), wanted.text, mode=0o600)
    return made, wanted.interface


def _interfaces() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def _machine() -> str:
    """What interfaces, routes and rules live as long as."""
    return f"{procfs.boot_id()} {os.stat('/proc/self/ns/net').st_ino}"


def _configuration(settings: node_config.Settings, cluster: ClusterSettings, backend: str) -> model.Configuration:
    path = settings.flannel_conf
    if not path:
        return model.configuration(cluster, backend)
    text = trusted.read(path, _MAX_CONFIG).decode("utf-8", "replace")
    found = model.read(text, what=f"flannel-conf {path}")
    if found.backend != backend:
        raise errors.InvalidArgumentError(
            f"flannel-conf {path} has the backend {found.backend}, and the cluster's is {backend}",
            hint="nodes reach each other by one backend only: --flannel-backend says it on the server",
        )
    model.check(found, cluster, what=f"flannel-conf {path}")
    return found


def _check_filter(cluster: ClusterSettings, wanted: model.Configuration) -> None:
    for version in {each.version for each in cluster.cluster_cidrs}:
        if not (wanted.nftables or os.path.exists(os.path.join("/proc/sys", _FILTERED[version]))):
            raise errors.UnsupportedError(
                "flannel needs the kernel's br_netfilter, and it isn't there",
                hint="load its module: modprobe br_netfilter",
            )


def started_anew(layout: Layout) -> None:
    """What it said of the network before doesn't count any more."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(subnet_file(layout))


def _remember(layout: Layout, made: _Made) -> None:
    files.write_atomically(memory(layout), msgspec.json.encode(made), mode=0o600)


def _made(layout: Layout) -> _Made | None:
    try:
        with open(memory(layout), "rb") as file:
            return msgspec.json.decode(file.read(), type=_Made)
    except (OSError, *unreadable.JSON):
        return None


async def remove(layout: Layout) -> None:
    """Remove what a node's flannel has made; what can't be removed is told."""
    made = _made(layout)
    if made is None and os.path.exists(memory(layout)):
        _log.warning("%s can't be read: what flannel has made stays until the machine's next start", memory(layout))
    if made is None or made.machine != _machine():
        return
    if others.run(others.FLANNEL, here=True):
        # Its chains and interface have the same names, and pods of its cluster would be cut off.
        _log.warning(
            "another flannel runs on this machine: what this node's has made stays until the machine's next start"
        )
        return
    await iptables.remove_chains(model.CHAINS)
    if made.nftables:
        for family, table in model.TABLES:
            # (it may have none of one IP version)
            if await _run("nft", ["delete", "table", family, table]) is None:
                _log.warning("nft is not there: the table %s %s stays", family, table)
    for name in sorted({*made.interfaces} & {*_interfaces()}):
        await _told("ip", ["link", "delete", name])
    for family in sorted({f"-{ipaddress.ip_network(each).version}" for each in made.networks}):
        for route in routes(await _told("ip", [family, "-json", "route", "show", "table", "main"]), made.networks):
            await _told("ip", [family, "route", "delete", *route])


def routes(printed: bytes, networks: Collection[str]) -> list[list[str]]:
    """The routes to other nodes' pods, as ip-route(8) takes them.

    Args:
        printed: What ``ip -json route`` says.
        networks: The networks of the cluster's pods.
    """
    within = [ipaddress.ip_network(each) for each in networks]
    found = []
    for route in json.loads(printed) if printed.strip() else []:
        to, gateway, interface = (str(route.get(key, "")) for key in ("dst", "gateway", "dev"))
        with contextlib.suppress(ValueError):
            there = ipaddress.ip_network(to)
            if gateway and any(each.version == there.version and there.subnet_of(each) for each in within):  # type: ignore[arg-type]  # of one version
                found.append([to, "via", gateway, "dev", interface])
    return found


async def _run(name: str, arguments: Sequence[str]) -> process.Completed | None:
    program = process.find_program(name)
    if program is None:
        return None
    with contextlib.suppress(errors.NixletError):
        return await process.run([program, *arguments], timeout=_TIMEOUT)
    return None


async def _told(name: str, arguments: Sequence[str]) -> bytes:
    """What a program prints; where it fails, that is told."""
    done = await _run(name, arguments)
    if done is not None and done.returncode == 0:
        return done.stdout
    said = "it is not there" if done is None else done.stderr.decode(errors="replace").strip()
    _log.warning("%s %s can't be done: %s", name, " ".join(arguments), said)
    return b""
