"""What a node's pods leave in places that all nodes and other container tools share; it is known by their sandboxes' IDs alone."""

import contextlib
import json
import os
import re
from collections.abc import Collection, Sequence

from nixlet.node.settings import config as node_config

#: Where containerd's CNI library keeps what the plugins answered, as NETWORK-SANDBOX-INTERFACE.
_CNI_RESULTS = "/var/lib/cni/results"

#: Where containerd's CRI keeps a sandbox's files, below its data as below its running state, from 1.6 to 2.4.
_SANDBOXES = "io.containerd.grpc.v1.cri/sandboxes"

_ID = re.compile(r"[0-9a-f]{64}")


def of_node(layouts: Sequence[node_config.Layout]) -> frozenset[str]:
    """The IDs of the sandboxes that a node has, or had an address for.

    Args:
        layouts: The node's directories, with each of its state directories.
    """
    found: set[str] = set()
    for layout in layouts:
        for directory in (layout.containerd_root, layout.containerd_state):
            found.update(map(os.path.basename, directories(os.path.join(directory, _SANDBOXES))))
        # host-local's leases: a file for each address, whose first line is the sandbox's ID.
        for network in directories(os.path.join(layout.cni_data_dir, "networks")):
            for entry in os.scandir(network):
                with contextlib.suppress(OSError), open(entry.path, encoding="ascii", errors="replace") as lease:
                    found.add(lease.readline(100).strip())
    return frozenset(filter(_ID.fullmatch, found))


def cni_results(pods: Collection[str]) -> list[str]:
    """The files that hold what CNI plugins answered for these sandboxes, the loopback plugin as well."""
    try:
        names = os.listdir(_CNI_RESULTS)
    except FileNotFoundError:
        return []
    return [os.path.join(_CNI_RESULTS, name) for name in names if any(pod in pods for pod in _ID.findall(name))]


def shim_sockets(layout: node_config.Layout) -> list[str]:
    """The sockets of shims, which lie outside of our directories; each bundle names its own.

    containerd 1.x writes the address to a file of that name, 2.x to ``bootstrap.json``.
    """
    found = []
    for namespace in directories(os.path.join(layout.containerd_state, "io.containerd.runtime.v2.task")):
        for bundle in directories(namespace):
            address = _read(f"{bundle}/address")
            with contextlib.suppress(ValueError, KeyError, TypeError):
                address = address or str(json.loads(_read(f"{bundle}/bootstrap.json"))["address"])
            path = address.strip().removeprefix("unix://")
            if re.fullmatch(r"/run/containerd/s/[0-9a-f]{64}", path):
                found.append(path)
    return found


def _read(path: str) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError), open(path, encoding="utf-8") as file:
        return file.read(4096)
    return ""


def directories(path: str) -> list[str]:
    """The directories in a directory, which needs not be there."""
    try:
        return sorted(entry.path for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False))
    except (FileNotFoundError, NotADirectoryError):
        return []
