"""What is there for nothing goes: directories of removed snapshots, and what a crash left that the database doesn't know.

Only what the database knew once, or nobody ever wrote to, is there for nothing: where a database lacks what it should know,
nothing is deleted.
"""

import asyncio
import functools
import logging
import os
import threading
from collections.abc import Callable, Collection

from nixlet import errors
from nixlet.snapshots import closures as closures_module
from nixlet.snapshots import disk, metadata, model, refusals, tables
from nixlet.snapshots import faults as faults_module
from nixlet.snapshots import tasks as tasks_module

#: Seconds that removed snapshots wait for being deleted from the disk.
_FREE_LATER = 0.1

_log = logging.getLogger("nixlet.snapshots")


def check_known(path: str, issued: int, snapshots: str) -> None:
    """Refuse directories whose snapshots a database never had: it is not theirs, or older than they are.

    A crash leaves such a directory empty: nobody is told of a snapshot before the database has it.

    Args:
        path: The database's file, for the error.
        issued: The highest number that it gave to a snapshot; 0 for a database that is not there.
        snapshots: The directory with a directory for each snapshot.

    Raises:
        FailedPreconditionError: There is one with content.
    """
    strange = [number for number in sorted(disk.numbers(snapshots)) if number > issued]
    strange = [number for number in strange if disk.has_content(os.path.join(snapshots, str(number)))]
    if strange:
        example = os.path.join(snapshots, str(strange[0]))
        why = "is older than" if issued else "is missing, or not the one of"
        raise errors.FailedPreconditionError(
            f"the snapshotter's database {path} {why} the snapshots that are there ({example}, {len(strange)} in all)",
            hint=refusals.way_out(path),
        )


class Sweeper:
    """Keeps the directory of snapshots in step with the database."""

    def __init__(
        self,
        database: metadata.Metadata,
        closures: closures_module.Closures,
        *,
        snapshots: str,
        spares: disk.Spares,
        tasks: tasks_module.Tasks,
        faults: faults_module.Faults,
    ) -> None:
        """A sweeper.

        Args:
            database: What is known.
            closures: Their views and roots are swept, too.
            snapshots: The directory with a directory for each snapshot.
            spares: Gives directories in the place of those that are lost.
            tasks: Runs what is deleted behind a call.
            faults: Where tests can have the process killed.
        """
        self._db = database
        self._closures = closures
        self._snapshots = snapshots
        self._spares = spares
        self._tasks = tasks
        self._faults = faults
        #: Snapshots whose directories are to be deleted, and whether a closure may be dropped with them.
        self._removed: dict[int, bool] = {}
        self._freeing: set[asyncio.Task[None]] = set()
        #: What one deletes no other does: a directory that is gone for one of two may be there still.
        self._deleting = asyncio.Lock()

    def free(self, row: tables.Row) -> None:
        """Have the directory of a snapshot deleted that the database has forgotten, and its closure if nobody needs that."""
        if not self._removed:
            task = self._tasks.background(self._free(), "freeing removed snapshots")
            self._freeing.add(task)
            task.add_done_callback(self._freeing.discard)
        self._removed[row.id] = row.closure is not None

    async def _free(self) -> None:
        """Delete the directories of removed snapshots, one after the other, a little later: calls come first."""
        await asyncio.sleep(_FREE_LATER)
        removed, self._removed = self._removed, {}
        paths = [os.path.join(self._snapshots, str(number)) for number in removed]
        try:
            await self._delete(paths, functools.partial(self._faults.reach, "directory-freed"))
        finally:
            if any(removed.values()):
                await self._closures.drop_unused()

    async def _delete(self, paths: Collection[str], removed: Callable[[], None] = lambda: None) -> None:
        """Delete directories; who gives up waiting for that ends it, and the next start goes on with it."""
        given_up = threading.Event()
        await self._deleting.acquire()
        deleting = asyncio.get_running_loop().run_in_executor(None, disk.remove_trees, paths, removed, given_up.is_set)
        # Whoever gives up waits for no end, not even that of one large file; the next deletion does.
        deleting.add_done_callback(lambda _: self._deleting.release())
        try:
            await asyncio.shield(deleting)
        finally:
            given_up.set()

    async def freed(self) -> None:
        """Wait until the snapshots are deleted that were removed up to now; not for those that are removed meanwhile."""
        if self._freeing:
            await asyncio.wait(set(self._freeing))

    async def sweep(self) -> list[str]:
        """Remove directories, views and roots that the database doesn't know; what was removed, in words."""
        # Looked at before the database is: what is made meanwhile is known there, and not seen here.
        present = await asyncio.to_thread(disk.numbers, self._snapshots)
        await self._db.settled()
        unknown = sorted(present - self._db.snapshot_ids() - self._removed.keys())
        await self._delete([os.path.join(self._snapshots, str(number)) for number in unknown])
        swept = [f"snapshot directory {number}" for number in unknown]
        return swept + await self._closures.sweep()

    async def restore(self) -> Collection[int]:
        """Make directories again that a power cut took: what the database says is on the disk before they are.

        Returns:
            The layers among them, whose content is lost: what stands on them must not start without it.
        """
        return await asyncio.to_thread(self._restore, {row.id: row.kind for row in self._db.rows()})

    def _restore(self, kinds: dict[int, model.Kind]) -> Collection[int]:
        lost = []
        for number in sorted(kinds.keys() - disk.numbers(self._snapshots)):
            if kinds[number] is model.Kind.COMMITTED:
                lost.append(number)
                _log.error("%s", disk.lost_content(number))
            else:
                os.rename(self._spares.take(), os.path.join(self._snapshots, str(number)))
                _log.warning("snapshot %d has lost its content, as after a power cut", number)
        return lost
