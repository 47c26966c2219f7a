"""The mounts of a snapshot: its own directory over those of its layers, each Nix layer preceded by its closure."""

import asyncio
import collections
import contextlib
import os
import stat
from collections.abc import Awaitable, Callable, Collection

from nixlet import errors
from nixlet.host import mounts as host_mounts
from nixlet.snapshots import binds, disk, mappedroots, metadata, model, tables, views
from nixlet.snapshots import closures as closures_module


class Mounts:
    """Says what a client has to mount to see a snapshot."""

    def __init__(
        self,
        database: metadata.Metadata,
        closures: closures_module.Closures,
        *,
        root: str,
        store_dir: str,
        real_store_dir: str,
        check_targets: Callable[[], Awaitable[None]],
        overlay: model.Overlay = model.Overlay.KERNEL,
    ) -> None:
        """The mounts of the snapshots below a root.

        Args:
            database: Their database.
            closures: Their closures.
            root: The directory.
            store_dir: The store as containers see it.
            real_store_dir: The directory on this host with the store's files.
            check_targets: Raises when the client can't mount below a snapshot's root.
            overlay: Who makes containers' roots.
        """
        self._db = database
        self._closures = closures
        self._root = root
        self._snapshots = os.path.join(root, "snapshots")
        self._store_dir = store_dir
        self._real_store_dir = real_store_dir
        self._check_targets = check_targets
        #: Layers whose directories are not there.
        self.lost: Collection[int] = ()
        #: How many roots were made for containers and layers, by strategy.
        self.made: collections.Counter[str] = collections.Counter()
        self._overlay = overlay
        self._overlay_options = _options(overlay)
        self._mapped = mappedroots.MappedRoots(self._snapshots, self._overlay_options)

    def upper(self, number: int) -> str:
        """The directory with a snapshot's own content."""
        return os.path.join(self._snapshots, str(number), "fs")

    def mount_points(self, number: int) -> str:
        """The directory of a snapshot's own content in which a layer has the mount points for its closure."""
        return self.upper(number) + self._store_dir

    def check_mount_points(self, number: int, closure: tables.Closure | tables.NewClosure) -> None:
        """Refuse a layer with mount points that its closure doesn't fill (blocking).

        Layers of equal content are one snapshot in containerd, whichever image's labels came first: a closure that
        doesn't belong to a layer would leave the containers of another image with empty directories.

        Raises:
            FailedPreconditionError: It has one, or its store is no directory.
        """
        directory = self.upper(number)
        with contextlib.suppress(FileNotFoundError):
            for part in self._store_dir.strip("/").split("/"):
                # The layer's content is foreign: a link in it would lead this look astray, on the host.
                directory = os.path.join(directory, part)
                if not stat.S_ISDIR(os.lstat(directory).st_mode):
                    raise errors.FailedPreconditionError(f"the layer's {self._store_dir} is not a directory")
            unfilled = sorted(set(os.listdir(directory)) - set(closure.names))
            if unfilled:
                raise errors.FailedPreconditionError(
                    f"the layer has a mount point for {self._store_dir}/{unfilled[0]}, which its closure lacks"
                )

    async def of(self, row: tables.Row) -> list[model.Mount]:
        """The mounts of an active or view snapshot; its closures are complete then.

        Raises:
            FailedPreconditionError: A store path is missing and can't be brought back, the layers are too many, or the
                client can't make bind mounts below a root.
            UnsupportedError: It is a pod's volume, and of bind mounts.
        """
        strategy = model.Strategy(row.strategy)
        self.made[strategy.value] += 1
        owners = mappedroots.recorded(row.labels)
        if owners is not None and row.parent is not None:
            return [await self._mapped_mount(row, owners)]
        layers: list[binds.Lower] = []
        for layer in self._chain(row):
            # A closure stands directly above its own layer, whose empty mount points it fills, and below all later ones.
            if layer.closure is not None:
                shown = await self._closures.ensure_shown(layer.closure, strategy)
                layers.append(binds.Lower(shown, skeleton=strategy is model.Strategy.BIND))
            layers.append(binds.Lower(self.upper(layer.id), skeleton=False))
        root = self._root_mount(row, [layer.directory for layer in layers])
        if not any(layer.skeleton for layer in layers):
            return [root]
        if model.is_volume(row.key):
            # It unmounts the volume alone, which is busy while something is mounted below, and never gets rid of the pod.
            raise errors.UnsupportedError(
                "a volume can't be an image of store paths where these are bind mounts, which containerd would leave behind",
                hint="use the strategy view (nixlet doctor says what keeps it from working), or a container of that image",
            )
        await self._check_targets()
        bound = await asyncio.to_thread(
            binds.binds, layers, store_dir=self._store_dir, real_store_dir=self._real_store_dir
        )
        return [root, *bound]

    async def _mapped_mount(self, row: tables.Row, owners: mappedroots.Owners) -> model.Mount:
        """The mount of a root whose owners are mapped, which is mounted here."""
        if self._overlay is not model.Overlay.KERNEL:
            raise errors.UnsupportedError(
                "a pod in a user namespace can't have its root by fuse-overlayfs, which shows other owners in it",
                hint="run it without (hostUsers: true), or with --snapshotter nix",
            )
        layers: list[str | views.Pieces] = []
        for layer in self._chain(row):
            if layer.closure is not None:
                if row.strategy != model.Strategy.VIEW:
                    raise errors.UnsupportedError(
                        "a pod in a user namespace can't have an image of store paths where these are bind mounts",
                        hint="run it without (hostUsers: true); nixlet doctor says what keeps the strategy view from working",
                    )
                layers.append(await self._closures.ensure_pieces(layer.closure))
            layers.append(self.upper(layer.id))
        writable = row.kind is model.Kind.ACTIVE
        root = await self._mapped.show(row.id, layers, owners, writable=writable)
        return model.Mount("bind", root, ("rw" if writable else "ro", "rbind"))

    def _chain(self, row: tables.Row) -> list[tables.Layer]:
        """A snapshot's committed ancestors, nearest first; all of them have their content."""
        chain = self._db.chain(row.parent)
        for layer in chain:
            if layer.id in self.lost:
                raise disk.lost_content(layer.id)
        return chain

    def _root_mount(self, row: tables.Row, lower: list[str]) -> model.Mount:
        directory = os.path.join(self._snapshots, str(row.id))
        upper = self.upper(row.id)
        if row.kind is model.Kind.ACTIVE:
            if not lower:
                return model.Mount("bind", upper, ("rw", "rbind"))
            writable: tuple[str, ...] = (f"workdir={directory}/work", f"upperdir={upper}")
        elif len(lower) < 2:
            return model.Mount("bind", lower[0] if lower else upper, ("ro", "rbind"))
        else:
            writable = ()
        options = (*self._overlay_options, *writable, f"lowerdir={':'.join(lower)}")
        if self._overlay is not model.Overlay.KERNEL:
            return model.Mount(self._overlay.value, "overlay", options)
        # containerd mounts long lists relative to the directory that all layers have in common.
        shared = len(os.path.commonpath(lower)) + 1 if len(lower) > 1 else 0
        size = sum(len(os.fsencode(option)) + 1 for option in options) - shared * len(lower)
        if size > host_mounts.MAX_OPTIONS:
            raise errors.FailedPreconditionError(
                f"the snapshot {row.key} has {len(lower)} layers, whose names take {size} bytes and the kernel mounts"
                f" {host_mounts.MAX_OPTIONS}",
                hint="build the image with fewer layers",
            )
        return model.Mount(self._overlay.value, "overlay", options)


def _options(overlay: model.Overlay) -> tuple[str, ...]:
    """What an overlay needs besides its layers, as containerd's own plugins know."""
    if overlay is model.Overlay.FUSE_OVERLAYFS:
        # With it, writes from several sides get lost (github.com/containers/fuse-overlayfs, issue 134).
        return ("writeback=0",)
    # overlayfs's index makes mounting fail where layers were copied by other means.
    index = ("index=off",) if os.path.exists("/sys/module/overlay/parameters/index") else ()
    return (*index, *host_mounts.overlay_attributes())
