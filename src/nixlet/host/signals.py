"""Ending in order: the signals by which people and service managers ask for it."""

import asyncio
import dataclasses
import signal
from collections.abc import Collection
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class StopSignals:
    """What was asked for so far.

    Attributes:
        requested: To end in order.
        hastened: To be quick about it: it was asked for a second time.
    """

    requested: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    hastened: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)

    def take(self) -> None:
        """Take notice of one more signal."""
        (self.hastened if self.requested.is_set() else self.requested).set()


#: Seconds for tasks to end that were cancelled.
_CANCELLING = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Ending:
    """How long whoever ends waits for what is still going on.

    Attributes:
        seconds: At most so long, for each thing that is waited for.
        hastened: Not at all any more when it is set.
    """

    seconds: float = 10.0
    hastened: asyncio.Event | None = None

    async def wait(self, tasks: "Collection[asyncio.Task[Any]]") -> None:
        """Wait until tasks have ended; those that take too long are cancelled. Their errors are their own."""
        if not tasks:
            return
        everything = asyncio.ensure_future(asyncio.wait(tasks, timeout=self.seconds))
        hurry = asyncio.create_task((self.hastened or asyncio.Event()).wait(), name="hasten")
        try:
            await asyncio.wait({everything, hurry}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (everything, hurry, *tasks):
                task.cancel()
            await asyncio.wait({everything, hurry, *tasks}, timeout=_CANCELLING)


def watched() -> StopSignals:
    """Watch for SIGTERM, SIGINT and SIGHUP in the running loop; they do nothing else from now on.

    SIGHUP, which a terminal sends that closes, and its shell perhaps once more, never hastens; where it is ignored, as nohup has it, it
    stays so.
    """
    stop = StopSignals()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.take)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        loop.add_signal_handler(signal.SIGHUP, stop.requested.set)
    return stop


def stop_requested() -> asyncio.Event:
    """An event that the same signals set; they do nothing else from now on."""
    return watched().requested
