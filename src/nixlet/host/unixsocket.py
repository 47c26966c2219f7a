"""Unix sockets of other processes: whether anybody listens, and who."""

import errno
import os
import socket
import struct

from nixlet import errors


def peer_of(path: str) -> int:
    """The process that listens on a unix socket (SO_PEERCRED of unix(7)), by number.

    Raises:
        UnavailableError: Nobody does.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as probe:
        number = probe.connect_ex(path)
        if number:
            raise errors.UnavailableError(f"{path} can't be reached: {os.strerror(number)}")
        return int(struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])


def is_served(path: str) -> bool:
    """Whether some process accepts connections on a unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as probe:
        # EAGAIN: its queue is full, so somebody listens.
        return probe.connect_ex(path) in {0, errno.EAGAIN, errno.EINPROGRESS}
