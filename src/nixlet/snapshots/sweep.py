"""What is there for nothing goes: directories of removed snapshots, and what a crash left that the database doesn't know."""

import asyncio
import functools
import logging
import os

from nixlet.snapshots import closures as closures_module
from nixlet.snapshots import disk, metadata, model
from nixlet.snapshots import faults as faults_module
from nixlet.snapshots import tasks as tasks_module

#: Seconds that removed snapshots wait for being deleted from the disk.
_FREE_LATER = 0.1

_log = logging.getLogger("nixlet.snapshots")


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

    def free(self, row: metadata.Row) -> None:
        """Have the directory of a snapshot deleted that the database has forgotten, and its closure if nobody needs that."""
        if not self._removed:
            self._tasks.background(self._free(), "freeing removed snapshots")
        self._removed[row.id] = row.closure is not None

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

    async def sweep(self) -> list[str]:
        """Remove directories, views and roots that the database doesn't know; what was removed, in words."""
        # Looked at before the database is: what is made meanwhile is known there, and not seen here.
        present = await asyncio.to_thread(os.listdir, self._snapshots)
        unknown = sorted(set(present) - {str(number) for number in self._db.snapshot_ids() | self._removed.keys()})
        await asyncio.to_thread(disk.remove_trees, [os.path.join(self._snapshots, name) for name in unknown])
        swept = [f"snapshot directory {name}" for name in unknown]
        return swept + await self._closures.sweep()

    async def restore(self) -> None:
        """Make directories again that a power cut took: what the database says is on the disk before they are."""
        await asyncio.to_thread(self._restore, {row.id: row.kind for row in self._db.rows()})

    def _restore(self, kinds: dict[int, model.Kind]) -> None:
        for number in sorted(kinds.keys() - {int(name) for name in os.listdir(self._snapshots) if name.isdigit()}):
            os.rename(self._spares.take(), os.path.join(self._snapshots, str(number)))
            if kinds[number] is model.Kind.COMMITTED:
                _log.error(
                    "layer %d has lost its content, as after a power cut; remove its image and pull it again", number
                )
            else:
                _log.warning("snapshot %d has lost its content, as after a power cut", number)
