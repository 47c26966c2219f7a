"""Making a snapshot: its directory, its record and its mounts, all of them or none."""

import asyncio
import contextlib
import os
import shutil
from collections.abc import Mapping

from nixlet import errors
from nixlet.host import files
from nixlet.snapshots import closures as closures_module
from nixlet.snapshots import disk, mappedroots, metadata, model, sweep, tables
from nixlet.snapshots import faults as faults_module
from nixlet.snapshots import mounts as mounts_module
from nixlet.snapshots import tasks as tasks_module
from nixlet.store import closures as closure_references

_Made = tuple[tables.Row, list[model.Mount]]


class Creator:
    """Makes the snapshots below a root."""

    def __init__(
        self,
        database: metadata.Metadata,
        closures: closures_module.Closures,
        mounts: mounts_module.Mounts,
        sweeper: sweep.Sweeper,
        *,
        snapshots: str,
        spares: disk.Spares,
        tasks: tasks_module.Tasks,
        faults: faults_module.Faults,
    ) -> None:
        """A creator.

        Args:
            database: Where they are recorded.
            closures: What their layers bring along.
            mounts: How clients see them.
            sweeper: Takes away what was made for nobody.
            snapshots: The directory with a directory for each snapshot.
            spares: Gives these directories.
            tasks: Run what must not be cut in half.
            faults: Where tests can have the process killed.
        """
        self._db = database
        self._closures = closures
        self._mounts = mounts
        self._sweeper = sweeper
        self._snapshots = snapshots
        self._spares = spares
        self._tasks = tasks
        self._faults = faults
        #: Keys of snapshots that nobody waited for to the end, which are being removed again.
        self._undoing: dict[str, asyncio.Task[None]] = {}

    async def create(
        self,
        key: str,
        parent: str,
        labels: Mapping[str, str],
        kind: model.Kind,
        strategy: model.Strategy,
        reference: closure_references.ClosureReference | None,
    ) -> list[model.Mount]:
        """Make a snapshot that brings along the closure of a reference; its mounts.

        A caller who gives up while the closure is being fetched has begun nothing. Later the work is done to its end in a task
        of its own, and undone then.
        """
        if (undoing := self._undoing.get(key)) is not None:
            await asyncio.wait([undoing])
        async with contextlib.AsyncExitStack() as stack:
            closure = None
            if reference is not None:
                closure = await stack.enter_async_context(self._closures.realised(reference))
            making = self._make(stack.pop_all(), key, parent, labels, kind, strategy, closure)
        task = self._tasks.start(making, f"make {key}")
        try:
            return (await asyncio.shield(task))[1]
        except asyncio.CancelledError:
            # Nobody was told that the key is taken: it is free again for whoever tries anew.
            undoing = self._tasks.background(self._undo(task), f"undoing the unwanted {key}")
            self._undoing[key] = undoing
            undoing.add_done_callback(lambda _: self._undoing.pop(key, None))
            raise

    async def _make(
        self,
        held: contextlib.AsyncExitStack,
        key: str,
        parent: str,
        labels: Mapping[str, str],
        kind: model.Kind,
        strategy: model.Strategy,
        closure: tables.NewClosure | None,
    ) -> _Made:
        """Make a snapshot, and let go what was held for it once it is recorded."""
        async with held:
            row = await self._record(key, parent, labels, kind, strategy, closure)
        self._faults.reach("snapshot-recorded")
        try:
            return row, await self._mounts.of(row)
        except BaseException:
            # Without mounts the caller has no snapshot: it must not find the key taken when it tries again.
            with contextlib.suppress(errors.NixletError):
                await self._forget(row)
            raise

    async def _record(
        self,
        key: str,
        parent: str,
        labels: Mapping[str, str],
        kind: model.Kind,
        strategy: model.Strategy,
        closure: tables.NewClosure | None,
    ) -> tables.Row:
        with files.refusing(f"the snapshots in {self._snapshots} can't be written"):
            self.refill_spares()
            return await self._db.create_snapshot(
                key, kind, parent, labels, strategy=strategy, closure=closure, effect=self._place
            )

    def _place(self, row: tables.Row, undo: contextlib.ExitStack) -> None:
        """Give a snapshot that is being recorded its directory (blocking)."""
        # What is left of the log on a full disk is for removing.
        files.check_room(self._snapshots)
        made = self._spares.take()
        undo.callback(shutil.rmtree, made, ignore_errors=True)
        self._faults.reach("directory-made")
        self._own(made, row)
        target = os.path.join(self._snapshots, str(row.id))
        os.rename(made, target)
        undo.callback(os.rename, target, made)
        self._faults.reach("directory-renamed")

    def _own(self, made: str, row: tables.Row) -> None:
        """Give a snapshot's root the owner of its parent's: it covers that of all layers below."""
        uid = gid = 0
        if row.parent is not None:
            try:
                owner = os.stat(self._mounts.upper(row.parent))
            except FileNotFoundError as error:
                raise disk.lost_content(row.parent) from error
            uid, gid = owner.st_uid, owner.st_gid
        owners = mappedroots.recorded(row.labels)
        if owners is not None:
            uid, gid = owners.outside(uid, gid)
        if (uid, gid) != (0, 0):
            os.chown(os.path.join(made, "fs"), uid, gid)

    def refill_spares(self) -> None:
        """Have directories made in advance, if it is time for that."""
        if self._spares.claim_refill():
            self._tasks.background(asyncio.to_thread(self._spares.refill), "making spare directories")

    async def _undo(self, made: "asyncio.Task[_Made]") -> None:
        """Undo what nobody waits for any more, once it is done; what failed has undone itself."""
        with contextlib.suppress(errors.NixletError):
            row, _ = await made
            await self._forget(row)

    async def _forget(self, row: tables.Row) -> None:
        if await self._db.undo_creation(row):
            self._sweeper.free(row)
