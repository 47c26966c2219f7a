"""The snapshotter: containerd's snapshot semantics, with closures as views.

Snapshot N lives in ``snapshots/N`` (``fs``, and ``work`` for what can be written), view M in ``views/M``. The database is the
truth: a directory, view or GC root that it doesn't know is left over from a crash and is swept at the start.
"""

import asyncio
import collections
import contextlib
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

from nixlet import errors
from nixlet.host import files
from nixlet.snapshots import disk, filters, keeper, model
from nixlet.snapshots import metadata as metadata_module
from nixlet.snapshots import views as views_module
from nixlet.store import closures, realiser, roots

T = TypeVar("T")

#: The one way in which this snapshotter makes a container's root; recorded with each active snapshot.
STRATEGY = "view"

_PAGE = 100

#: Labels in one page of a list: a message may have 16 MiB, and one snapshot's labels 4 MiB.
_PAGE_BYTES = 8 << 20

_log = logging.getLogger("nixlet.snapshots")


class Snapshotter:
    """All snapshots below one root directory."""

    def __init__(
        self, root: str, *, store_dir: str, real_store_dir: str, realise: realiser.Realiser, gc_roots: roots.Roots
    ) -> None:
        """Open the snapshots below ``root``.

        Args:
            root: The directory; nobody else may use it at the same time (the caller holds a lock on it).
            store_dir: The store as containers see it.
            real_store_dir: The directory on this host with the store's files.
            realise: Brings closures into the store.
            gc_roots: Keeps them there.

        Raises:
            FailedPreconditionError: The directory or its database can't be used.
        """
        if not root.startswith("/") or any(character in root for character in ":,\\\n"):
            raise errors.InvalidArgumentError(
                f"the snapshotter's root {root!r} can't be used: it must be absolute, without colon, comma or backslash"
            )
        self.root = root
        self._store_dir = store_dir
        files.make_directory(root, mode=0o700)
        self._snapshots = os.path.join(root, "snapshots")
        views_dir = os.path.join(root, "views")
        files.make_directory(self._snapshots, mode=0o700)
        files.make_directory(views_dir, mode=0o700)
        self._views = views_module.Views(views_dir, store_dir=store_dir, real_store_dir=real_store_dir)
        self._db = metadata_module.Metadata(metadata_module.database_path(root))
        self._closures = keeper.ClosureKeeper(
            self._db,
            self._views,
            store_dir=store_dir,
            real_store_dir=real_store_dir,
            realise=realise,
            gc_roots=gc_roots,
        )
        self._unfinished: set[str] = set()
        #: How many roots were made for containers and layers, by strategy.
        self.roots_made: collections.Counter[str] = collections.Counter()
        self._tasks: set[asyncio.Task[object]] = set()
        # overlayfs's index makes mounting fail where layers were copied by other means, as containerd's own plugin knows.
        self._overlay_options = ("index=off",) if os.path.exists("/sys/module/overlay/parameters/index") else ()

    async def start(self) -> None:
        """Finish or undo what a crash cut off.

        Raises:
            UnsupportedError: Views don't work on this kernel or below this directory.
        """
        await asyncio.to_thread(views_module.probe, self.root)
        await self._closures.discard_unfinished()
        swept = await self._sweep()
        if swept:
            _log.info("swept what an earlier run left behind: %s", ", ".join(swept))

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
        return await self._mounts(row)

    async def commit(self, name: str, key: str, labels: Mapping[str, str]) -> None:
        """Turn an active snapshot into a committed one, under its final name."""
        _check_key(name)
        _check_labels(labels)
        row = self._db.get(key)
        if row.kind is model.Kind.ACTIVE:
            if row.closure is not None:
                await asyncio.to_thread(self._check_mount_points, row.id, self._db.closure(row.closure))
            usage = await asyncio.to_thread(disk.usage, self._upper(row.id))
        else:
            usage = model.Usage(0, 0)  # refused below, after the checks that come first
        await self._uncancelled(
            self._db.write(lambda _: self._db.commit_snapshot(name, key, labels, usage)), f"commit {key}"
        )

    async def remove(self, key: str) -> None:
        """Forget a snapshot; its disk space is freed in the background."""
        row = await self._uncancelled(self._db.write(lambda _: self._db.remove_snapshot(key)), f"remove {key}")
        self._background(self._free(row.id, closure_changed=row.closure is not None), f"free {row.id}")

    async def stat(self, key: str) -> model.Info:
        """What is known of a snapshot."""
        return self._db.info(self._db.get(key))

    async def update(self, name: str, labels: Mapping[str, str], fields: Sequence[str] | None) -> model.Info:
        """Change a snapshot's labels: all, or the fields named ("labels", "labels.KEY").

        A committed layer without a closure takes one from labels that name one: that is how a layer is mended that was
        unpacked by a client which passes no annotations on. A closure that is there stays.
        """
        row = self._db.get(name)
        current = dict(self._db.info(row).labels)
        new = _updated_labels(current, labels, fields)
        _check_labels(new)
        reference = None
        if row.kind is model.Kind.COMMITTED and row.closure is None:
            reference = closures.parse_annotations(new, self._store_dir)
        if reference is None:
            await self._uncancelled(self._db.write(lambda _: self._db.set_labels(self._db.get(name), new)), name)
            return self._db.info(self._db.get(name))
        async with self._closures.realised(reference, self._background) as record:

            def change(_: object) -> None:
                self._db.set_closure(row, record())
                self._db.set_labels(self._db.get(name), new)

            await self._uncancelled(self._db.write(change), f"update {name}")
        return self._db.info(self._db.get(name))

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
                info = self._db.info(row)
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
            return await asyncio.to_thread(disk.usage, self._upper(row.id))
        return model.Usage(row.size, row.inodes)

    async def cleanup(self) -> None:
        """Sweep what no snapshot needs; returns when it is gone."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._sweep()

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
        _check_key(key)
        _check_labels(labels)
        if any(label in labels for label in model.ID_MAPPING_LABELS):
            raise errors.FailedPreconditionError(
                "pods in user namespaces are not supported by this snapshotter yet",
                hint="run the pod without hostUsers: false",
            )
        reference = None
        if kind is model.Kind.ACTIVE and model.is_unpack(key, labels):
            reference = closures.parse_annotations(labels, self._store_dir)
        if reference is None:
            row = await self._uncancelled(self._insert(key, parent, labels, kind, None), f"prepare {key}")
        else:
            async with self._closures.realised(reference, self._background) as record:
                row = await self._uncancelled(self._insert(key, parent, labels, kind, record), f"prepare {key}")
        try:
            return await self._mounts(row)
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
        record_closure: Callable[[], int] | None,
    ) -> metadata_module.Row:
        temporary = tempfile.mkdtemp(prefix="new-", dir=self._snapshots)
        self._unfinished.add(os.path.basename(temporary))
        try:
            upper = os.path.join(temporary, "fs")
            os.mkdir(upper, 0o755)
            if kind is model.Kind.ACTIVE:
                os.mkdir(os.path.join(temporary, "work"), 0o711)

            def change(_: object) -> metadata_module.Row:
                closure = None if record_closure is None else record_closure()
                row = self._db.insert_snapshot(key, kind, parent, labels, closure, STRATEGY)
                if row.parent is not None:
                    # The root directory's owner comes from the topmost layer, so it must be the parent's.
                    owner = os.stat(self._upper(row.parent))
                    if (owner.st_uid, owner.st_gid) != (0, 0):
                        os.chown(upper, owner.st_uid, owner.st_gid)
                os.rename(temporary, os.path.join(self._snapshots, str(row.id)))
                return row

            return await self._db.write(change)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        finally:
            self._unfinished.discard(os.path.basename(temporary))

    def _upper(self, number: int) -> str:
        return os.path.join(self._snapshots, str(number), "fs")

    async def _mounts(self, row: metadata_module.Row) -> list[model.Mount]:
        layers = self._db.chain(row.parent)
        directory = os.path.join(self._snapshots, str(row.id))
        upper = os.path.join(directory, "fs")
        self.roots_made[row.strategy] += 1
        lower: list[str] = []
        for layer in layers:
            # A view stands directly above its own layer, whose empty mount points it fills, and below all later layers.
            if layer.closure is not None:
                lower.append(await self._closures.ensure_view(layer.closure))
            lower.append(self._upper(layer.id))
        if row.kind is model.Kind.ACTIVE:
            if not lower:
                return [model.Mount("bind", upper, ("rw", "rbind"))]
            writable: tuple[str, ...] = (f"workdir={directory}/work", f"upperdir={upper}")
        elif len(lower) < 2:
            return [model.Mount("bind", lower[0] if lower else upper, ("ro", "rbind"))]
        else:
            writable = ()
        options = (*self._overlay_options, *writable, f"lowerdir={':'.join(lower)}")
        return [model.Mount("overlay", "overlay", options)]

    def _check_mount_points(self, number: int, closure: metadata_module.Closure) -> None:
        """Refuse a layer with mount points that its closure doesn't fill.

        Layers of equal content are one snapshot in containerd, whichever image's labels came first: a closure that
        doesn't belong to a layer would leave the containers of another image with empty directories.
        """
        directory = self._upper(number)
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

    async def _free(self, number: int, *, closure_changed: bool) -> None:
        await asyncio.to_thread(disk.remove_tree, os.path.join(self._snapshots, str(number)))
        if closure_changed:
            await self._closures.drop_unused()

    async def _sweep(self) -> list[str]:
        """Remove directories, views and roots that the database doesn't know; what was removed, in words."""
        swept = []
        known = {str(number) for number in self._db.snapshot_ids()} | self._unfinished
        for name in set(await asyncio.to_thread(os.listdir, self._snapshots)) - known:
            await asyncio.to_thread(disk.remove_tree, os.path.join(self._snapshots, name))
            swept.append(f"snapshot directory {name}")
        return swept + await self._closures.sweep()


def _check_key(key: str) -> None:
    if not key:
        raise errors.InvalidArgumentError("a snapshot's key or name can't be empty")


def _check_labels(labels: Mapping[str, str]) -> None:
    size = sum(len(key) + len(value) for key, value in labels.items())
    if size > model.MAX_LABEL_BYTES:
        raise errors.InvalidArgumentError(f"the snapshot's labels take {size} bytes, more than {model.MAX_LABEL_BYTES}")


def _updated_labels(
    current: Mapping[str, str], labels: Mapping[str, str], fields: Sequence[str] | None
) -> dict[str, str]:
    if not fields:
        return dict(labels)
    new = dict(current)
    for field in fields:
        if field == "labels":
            new = dict(labels)
        elif field.startswith("labels."):
            key = field.removeprefix("labels.")
            if labels.get(key):
                new[key] = labels[key]
            else:
                new.pop(key, None)
        else:
            raise errors.InvalidArgumentError(f"the field {field} of a snapshot can't be changed")
    return new
