"""Unix sockets: listening at ones that only their owner can open; connecting to others', whether anybody listens there, and who."""

import asyncio
import contextlib
import errno
import os
import socket
import stat
import struct
from collections.abc import Sequence

from nixlet import errors
from nixlet.host import files

#: Seconds between two tries at a socket whose queue is full.
_RETRY_INTERVAL = 0.02


async def connected(path: str) -> socket.socket:
    """A connection to a unix socket; whoever listens there and is too busy to take it is waited for, without limit.

    The kernel has those wait for room in the queue who may block. All others get EAGAIN (connect(2)), which asyncio takes for a
    connection and uvloop for an error.

    Raises:
        OSError: As ``socket.connect``, of the kind that fits.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        while (number := sock.connect_ex(path)) == errno.EAGAIN:
            await asyncio.sleep(_RETRY_INTERVAL)
        if number:
            raise OSError(number, os.strerror(number), path)
    except BaseException:
        sock.close()
        raise
    return sock


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


def listen(path: str, inherited: Sequence[socket.socket] = ()) -> socket.socket:
    """A listening socket of mode 0600 in a directory of mode 0700, in the place of one that nobody serves any more.

    Args:
        path: The socket's path.
        inherited: Listening sockets that a service manager kept; one of that path is taken.

    Raises:
        FailedPreconditionError: Another process serves that socket, or something else has its name.
    """
    for kept in inherited:
        if kept.getsockname() == path and os.path.exists(path):
            return kept
    files.make_directory(os.path.dirname(path), mode=0o700)
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise errors.FailedPreconditionError(
                f"{path} exists and is no socket", hint="remove it, or choose another directory"
            )
        if is_served(path):
            raise errors.FailedPreconditionError(
                f"another process serves the socket {path}", hint="stop that process, or choose another directory"
            )
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        # Linux gives a socket's file the mode that the socket has (unix_bind in net/unix/af_unix.c): no moment in which others may connect.
        os.fchmod(sock.fileno(), 0o600)
        sock.bind(path)
        sock.listen(128)
    except OSError as error:
        sock.close()
        raise errors.FailedPreconditionError(f"can't listen on {path}: {error.strerror or error}") from error
    return sock


def remove(path: str) -> None:
    """Remove a socket's file, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
