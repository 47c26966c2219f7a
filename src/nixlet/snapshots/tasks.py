"""Work that outlives whoever asked for it: changes that must not be cut in half, and what is tidied up behind a call."""

import asyncio
import logging
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")

#: Seconds that running work gets when the end has come.
_PATIENCE = 10.0

_log = logging.getLogger("nixlet.snapshots")


class Tasks:
    """The running tasks of one owner."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[object]] = set()

    def start(self, work: Awaitable[T], name: str) -> "asyncio.Task[T]":
        """Run something in a task of its own; whoever starts it looks at its outcome."""

        async def run() -> T:
            return await work

        task = asyncio.create_task(run(), name=name)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def uncancelled(self, work: Awaitable[T], name: str) -> T:
        """Wait for something that runs to its end also when the caller gives up."""
        return await asyncio.shield(self.start(work, name))

    def background(self, work: Awaitable[T], name: str) -> "asyncio.Task[T]":
        """Run something that nobody waits for; a failure is logged."""

        def report(done: "asyncio.Task[T]") -> None:
            if not done.cancelled() and (error := done.exception()):
                _log.error("%s failed: %s", done.get_name(), error)

        task = self.start(work, name)
        task.add_done_callback(report)
        return task

    async def finish(self, patience: float = _PATIENCE) -> None:
        """Wait until nothing runs any more; what doesn't end within some seconds, such as a download, is given up."""
        deadline = asyncio.get_running_loop().time() + patience
        while self._running and (left := deadline - asyncio.get_running_loop().time()) > 0:
            await asyncio.wait(self._running, timeout=left)
        for task in list(self._running):
            _log.warning("%s takes too long and is given up", task.get_name())
            task.cancel()
        # What has been given up undoes itself.
        while self._running:
            await asyncio.wait(self._running)
