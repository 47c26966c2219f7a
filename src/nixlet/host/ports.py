"""The host's ports: whether a program of the host has one."""

import errno
import socket

_KINDS = {"TCP": socket.SOCK_STREAM, "UDP": socket.SOCK_DGRAM}


def is_taken(address: str, port: int, protocol: str) -> bool:
    """Whether a program listens at a port of the host.

    Args:
        address: The address, or an empty text for all.
        port: The port.
        protocol: "TCP" or "UDP"; of others nothing is known (False).
    """
    kind = _KINDS.get(protocol)
    if kind is None:
        return False
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, kind | socket.SOCK_CLOEXEC) as probe:
        if kind == socket.SOCK_STREAM:
            # Connections that have ended don't count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False
