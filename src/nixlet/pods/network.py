"""A pod in the network: the addresses that it got, what the host can offer at them, and why it got none."""

import ipaddress
import re
from collections.abc import Sequence

from nixlet import errors
from nixlet.containers import model
from nixlet.pods import criconfig
from nixlet.rpc.gen import cri_pb2

#: What the bridge plugin says when the kernel has no port left (EXFULL), and host-local when it has no address left.
_BRIDGE_FULL = re.compile(r"to bridge (?P<bridge>\S+): exchange full")
_NO_ADDRESS = re.compile(r"no IP addresses available in (?:range set|network)")

#: What runc says in an ordinary user's node.
_NO_CGROUPS = re.compile(r"mkdir /sys/fs/cgroup/\S+: permission denied")

_REMOVE = "remove pods that are no longer needed: nixlet ps -a, nixlet rm"


def addresses(status: cri_pb2.PodSandboxStatus) -> tuple[str, ...]:
    """A pod's own addresses, where it is in the network of pods."""
    return tuple(filter(None, (status.network.ip, *(each.ip for each in status.network.additional_ips))))


def check_offers(pod: model.Pod) -> None:
    """Check that the host can offer a pod's ports where they are asked for, whatever addresses the pod gets.

    Raises:
        FailedPreconditionError: One it can't.
    """
    for port in criconfig.published_ports(pod):
        if port.host_ip and _is(port.host_ip, "is_loopback") and ":" in port.host_ip:
            raise errors.FailedPreconditionError(
                f"port {port.host_port} can't be offered at {port.host_ip}: the kernel leads nothing on from IPv6's loopback",
                hint=f"offer it at 127.0.0.1: -p 127.0.0.1:{port.host_port}:{port.container_port}",
            )


def check_served(pod: model.Pod, own: Sequence[str]) -> None:
    """Check that each address of the host that a port is asked for at is of a kind that the pod has.

    Args:
        pod: The pod.
        own: Its addresses.

    Raises:
        FailedPreconditionError: The kind is missing, so that nothing would arrive.
    """
    there = {ipaddress.ip_address(each).version for each in own}
    for port in criconfig.published_ports(pod):
        if port.host_ip and there and (version := ipaddress.ip_address(port.host_ip).version) not in there:
            raise errors.FailedPreconditionError(
                f"port {port.host_port} can't be offered at {port.host_ip}: pods have no IPv{version} addresses here",
                hint="leave the address out, or give pods other addresses (--pod-cidr)",
            )


def _is(address: str, what: str) -> bool:
    return bool(getattr(ipaddress.ip_address(address), what))


def explained(error: errors.NixletError) -> errors.NixletError:
    """The error of a pod that couldn't be made; in words where it is the network that is full."""
    if match := _BRIDGE_FULL.search(error.message):
        return errors.FailedPreconditionError(
            f"the bridge {match['bridge']} is full: the kernel connects {model.BRIDGE_PORTS:,} pods to a bridge at most",
            hint=_REMOVE,
        )
    if _NO_CGROUPS.search(error.message):
        return errors.FailedPreconditionError(
            "no cgroups are delegated to this node, and containerd 2 runs no containers without",
            hint="have it as a service of systemd's, which delegates them: nixlet rootless setup; or use containerd 1.7",
        )
    if _NO_ADDRESS.search(error.message):
        return errors.FailedPreconditionError(
            "all addresses for pods are given away", hint=f"{_REMOVE}; or start the node with more (--pod-cidr)"
        )
    return error
