"""Taking back what was begun of pods and can't be finished, also by an earlier node."""

import asyncio
import logging
import os
from collections.abc import Collection

from nixlet import errors
from nixlet.containerd import client, cri
from nixlet.containers import endings
from nixlet.host import signals
from nixlet.pods import begun, criconfig, directories, leftovers

#: Seconds that somebody waits until nothing of a pod is left; after that it goes on without them.
_PATIENCE = 10.0

_log = logging.getLogger("nixlet.pods")


class Undoings:
    """What is being taken back on one node."""

    def __init__(
        self, runtime: cri.RuntimeClient, containerd: client.Containerd, *, pods_dir: str, leases: str
    ) -> None:
        """None yet.

        Args:
            runtime: The CRI.
            containerd: The containerd behind it.
            pods_dir: Where the pods' directories are.
            leases: The directory below which the pod network's addresses are given out.
        """
        self._runtime = runtime
        self._containerd = containerd
        self._pods_dir = pods_dir
        self._leases = leases
        self._going_on: set[asyncio.Task[None]] = set()

    async def undo(self, directory: str) -> None:
        """Take back what was begun of the pod of a directory, and wait for that, but not for ever.

        When the runtime is away, it goes on with that by itself; where the node ends, the next one does it.
        """
        await asyncio.wait({self._begin(directory)}, timeout=_PATIENCE)

    async def recover(self) -> None:
        """Take back what an earlier node began and did not finish; what takes longer than a moment goes on by itself."""
        known = await self._containerd.identity()
        tasks = [self._begin(directory) for directory in begun.unfinished(self._pods_dir, known)]
        if tasks:
            _log.info("undoing what was begun of pods", extra={"pods": len(tasks)})
            await asyncio.wait(tasks, timeout=_PATIENCE)

    async def close(self, ending: signals.Ending) -> None:
        """Wait a moment for what goes on; a next node goes on with the rest."""
        await ending.wait(set(self._going_on))

    def _begin(self, directory: str) -> "asyncio.Task[None]":
        task = asyncio.create_task(self._undo(directory), name=f"undo {directory}")
        self._going_on.add(task)
        task.add_done_callback(self._going_on.discard)
        return task

    async def _undo(self, directory: str) -> None:
        told = False
        while True:
            try:
                await self._take_back(directory)
                return
            except (errors.NixletError, OSError) as error:
                if not told:
                    _log.warning("what was begun of %s can't be undone yet: %s", os.path.basename(directory), error)
                    told = True
            await asyncio.sleep(endings.RETRY)

    async def _take_back(self, directory: str) -> None:
        uid = begun.uid_of(directory)
        found = await self._runtime.sandboxes({criconfig.POD_UID: uid, **criconfig.MADE_BY})
        records = await self._containerd.containers({criconfig.POD_UID: uid, **criconfig.MADE_BY})
        networked: Collection[str] = await asyncio.to_thread(leftovers.networked, uid)
        for sandbox in found:
            await endings.remove_sandbox(self._runtime, sandbox.id)
        ids = {each.id for each in found} | {each.id for each in records} | set(networked)
        await leftovers.end(ids, self._leases)
        await asyncio.to_thread(directories.remove, directory)
