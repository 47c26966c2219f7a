"""The snapshotter: containerd's snapshot semantics, with closures as views.

Snapshot N lives in ``snapshots/N`` (its content in ``fs``, overlayfs's ``work`` beside it), view M in ``views/M``. The database is the
truth: a directory, view or GC root that it doesn't know is left over from a crash and is swept at the start.
"""

import asyncio
import contextlib
import logging
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

from nixlet import errors
from nixlet.host import files
from nixlet.snapshots import closures as closures_module
from nixlet.snapshots import disk, filters, model, probe, sweep
from nixlet.snapshots import faults as faults_module
from nixlet.snapshots import metadata as metadata_module
from nixlet.snapshots import mounts as mounts_module
from nixlet.snapshots import tasks as tasks_module
from nixlet.snapshots import views as views_module
from nixlet.store import closures as closure_references
from nixlet.store import realiser, roots

_PAGE = 100

#: Labels in one page of a list: a message may have 16 MiB, and one snapshot's labels 4 MiB.
_PAGE_BYTES = 8 << 20

_log = logging.getLogger("nixlet.snapshots")


async def _no_check() -> None:
    pass


class Snapshotter:
    """All snapshots below one root directory."""

    def __init__(
        self,
        root: str,
        *,
        store_dir: str,
        real_store_dir: str,
        realise: realiser.Realiser,
        gc_roots: roots.Roots,
        strategy: str = "auto",
        check_targets: Callable[[], Awaitable[None]] = _no_check,
        faults: faults_module.Faults | None = None,
    ) -> None:
        """Open the snapshots below ``root``.

        Args:
            root: The directory; nobody else may use it at the same time (the caller holds a lock on it).
            store_dir: The store as containers see it.
            real_store_dir: The directory on this host with the store's files.
            realise: Brings closures into the store.
            gc_roots: Keeps them there.
            strategy: How containers get to see closures: one of ``probe.CHOICES``.
            check_targets: Raises when the client can't mount below a snapshot's root, which bind mounts need.
            faults: Where tests can have the process killed.

        Raises:
            FailedPreconditionError: The directory or its database can't be used.
        """
        if not root.startswith("/") or any(character in root for character in ":,\\\n"):
            raise errors.InvalidArgumentError(
                f"the snapshotter's root {root!r} can't be used: it must be absolute, without colon, comma or backslash"
            )
        self.root = root
        self._store_dir = store_dir
        self._real_store_dir = real_store_dir
        self._wanted = strategy
        self._faults = faults or faults_module.Faults()
        files.make_directory(root, mode=0o700)
        self._snapshots = os.path.join(root, "snapshots")
        views_dir = os.path.join(root, "views")
        files.make_directory(self._snapshots, mode=0o700)
        files.make_directory(views_dir, mode=0o700)
        self._views = views_module.Views(
            views_dir, store_dir=store_dir, real_store_dir=real_store_dir, faults=self._faults
        )
        self._db = metadata_module.Metadata(metadata_module.database_path(root), self._faults)
        self._tasks = tasks_module.Tasks()
        self._closures = closures_module.Closures(
            self._db,
            self._views,
            store_dir=store_dir,
            real_store_dir=real_store_dir,
            realise=realise,
            gc_roots=gc_roots,
            tasks=self._tasks,
            faults=self._faults,
        )
        self._mounts = mounts_module.Mounts(
            self._db,
            self._closures,
            root=root,
            store_dir=store_dir,
            real_store_dir=real_store_dir,
            check_targets=check_targets,
        )
        self._spares = disk.Spares(os.path.join(root, "spare"))
        self._sweeper = sweep.Sweeper(
            self._db,
            self._closures,
            snapshots=self._snapshots,
            spares=self._spares,
            tasks=self._tasks,
            faults=self._faults,
        )
        self._chosen: asyncio.Task[model.Strategy] | None = None

    async def start(self) -> None:
        """Finish or undo what a crash cut off, and begin to find out which strategy works here."""
        self._chosen = self._tasks.start(
            probe.choose(self._wanted, self.root, self._real_store_dir), "choosing a strategy"
        )
        self._refill_spares()
        await self._closures.discard_unfinished()
        swept = await self._sweeper.sweep()
        await self._sweeper.restore()
        if swept:
            _log.info("swept what an earlier run left behind: %s", ", ".join(swept))

    async def strategy(self) -> model.Strategy:
        """How new containers get to see closures.

        Raises:
            UnsupportedError: No strategy works here, or not the one that was asked for.
        """
        assert self._chosen is not None, "start() comes first"
        return await asyncio.shield(self._chosen)

    async def close(self) -> None:
        """Wait for what is running and close the database. Snapshots and views stay."""
        await self._tasks.finish()
        self._db.close()

    def unmount_views(self) -> None:
        """Unmount all views (blocking); they are mounted again when a container needs them."""
        self._views.unmount_all()

    # The operations of containerd's snapshots service.

    async def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> list[model.Mount]:
        """Make an active snapshot and return its mounts."""
        return await self._create(key, parent, labels, model.Kind.ACTIVE)

    async def view(self, key: str, parent: str, labels: Mapping[str, str]) -> list[model.Mount]:
        """Make a read-only snapshot and return its mounts."""
        return await self._create(key, parent, labels, model.Kind.VIEW)

    async def mounts(self, key: str) -> list[model.Mount]:
        """The mounts of an active or view snapshot; its closures are complete and their views mounted."""
        row = self._db.get(key)
        if row.kind is model.Kind.COMMITTED:
            raise errors.FailedPreconditionError(f"snapshot {key} is committed and has no mounts of its own")
        return await self._mounts.of(row)

    async def commit(self, name: str, key: str, labels: Mapping[str, str]) -> None:
        """Turn an active snapshot into a committed one, under its final name."""
        model.check_key(name)
        model.check_labels(labels)
        row = self._db.get(key)
        if row.kind is model.Kind.ACTIVE:
            if row.closure is not None:
                await asyncio.to_thread(self._mounts.check_mount_points, row.id, self._db.closure(row.closure))
            upper = self._mounts.upper(row.id)
            usage = disk.small_usage(upper)
            if usage is None:
                usage = await asyncio.to_thread(disk.usage, upper)
        else:
            usage = model.Usage(0, 0)  # refused below, after the checks that come first
        self._faults.reach("usage-measured")
        await self._db.commit_snapshot(name, key, labels, usage)

    async def remove(self, key: str) -> None:
        """Forget a snapshot; its disk space is freed in the background."""
        row = await self._tasks.uncancelled(self._db.remove_snapshot(key), f"remove {key}")
        self._faults.reach("removal-recorded")
        self._sweeper.free(row)

    async def stat(self, key: str) -> model.Info:
        """What is known of a snapshot."""
        return self._db.get(key).info()

    async def update(self, name: str, labels: Mapping[str, str], fields: Sequence[str] | None) -> model.Info:
        """Change a snapshot's labels: all, or the fields named ("labels", "labels.KEY").

        A committed layer without a closure takes one from labels that name one: that is how a layer is mended that was
        unpacked by a client which passes no annotations on. A closure that is there stays.
        """
        row = self._db.get(name)
        current = dict(row.info().labels)
        new = model.updated_labels(current, labels, fields)
        model.check_labels(new)
        reference = None
        if row.kind is model.Kind.COMMITTED and row.closure is None:
            reference = closure_references.parse_annotations(new, self._store_dir)
        if reference is None:
            return (await self._db.set_labels(name, new)).info()
        async with self._closures.realised(reference) as closure:
            changed = await self._tasks.uncancelled(self._db.set_labels(name, new, closure), f"update {name}")
        return changed.info()

    async def pages(self, wanted: Sequence[str] = ()) -> AsyncIterator[list[model.Info]]:
        """The snapshots that filters ask for, in pages of some number and size (bytes of labels).

        Raises:
            InvalidArgumentError: A filter is malformed.
        """
        selected = filters.parse(wanted)
        after = 0
        page: list[model.Info] = []
        size = 0
        while rows := self._db.page(after, _PAGE):
            after = rows[-1].id
            for row in rows:
                info = row.info()
                if not selected(info):
                    continue
                if page and (len(page) == _PAGE or size + len(row.labels) > _PAGE_BYTES):
                    yield page
                    page, size = [], 0
                page.append(info)
                size += len(row.labels)
        if page:
            yield page

    async def usage(self, key: str) -> model.Usage:
        """What a snapshot takes of the disk; measured at commit, and afresh for an active one."""
        row = self._db.get(key)
        if row.kind is model.Kind.ACTIVE:
            return await asyncio.to_thread(disk.usage, self._mounts.upper(row.id))
        return model.Usage(row.size, row.inodes)

    async def cleanup(self) -> None:
        """Sweep what no snapshot needs; returns when it is gone."""
        await self._tasks.finish()
        await self._sweeper.sweep()

    @property
    def roots_made(self) -> Mapping[str, int]:
        """How many roots were made for containers and layers, by strategy."""
        return self._mounts.made

    def counts(self) -> Mapping[model.Kind, int]:
        """How many snapshots there are of each kind."""
        return self._db.counts()

    def closure_of(self, name: str) -> tuple[str, ...]:
        """The store paths that a committed snapshot and its ancestors bring along, sorted.

        Raises:
            NotFoundError: There is no such snapshot.
        """
        row = self._db.named(name)
        if row is None:
            raise errors.NotFoundError(f"snapshot {name} does not exist")
        layers = [metadata_module.Layer(row.id, row.closure), *self._db.chain(row.parent)]
        names = {name for layer in layers if layer.closure for name in self._db.closure(layer.closure).names}
        return tuple(f"{self._store_dir}/{name}" for name in sorted(names))

    # Making snapshots.

    async def _create(self, key: str, parent: str, labels: Mapping[str, str], kind: model.Kind) -> list[model.Mount]:
        model.check_key(key)
        model.check_labels(labels)
        if any(label in labels for label in model.ID_MAPPING_LABELS):
            raise errors.FailedPreconditionError(
                "pods in user namespaces are not supported by this snapshotter yet",
                hint="run the pod without hostUsers: false",
            )
        strategy = await self.strategy()
        reference = None
        if kind is model.Kind.ACTIVE and model.is_unpack(key, labels):
            reference = closure_references.parse_annotations(labels, self._store_dir)
        if reference is None:
            row = await self._insert(key, parent, labels, kind, strategy, None)
        else:
            async with self._closures.realised(reference) as closure:
                row = await self._tasks.uncancelled(
                    self._insert(key, parent, labels, kind, strategy, closure), f"prepare {key}"
                )
        self._faults.reach("snapshot-recorded")
        try:
            return await self._mounts.of(row)
        except BaseException:
            # Without mounts the caller has no snapshot: it must not find the key taken when it tries again.
            with contextlib.suppress(errors.NixletError):
                await self._tasks.uncancelled(self.remove(key), f"undo {key}")
            raise

    async def _insert(
        self,
        key: str,
        parent: str,
        labels: Mapping[str, str],
        kind: model.Kind,
        strategy: model.Strategy,
        closure: metadata_module.NewClosure | None,
    ) -> metadata_module.Row:
        temporary = self._spares.take()
        self._refill_spares()

        def place(row: metadata_module.Row, undo: contextlib.ExitStack) -> None:
            if row.parent is not None:
                # The root directory's owner comes from the topmost layer, so it must be the parent's.
                owner = os.stat(self._mounts.upper(row.parent))
                if (owner.st_uid, owner.st_gid) != (0, 0):
                    os.chown(os.path.join(temporary, "fs"), owner.st_uid, owner.st_gid)
            target = os.path.join(self._snapshots, str(row.id))
            os.rename(temporary, target)
            undo.callback(os.rename, target, temporary)
            self._faults.reach("directory-renamed")

        try:
            self._faults.reach("directory-made")
            return await self._db.create_snapshot(
                key, kind, parent, labels, strategy=strategy, closure=closure, effect=place
            )
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _refill_spares(self) -> None:
        if self._spares.claim_refill():
            self._tasks.background(asyncio.to_thread(self._spares.refill), "making spare directories")
