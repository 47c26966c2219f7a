"""Containers without a network: CRI makes them on the host's, and their records are changed before they start.

Until then nothing runs that could use it. What is in the record is what containerd hands to runc, which makes the namespaces and
brings their loopback interface up.
"""

import os
from typing import Any

import msgspec
from google.protobuf import any_pb2

from nixlet import errors
from nixlet.containerd import client, cri, runtimes
from nixlet.host import userns

#: What a pod's container gets of its own, and no other one of the pod sees.
_OWN = ("network", "uts")

#: What containerd sets in the network namespaces of pods (``enable_unprivileged_ports``, ``enable_unprivileged_icmp``).
_PORTS = ("net.ipv4.ip_unprivileged_port_start", "0")
_PING = ("net.ipv4.ping_group_range", "0 2147483647")


async def check_runtime(runtime: cri.RuntimeClient, handler: str) -> None:
    """Refuse a runtime before anything is made, where CRI says what it is; ``separate`` goes by what was made.

    Args:
        runtime: The CRI.
        handler: The name of the container's runtime; empty: the default one.

    Raises:
        UnsupportedError: It may go by its pod's network whatever its containers' records say.
        NixletError: CRI doesn't answer.
    """
    _check(await runtime.runtime_type(handler) or runtimes.RUNC_V2)


async def separate(containerd: client.Containerd, container: str, hostname: str) -> None:
    """Let a container that hasn't started have a network namespace with its loopback interface alone, and a host's name.

    Args:
        containerd: Who has its record.
        container: Its ID.
        hostname: The name.

    Raises:
        UnsupportedError: Its runtime may go by its pod's network whatever its record says.
        NixletError: The record can't be changed. The container must not be started then.
    """
    record = await containerd.container(container)
    if record is None:
        raise errors.NotFoundError(f"container {container} is gone")
    _check(record.runtime.name)
    spec = any_pb2.Any(type_url=record.spec.type_url, value=separated(record.spec.value, hostname, _sysctls()))
    await containerd.replace_spec(container, spec)


def _check(runtime: str) -> None:
    # Where a pod is a virtual machine, or a kernel of its own, that has one network for all of its containers.
    if runtime != runtimes.RUNC_V2:
        raise errors.UnsupportedError(
            f"a container without a network needs a runtime that works like runc, which {runtime} need not",
            hint="leave out --runtime or --network none",
        )


def separated(spec: bytes, hostname: str, sysctls: dict[str, str]) -> bytes:
    """A container's specification (OCI runtime specification, config.json) with such namespaces; all else stays, byte for byte.

    Args:
        spec: It, in JSON.
        hostname: The host's name that the container sees.
        sysctls: Kernel settings of its network, where it has no others.

    Raises:
        UnsupportedError: It isn't such a specification.
    """
    raw = dict[str, msgspec.Raw]
    try:
        whole = msgspec.json.decode(spec, type=raw)
        linux = msgspec.json.decode(whole.get("linux", b"{}"), type=raw)
        given = msgspec.json.decode(linux.get("namespaces", b"[]"), type=list[dict[str, Any]])
        others = [each for each in given if each["type"] not in _OWN]
        settings = {**sysctls, **msgspec.json.decode(linux.get("sysctl", b"{}"), type=dict[str, str])}
        changed = {**linux, "namespaces": [*others, *({"type": kind} for kind in _OWN)], "sysctl": settings}
        return msgspec.json.encode({**whole, "hostname": hostname, "linux": changed})
    except (KeyError, ValueError) as error:
        raise errors.UnsupportedError(f"the container's specification is not as OCI has it: {error}") from error


def _sysctls() -> dict[str, str]:
    name, _ = _PORTS
    # As containerd has it: kernels before 4.11 know neither, and a user namespace lacks most of the groups.
    if not os.path.exists(f"/proc/sys/{name.replace('.', '/')}"):
        return {}
    return dict([_PORTS] if userns.is_inside() else [_PORTS, _PING])
