"""The snapshotter: containerd's snapshot semantics, with closures as views.

Snapshot N lives in ``snapshots/N`` (its content in ``fs``, overlayfs's ``work`` beside it), view M in ``views/M``. The database is the
truth: a directory, view or GC root that it knows no more is left over from a crash and is swept at the start.
"""

import asyncio
import contextlib
import functools
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

from nixlet import errors
from nixlet.host import files, procfs
from nixlet.snapshots import closures as closures_module
from nixlet.snapshots import create, disk, filters, mappedroots, model, probe, sweep, tables
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
        overlay: model.Overlay = model.Overlay.KERNEL,
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
            overlay: Who makes containers' roots.
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
        self._overlay = overlay
        self._faults = faults or faults_module.Faults()
        files.make_directory(root, mode=0o700)
        self._snapshots = os.path.join(root, "snapshots")
        views_dir = os.path.join(root, "views")
        files.make_directory(self._snapshots, mode=0o700)
        files.make_directory(views_dir, mode=0o700)
        self._views = views_module.Views(
            views_dir,
            store_dir=store_dir,
            real_store_dir=real_store_dir,
            boot=procfs.boot_id(),
            faults=self._faults,
        )
        self._db = self._open_database()
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
            overlay=overlay,
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
        self._creator = create.Creator(
            self._db,
            self._closures,
            self._mounts,
            self._sweeper,
            snapshots=self._snapshots,
            spares=self._spares,
            tasks=self._tasks,
            faults=self._faults,
        )
        self._chosen: asyncio.Task[model.Strategy] | None = None

    def _open_database(self) -> metadata_module.Metadata:
        path = metadata_module.database_path(self.root)
        if not os.path.exists(path):
            # Before one is made that would be taken for theirs.
            sweep.check_known(path, 0, self._snapshots)
        opened = metadata_module.Metadata(path, self._faults)
        try:
            sweep.check_known(path, opened.issued("snapshots"), self._snapshots)
        except BaseException:
            opened.close_unused()
            raise
        # What a sweep can't delete must not be taken for something new.
        opened.pass_over("snapshots", max(disk.numbers(self._snapshots), default=0))
        opened.pass_over("closures", max(self._views.numbers(), default=0))
        return opened

    async def start(self) -> None:
        """Finish or undo what a crash cut off, and begin to find out which strategy works here."""
        await asyncio.to_thread(probe.sweep, self.root)
        self._begin_choosing()
        self._creator.refill_spares()
        swept = await self._sweeper.sweep()
        self._mounts.lost = await self._sweeper.restore()
        if swept:
            _log.info("swept what an earlier run left behind: %s", ", ".join(swept))

    async def strategy(self) -> model.Strategy:
        """How new containers get to see closures.

        Raises:
            UnsupportedError: No strategy works here, or not the one that was asked for.
            ResourceExhaustedError, UnavailableError: Something passing was in the way of finding out, such as a full disk.
        """
        chosen = self._chosen
        assert chosen is not None, "start() comes first"
        # What failed is tried again by the next call: the reason may be gone.
        if chosen.done() and (chosen.cancelled() or chosen.exception() is not None):
            chosen = self._begin_choosing()
        return await asyncio.shield(chosen)

    def _begin_choosing(self) -> "asyncio.Task[model.Strategy]":
        choosing = probe.choose(self._wanted, self.root, self._real_store_dir, self._overlay)
        self._chosen = self._tasks.start(choosing, "choosing a strategy")
        return self._chosen

    async def close(self) -> None:
        """Wait for what is running and close the database. Snapshots and views stay."""
        await self._tasks.finish()
        await self._db.close()

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
        with self._refusing():
            return await self._mounts.of(row)

    async def commit(self, name: str, key: str, labels: Mapping[str, str]) -> None:
        """Turn an active snapshot into a committed one, under its final name."""
        model.check_key(name)
        model.check_labels(labels)
        row = self._db.get(key)
        mount_points = ""
        with self._refusing():
            # What isn't active is refused below, after the checks that come first.
            if row.kind is model.Kind.ACTIVE and row.closure is not None:
                known = self._db.closure(row.closure)
                reference = closure_references.parse_annotations(labels, self._store_dir)
                if reference is not None and reference.identity != known.identity:
                    raise errors.FailedPreconditionError(
                        f"the layer {name} was unpacked with another closure than it is committed with"
                    )
                await asyncio.to_thread(self._mounts.check_mount_points, row.id, known)
                mount_points = self._mounts.mount_points(row.id)
            upper = self._mounts.upper(row.id)
            if await self._commit(name, key, labels, functools.partial(disk.empty_usage, upper), row.id):
                return
            usage = await asyncio.to_thread(disk.sync_layer, upper, mount_points)
            await self._commit(name, key, labels, lambda: usage, row.id)

    async def _commit(
        self, name: str, key: str, labels: Mapping[str, str], look: Callable[[], model.Usage | None], number: int
    ) -> bool:
        def measure() -> model.Usage | None:
            usage = look()
            if usage is not None:
                self._faults.reach("usage-measured")
            return usage

        return await self._db.commit_snapshot(name, key, labels, measure, number)

    async def remove(self, key: str) -> None:
        """Forget a snapshot; its disk space is freed in the background."""
        await self._tasks.uncancelled(self._remove(key), f"remove {key}")

    async def _remove(self, key: str) -> None:
        row = await self._db.remove_snapshot(key)
        self._faults.reach("removal-recorded")
        self._sweeper.free(row)

    async def stat(self, key: str) -> model.Info:
        """What is known of a snapshot."""
        return self._db.get(key).info()

    async def update(self, name: str, labels: Mapping[str, str], fields: Sequence[str] | None) -> model.Info:
        """Change a snapshot's labels: all, or the fields named ("labels", "labels.KEY").

        A committed layer without a closure takes one from labels that name one: that is how a layer is mended that was
        unpacked by a client which passes no annotations on. A closure that is there stays, and labels that name another one
        are refused. Nothing is fetched for that: all of containerd waits meanwhile, since it has its one write transaction
        open.
        """
        row = self._db.get(name)

        def changed(current: Mapping[str, str]) -> Mapping[str, str]:
            new = model.updated_labels(current, labels, fields)
            model.check_labels(new)
            return new

        reference = None
        if row.kind is model.Kind.COMMITTED:
            reference = closure_references.parse_annotations(changed(row.info().labels), self._store_dir)
        known = None if row.closure is None else self._db.closure(row.closure)
        if reference is not None and known is not None and known.identity == reference.identity:
            reference = None
        async with contextlib.AsyncExitStack() as stack:
            closure = None
            if reference is not None:
                closure = await stack.enter_async_context(self._closures.realised(reference, fetch=False))
            if closure is not None and known is None:
                with self._refusing():
                    await asyncio.to_thread(self._mounts.check_mount_points, row.id, closure)
            updating = self._update(stack.pop_all(), row, changed, closure)
            return (await self._tasks.uncancelled(updating, f"update {name}")).info()

    async def _update(
        self,
        held: contextlib.AsyncExitStack,
        row: tables.Row,
        changed: Callable[[Mapping[str, str]], Mapping[str, str]],
        closure: tables.NewClosure | None,
    ) -> tables.Row:
        async with held:
            return await self._db.update_labels(row.key, changed, closure, None if closure is None else row.id)

    async def pages(self, wanted: Sequence[str] = ()) -> AsyncIterator[list[model.Info]]:
        """The snapshots that filters ask for, in pages of some number and size (bytes of labels).

        Raises:
            InvalidArgumentError: A filter is malformed.
        """
        selected = filters.parse(wanted)
        page: list[model.Info] = []
        size = 0
        for looked, row in enumerate(self._db.rows(), start=1):
            if not looked % _PAGE:
                # Others are served meanwhile.
                await asyncio.sleep(0)
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
        if row.kind is not model.Kind.ACTIVE:
            return model.Usage(row.size, row.inodes)
        try:
            with self._refusing():
                return (await asyncio.to_thread(disk.content, self._mounts.upper(row.id))).usage
        except errors.FailedPreconditionError:
            # Removed meanwhile, it may be.
            self._db.get(key)
            raise

    async def cleanup(self) -> None:
        """Sweep what no snapshot needs; returns when it is gone."""
        await self._sweeper.freed()
        with self._refusing():
            await self._sweeper.sweep()

    @property
    def roots_made(self) -> Mapping[str, int]:
        """How many roots were made for containers and layers, by strategy."""
        return self._mounts.made

    def counts(self) -> Mapping[model.Kind, int]:
        """How many snapshots there are of each kind."""
        return self._db.counts()

    def check(self) -> None:
        """Check that changes are made.

        Raises:
            UnavailableError: They are refused, or one has been waiting for some seconds.
        """
        self._db.check()

    # Making snapshots.

    async def _create(self, key: str, parent: str, labels: Mapping[str, str], kind: model.Kind) -> list[model.Mount]:
        model.check_key(key)
        model.check_labels(labels)
        # What can't be read is refused before anything is made.
        mappedroots.owners(labels)
        strategy = await self.strategy()
        reference = None
        if kind is model.Kind.ACTIVE and model.is_unpack(key, labels):
            reference = closure_references.parse_annotations(labels, self._store_dir)
        with self._refusing():
            return await self._creator.create(key, parent, labels, kind, strategy, reference)

    def _refusing(self) -> contextlib.AbstractContextManager[None]:
        """Tell what the file system refuses, with the directory."""
        return files.refusing(f"the snapshotter's directory {self.root} can't be used")
