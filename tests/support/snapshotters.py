"""A snapshotter with a private Nix store and real mounts, without containerd."""

import os
from collections.abc import Sequence
from pathlib import Path

from nixlet.snapshots import faults, model, snapshotter
from nixlet.store import policy, realiser, roots
from nixlet.store.daemon import client
from support.nixstore import PrivateStore

LAYER = "containerd.io/snapshot/nix-layer"
PATH = "containerd.io/snapshot/nix-store-path."


async def nothing_to_check() -> None:
    pass


class Rig:
    def __init__(self, directory: Path, store: PrivateStore, strategy: str) -> None:
        self.strategy = strategy
        self.check_targets = nothing_to_check
        self.faults: faults.Faults | None = None
        self.root = directory / "root"
        self.store = store
        self.daemon = client.DaemonStore(store.settings)
        self.roots = roots.Roots(self.daemon.settings.gcroots, "test")
        self.snapshotter = self.open()

    def open(self) -> snapshotter.Snapshotter:
        bringer = realiser.Realiser(self.daemon, policy.Policy())
        return snapshotter.Snapshotter(
            str(self.root),
            store_dir=self.store.store_dir,
            real_store_dir=self.store.store_dir,
            realise=bringer,
            gc_roots=self.roots,
            strategy=self.strategy,
            check_targets=self.check_targets,
            faults=self.faults,
        )

    async def reopen(self) -> None:
        """As after a crash: nothing is closed in order."""
        await self.snapshotter.close()
        self.snapshotter = self.open()
        await self.snapshotter.start()

    async def layer(self, name: str, paths: Sequence[str], parent: str = "", *, labelled: bool = True) -> None:
        """Unpack a Nix layer as containerd does."""
        labels = {model.SNAPSHOT_REF_LABEL: name}
        if labelled:
            labels |= {LAYER: "true"} | {f"{PATH}{number}": path for number, path in enumerate(paths)}
        key = f"ns/1/extract-1 {name}"
        mount = (await self.snapshotter.prepare(key, parent, labels))[0]
        upper = mount.source if mount.type == "bind" else option(mount, "upperdir")
        for path in paths:
            os.makedirs(upper + path)
        await self.snapshotter.commit(name, key, labels)


def option(mount: model.Mount, name: str) -> str:
    (value,) = [each.partition("=")[2] for each in mount.options if each.startswith(f"{name}=")]
    return value
