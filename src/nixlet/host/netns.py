"""Network namespaces of other processes: setns(2), and removing interfaces over rtnetlink(7)."""

import ctypes
import os
import socket
import struct
import threading

from nixlet import errors

_CLONE_NEWNET = 0x40000000

_NLMSG_ERROR = 2
_RTM_DELLINK = 17
_NLM_F_REQUEST_ACK = 1 | 4
_HEADER = struct.Struct("=IHHII")
_LINK = struct.Struct("=BxHiII")


def leave_only_loopback(pid: int) -> None:
    """Remove every interface but "lo" from the network namespace of a process; blocks for some milliseconds.

    Raises:
        FailedPreconditionError: The process is gone, or the kernel refused; the namespace is not to be used then.
    """
    problems: list[OSError] = []

    def remove() -> None:
        try:
            _enter(f"/proc/{pid}/ns/net")
            for index, name in socket.if_nameindex():
                if name != "lo":
                    _remove_link(index)
        except OSError as error:
            problems.append(error)

    # A thread that ends with this: it alone enters the namespace, and nobody else ever runs on it.
    thread = threading.Thread(target=remove, name="network namespace")
    thread.start()
    thread.join()
    if problems:
        raise errors.FailedPreconditionError(
            f"the network can't be taken from process {pid}: {problems[0].strerror}"
        ) from problems[0]


def _enter(path: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(fd, _CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    finally:
        os.close(fd)


def _remove_link(index: int) -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as sock:
        body = _LINK.pack(socket.AF_UNSPEC, 0, index, 0, 0)
        sock.send(_HEADER.pack(_HEADER.size + len(body), _RTM_DELLINK, _NLM_F_REQUEST_ACK, 1, 0) + body)
        answer = sock.recv(4096)
    kind = _HEADER.unpack_from(answer)[1]
    number = -struct.unpack_from("=i", answer, _HEADER.size)[0] if kind == _NLMSG_ERROR else 0
    if number:
        raise OSError(number, os.strerror(number))
