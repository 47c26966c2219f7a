"""The bridge that the CNI plugins make, and which nobody else takes away: ioctl(2) requests of netdevice(7) and the bridge."""

import contextlib
import fcntl
import ipaddress
import os
import socket
import struct

from nixlet import errors

_SIOCGIFADDR = 0x8915
_SIOCGIFNETMASK = 0x891B
_SCOPE_LINK = 0x20
_SIOCSIFFLAGS = 0x8914
_SIOCBRDELBR = 0x89A1


def bridge_exists(name: str) -> bool:
    """Whether a bridge of that name is there."""
    return os.path.isdir(f"/sys/class/net/{name}/bridge")


def bridge_members(name: str) -> list[str]:
    """The interfaces on a bridge; empty when there is no such bridge."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(os.listdir(f"/sys/class/net/{name}/brif"))
    return []


def addresses(name: str) -> list[ipaddress.IPv4Interface | ipaddress.IPv6Interface]:
    """The first IPv4 address of an interface, and its IPv6 ones but the link's own; empty when there is no such interface."""
    found: list[ipaddress.IPv4Interface | ipaddress.IPv6Interface] = []
    request = struct.pack("16s24x", name.encode())
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        # A struct ifreq: the name, then a sockaddr_in, whose address is behind its family and port.
        address, netmask = (
            socket.inet_ntoa(fcntl.ioctl(sock, asked, request)[20:24]) for asked in (_SIOCGIFADDR, _SIOCGIFNETMASK)
        )
        found.append(ipaddress.IPv4Interface(f"{address}/{netmask}"))
    # Not there where the kernel has no IPv6.
    with contextlib.suppress(FileNotFoundError), open("/proc/net/if_inet6", encoding="ascii") as file:
        for number, _, prefix, scope, _, interface in map(str.split, file):
            if interface == name and int(scope, 16) != _SCOPE_LINK:
                found.append(ipaddress.IPv6Interface((int(number, 16), int(prefix, 16))))
    return found


def outgoing_address(towards: str = "192.0.2.1") -> ipaddress.IPv4Address | None:
    """The address that packets to the world get as their sender; None: there is no way to it. Nothing is sent.

    Args:
        towards: An address out there; by default one that nobody has (RFC 5737).
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.connect((towards, 9))
        except OSError:
            return None
        return ipaddress.IPv4Address(sock.getsockname()[0])


def remove_bridge(name: str) -> bool:
    """Remove a bridge that has no members; whether it was removed (False: not there, or in use).

    Raises:
        FailedPreconditionError: The kernel refused.
    """
    if not bridge_exists(name) or bridge_members(name):
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            # A bridge can be removed only while it is down: flags 0.
            fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sH14x", name.encode(), 0))
            fcntl.ioctl(sock, _SIOCBRDELBR, struct.pack("16s", name.encode()))
        except OSError as error:
            raise errors.FailedPreconditionError(f"can't remove the bridge {name}: {error.strerror}") from error
    return True


def has_carrier(interface: str) -> bool:
    """Whether somebody is at the other end of an interface that is up (sysfs: ``carrier``)."""
    try:
        with open(f"/sys/class/net/{interface}/carrier", encoding="ascii") as file:
            return file.read().strip() == "1"
    except OSError:
        return False
