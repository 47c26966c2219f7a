"""The socket that a snapshotter listens at, which can outlive its process."""

import contextlib
import os
import socket

from nixlet.host import sdnotify, unixsocket


def listen(stack: contextlib.AsyncExitStack, path: str) -> socket.socket:
    """A listening socket: the one that a service manager kept, or a new one, which it is given to keep.

    Args:
        stack: Takes the socket's name away when it is left, unless somebody keeps the socket.
        path: Where it listens.

    Raises:
        FailedPreconditionError: Another process serves that socket.
    """
    inherited = sdnotify.inherited_sockets(os.environ)
    sock = unixsocket.listen(path, inherited)
    for kept in inherited:
        if kept is not sock:
            kept.close()
    # A manager that keeps the socket hands it to the next of us: calls wait for it meanwhile.
    if not sdnotify.Notifier(os.environ).keep(sock, anew=sock not in inherited):
        stack.callback(unixsocket.remove, path)
    return sock
