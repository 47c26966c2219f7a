"""The bridge that the CNI plugins make, and which nobody else takes away: ioctl(2) requests of netdevice(7) and the bridge."""

import contextlib
import fcntl
import os
import socket
import struct

from nixlet import errors

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
