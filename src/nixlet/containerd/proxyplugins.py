"""Proxy plugins: snapshotters that containerd reaches over a socket (its docs/PLUGINS.md)."""

import dataclasses
from typing import Any

#: By it containerd leaves the owners of a pod in a user namespace to the snapshotter.
REMAP_IDS = "remap-ids"


@dataclasses.dataclass(frozen=True, slots=True)
class ProxyPlugin:
    """What containerd is told of a snapshotter that is a program of its own.

    Attributes:
        name: What containerd calls it.
        address: Its socket.
        root: Where it keeps its files: CRI reports that file system as the images'. Empty: nobody knows.
        capabilities: What it does by itself, in containerd's words.
        reads_annotations: Whether it reads the annotations of layers, which a pull then has to hand on.
        asks_registries: Whether it has to be told what image a layer is of, since it asks the registry for it.
    """

    name: str
    address: str
    root: str = ""
    capabilities: tuple[str, ...] = ()
    reads_annotations: bool = False
    asks_registries: bool = False

    def table(self) -> dict[str, Any]:
        """Its table in containerd's configuration, the same in each version. 1.6 passes exports and capabilities over."""
        exports = {"root": self.root} if self.root else {}
        if self.reads_annotations:
            exports["enable_remote_snapshot_annotations"] = "true"
        table: dict[str, Any] = {"type": "snapshot", "address": self.address}
        if exports:
            table["exports"] = exports
        if self.capabilities:
            table["capabilities"] = list(self.capabilities)
        return table
