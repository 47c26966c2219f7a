"""Which nodes of this host have which pod network: two with one bridge or with common addresses would give addresses twice.

Each holds a lock whose name says what it has, by network namespace: bridges and routes are a namespace's.
"""

import contextlib
import ipaddress
import os
from collections.abc import Iterator

from nixlet import errors
from nixlet.host import files, network

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


def check_gateway(bridge: str, pod_cidr: str) -> str:
    """Check that a bridge, if it is there, has the address that pods of a range need, or can be given it; says which that is.

    The CNI plugin gives a bridge the first address of the range, and refuses each pod where it has another one.

    Raises:
        FailedPreconditionError: It has another address.
    """
    network_of_pods = ipaddress.ip_network(pod_cidr)
    wanted = ipaddress.ip_interface(f"{network_of_pods[1]}/{network_of_pods.prefixlen}")
    others = [
        each
        for each in network.addresses(bridge)
        if each.version == wanted.version and (each.version == 4 or each.network.overlaps(wanted.network))
    ]
    if others and wanted not in others:
        raise errors.FailedPreconditionError(
            f"the bridge {bridge} has the address {others[0]}, and pods of {pod_cidr} need {wanted} there",
            hint="remove the pods that are on it, with the --pod-cidr that they were started with; or choose another --bridge",
        )
    return f"{bridge}: {wanted}"


def clear_gateway(bridge: str, pod_cidr: str, *, ours: bool) -> None:
    """The same, but a bridge of ours that no pod is on is removed for it.

    Raises:
        FailedPreconditionError: It has another address, and pods, or is not ours.
    """
    try:
        check_gateway(bridge, pod_cidr)
    except errors.FailedPreconditionError:
        if not ours or not network.remove_bridge(bridge):
            raise
