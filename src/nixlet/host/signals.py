"""Ending in order: the signals by which people and service managers ask for it."""

import asyncio
import dataclasses
import signal


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


def watched() -> StopSignals:
    """Watch for SIGTERM and SIGINT in the running loop; they do nothing else from now on."""
    stop = StopSignals()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.take)
    return stop


def stop_requested() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set, in the running loop; they do nothing else from now on."""
    return watched().requested
