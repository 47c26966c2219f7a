"""Where pods look names up (resolv.conf(5)): a file that serves pods as well as the host, and what CRI is told of it."""

import ipaddress
import logging
import os

from nixlet import errors
from nixlet.host import files
from nixlet.rpc.gen import cri_pb2

#: The host's own file, which containerd copies to pods by itself, and where systemd-resolved keeps the servers behind its own.
HOST, _UPSTREAM = "/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"

#: Looks names up for pods where the host does so in itself alone; k3s's choice.
_PUBLIC_SERVER = "8.8.8.8"

#: As large as such a file may be, in bytes.
_MAX_BYTES = 1 << 20

_log = logging.getLogger("nixlet.pods")


def for_pods(named: str, instead: str) -> str:
    """Where pods are to look names up; empty if containerd's way, which is to copy the host's file, serves them.

    Args:
        named: The file that a person wants them to use; empty: none.
        instead: Is written, and is where they look, if no file of the host's serves them.

    Raises:
        FailedPreconditionError: The file that is named can't be read, or the other one not be written.
    """
    if named:
        read(named)
        return named
    found = find()
    if found is None:
        _log.warning(
            "%s names no server that pods can reach: they look names up at %s",
            HOST,
            _PUBLIC_SERVER,
            extra={"hint": "name other servers: --resolv-conf FILE"},
        )
        files.write_atomically(instead, f"nameserver {_PUBLIC_SERVER}\n")
        return instead
    return "" if found == HOST else found


def find(candidates: tuple[str, ...] = (HOST, _UPSTREAM)) -> str | None:
    """The first of some files whose servers can be reached from a pod, or None."""
    return next((path for path in candidates if os.path.exists(path) and serves_pods(path)), None)


def serves_pods(path: str) -> bool:
    """Whether a file names servers, and none that a pod would look for in itself or on its own link."""
    try:
        servers = read(path).servers
    except errors.NixletError:
        return False
    return bool(servers) and all(map(_is_global, servers))


def _is_global(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if getattr(address, "scope_id", None):
        return False
    return not (
        address.is_loopback
        or address.is_multicast
        or address.is_link_local
        or address.is_unspecified
        or str(address) == "255.255.255.255"
    )


def read(path: str) -> cri_pb2.DNSConfig:
    """What a file says, as CRI is told it; read as kubelets do.

    Raises:
        FailedPreconditionError: It can't be read.
    """
    try:
        with open(path, "rb") as file:
            lines = file.read(_MAX_BYTES).decode(errors="replace").split("\n")
    except OSError as error:
        raise errors.FailedPreconditionError(
            f"{path}, where pods are to look names up, can't be read: {error.strerror}"
        ) from error
    servers: list[str] = []
    searches: list[str] = []
    options: list[str] = []
    for line in lines:
        word, *values = line.partition("#")[0].partition(";")[0].split() or [""]
        if word == "nameserver":
            servers += values[:1]
        elif word == "search":
            # The last one counts.
            searches = [value.rstrip(".") or "." for value in values]
        elif word == "options":
            options += values
    return cri_pb2.DNSConfig(servers=servers, searches=searches, options=options)
