"""The snapshotter: containerd's snapshot semantics, with closures as views.

Snapshot N lives in ``snapshots/N`` (its content in ``fs``, overlayfs's ``work`` beside it), view M in ``views/M``. The database is the
truth: a directory, view or GC root that it doesn't know is left over from a crash and is swept at the start.
"""

import asyncio
import contextlib
import functools
import logging
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

from nixlet import errors
from nixlet.host import files
from nixlet.snapshots import composer, disk, filters, keeper, model, probe
from nixlet.snapshots import faults as faults_module
from nixlet.snapshots import metadata as metadata_module
from nixlet.snapshots import views as views_module
from nixlet.store import closures, realiser, roots

T = TypeVar("T")

_PAGE = 100

#: Seconds that removed snapshots wait for being deleted from the disk.
_FREE_LATER = 0.1

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
        self._closures = keeper.ClosureKeeper(
            self._db,
            self._views,
            store_dir=store_dir,
            real_store_dir=real_store_dir,
            realise=realise,
            gc_roots=gc_roots,
            faults=self._faults,
        )
        self._composer = composer.Composer(
            self._db,
            self._closures,
            root=root,
            store_dir=store_dir,
            real_store_dir=real_store_dir,
            check_targets=check_targets,
        )
        self._spares = disk.Spares(os.path.join(root, "spare"))
        #: Snapshots whose directories are to be deleted, and whether a closure may be let go with them.
        self._removed: dict[int, bool] = {}
        self._tasks: set[asyncio.Task[object]] = set()
        self._chosen: asyncio.Task[model.Strategy] | None = None

    async def start(self) -> None:
        """Finish or undo what a crash cut off, and begin to find out which strategy works here."""
        self._chosen = self._task(probe.choose(self._wanted, self.root, self._real_store_dir), "choosing a strategy")
        self._refill_spares()
        await self._closures.discard_unfinished()
        swept = await self._sweep()
        await asyncio.to_thread(self._restore, {row.id: row.kind for row in self._db.rows()})
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
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
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
        return await self._composer.mounts(row)

    async def commit(self, name: str, key: str, labels: Mapping[str, str]) -> None:
        """Turn an active snapshot into a committed one, under its final name."""
        model.check_key(name)
        model.check_labels(labels)
        row = self._db.get(key)
        if row.kind is model.Kind.ACTIVE:
            if row.closure is not None:
                await asyncio.to_thread(self._composer.check_mount_points, row.id, self._db.closure(row.closure))
            upper = self._composer.upper(row.id)
            usage = disk.small_usage(upper)
            if usage is None:
                usage = await asyncio.to_thread(disk.usage, upper)
        else:
            usage = model.Usage(0, 0)  # refused below, after the checks that come first
        self._faults.reach("usage-measured")
        await self._db.write(lambda: self._db.commit_snapshot(name, key, labels, usage))

    async def remove(self, key: str) -> None:
        """Forget a snapshot; its disk space is freed in the background."""
        row = await self._uncancelled(self._db.write(lambda: self._db.remove_snapshot(key)), f"remove {key}")
        self._faults.reach("removal-recorded")
        if not self._removed:
            self._background(self._free(), "freeing removed snapshots")
        self._removed[row.id] = row.closure is not None

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
            reference = closures.parse_annotations(new, self._store_dir)
        if reference is None:
            await self._db.write(lambda: self._db.set_labels(self._db.get(name), new))
            return self._db.get(name).info()
        async with self._closures.realised(reference, self._background) as record:

            def change() -> None:
                self._db.set_closure(row, record())
                self._db.set_labels(self._db.get(name), new)

            await self._uncancelled(self._db.write(change), f"update {name}")
        return self._db.get(name).info()

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
            return await asyncio.to_thread(disk.usage, self._composer.upper(row.id))
        return model.Usage(row.size, row.inodes)

    async def cleanup(self) -> None:
        """Sweep what no snapshot needs; returns when it is gone."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._sweep()

    @property
    def roots_made(self) -> Mapping[str, int]:
        """How many roots were made for containers and layers, by strategy."""
        return self._composer.made

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
            reference = closures.parse_annotations(labels, self._store_dir)
        if reference is None:
            row = await self._insert(key, parent, labels, kind, strategy, None)
        else:
            async with self._closures.realised(reference, self._background) as record:
                row = await self._uncancelled(
                    self._insert(key, parent, labels, kind, strategy, record), f"prepare {key}"
                )
        self._faults.reach("snapshot-recorded")
        try:
            return await self._composer.mounts(row)
        except BaseException:
            # Without mounts the caller has no snapshot: it must not find the key taken when it tries again.
            with contextlib.suppress(errors.NixletError):
                await self._uncancelled(self.remove(key), f"undo {key}")
            raise

    async def _insert(
        self,
        key: str,
        parent: str,
        labels: Mapping[str, str],
        kind: model.Kind,
        strategy: model.Strategy,
        record_closure: Callable[[], int] | None,
    ) -> metadata_module.Row:
        temporary = self._spares.take()
        self._refill_spares()
        upper = os.path.join(temporary, "fs")
        try:
            self._faults.reach("directory-made")

            def change() -> metadata_module.Row:
                closure = None if record_closure is None else record_closure()
                row = self._db.insert_snapshot(key, kind, parent, labels, closure, strategy)
                if row.parent is not None:
                    # The root directory's owner comes from the topmost layer, so it must be the parent's.
                    owner = os.stat(self._composer.upper(row.parent))
                    if (owner.st_uid, owner.st_gid) != (0, 0):
                        os.chown(upper, owner.st_uid, owner.st_gid)
                os.rename(temporary, os.path.join(self._snapshots, str(row.id)))
                self._faults.reach("directory-renamed")
                return row

            return await self._db.write(change)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    # Work that outlives its caller.

    async def _uncancelled(self, work: Awaitable[T], name: str) -> T:
        """Run a change in a task of its own: a caller who gives up doesn't cut it in half."""
        return await asyncio.shield(self._task(work, name))

    def _task(self, work: Awaitable[T], name: str) -> "asyncio.Task[T]":
        async def run() -> T:
            return await work

        task = asyncio.create_task(run(), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _background(self, work: Awaitable[object], name: str) -> None:
        def report(done: "asyncio.Task[object]") -> None:
            if not done.cancelled() and (error := done.exception()):
                _log.error("%s failed: %s", done.get_name(), error)

        self._task(work, name).add_done_callback(report)

    async def _free(self) -> None:
        """Delete the directories of removed snapshots, one after the other, a little later: calls come first."""
        await asyncio.sleep(_FREE_LATER)
        removed, self._removed = self._removed, {}
        paths = [os.path.join(self._snapshots, str(number)) for number in removed]
        try:
            await asyncio.to_thread(disk.remove_trees, paths, functools.partial(self._faults.reach, "directory-freed"))
        finally:
            if any(removed.values()):
                await self._closures.drop_unused()

    def _restore(self, kinds: Mapping[int, model.Kind]) -> None:
        """Make directories again that a power cut took: what the database says is on the disk before they are."""
        for number in sorted(kinds.keys() - {int(name) for name in os.listdir(self._snapshots) if name.isdigit()}):
            os.rename(self._spares.take(), os.path.join(self._snapshots, str(number)))
            if kinds[number] is model.Kind.COMMITTED:
                _log.error(
                    "layer %d has lost its content, as after a power cut; remove its image and pull it again", number
                )
            else:
                _log.warning("snapshot %d has lost its content, as after a power cut", number)

    def _refill_spares(self) -> None:
        if self._spares.claim_refill():
            self._background(asyncio.to_thread(self._spares.refill), "making spare directories")

    async def _sweep(self) -> list[str]:
        """Remove directories, views and roots that the database doesn't know; what was removed, in words."""
        # Looked at before the database is: what is made meanwhile is known there, and not seen here.
        present = await asyncio.to_thread(os.listdir, self._snapshots)
        unknown = sorted(set(present) - {str(number) for number in self._db.snapshot_ids() | self._removed.keys()})
        await asyncio.to_thread(disk.remove_trees, [os.path.join(self._snapshots, name) for name in unknown])
        swept = [f"snapshot directory {name}" for name in unknown]
        return swept + await self._closures.sweep()
