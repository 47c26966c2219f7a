"""Which nodes of this host have which pod network: two with one bridge or with common addresses would give addresses twice.

Each holds a lock whose name says what it has, by network namespace: bridges and routes are a namespace's.
"""

import contextlib
import ipaddress
import os
from collections.abc import Iterator

from nixlet import errors
from nixlet.host import files

#: Where the locks are: root's alone, so that nobody can keep a node from starting.
DIRECTORY = "/run/nixlet-networks"

_HINT = "give this one a network of its own: --bridge and --pod-cidr"


@contextlib.contextmanager
def pod_network(bridge: str, pod_cidr: str, directory: str = DIRECTORY) -> Iterator[None]:
    """Have a bridge and a range of addresses for ourselves, for the time of the context.

    Raises:
        FailedPreconditionError: Another node has that bridge, or some of the addresses.
    """
    files.make_directory(directory, mode=0o700)
    namespace = os.stat("/proc/self/ns/net").st_ino
    own = f"{namespace} {bridge} {pod_cidr.replace('/', '_')}"
    path = os.path.join(directory, own)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(files.exclusive_lock(path, what=f"the bridge {bridge}"))
        except errors.FailedPreconditionError as error:
            if not files.holder(path):
                raise
            raise _taken(bridge, pod_cidr, bridge, pod_cidr, files.holder(path)) from error
        # Afterwards, so that of two that start at the same time at least one sees the other.
        for name in os.listdir(directory):
            theirs, _, rest = name.partition(" ")
            their_bridge, _, written = rest.rpartition(" ")
            if name == own or theirs != str(namespace):
                continue
            their_cidr = written.replace("_", "/")
            overlaps = ipaddress.ip_network(pod_cidr).overlaps(ipaddress.ip_network(their_cidr))
            if (bridge == their_bridge or overlaps) and (holder := files.holder(os.path.join(directory, name))):
                raise _taken(bridge, pod_cidr, their_bridge, their_cidr, holder)
        yield


def _taken(bridge: str, pod_cidr: str, theirs: str, their_cidr: str, pid: int) -> errors.NixletError:
    what = f"the bridge {bridge}" if bridge == theirs else f"addresses of {pod_cidr}"
    return errors.FailedPreconditionError(
        f"another node (process {pid}, bridge {theirs}, {their_cidr}) has {what}: pods would get addresses twice",
        hint=_HINT,
    )
