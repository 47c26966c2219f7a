"""A child that is kept running: its process, what it does, and what there is to say of it. ``children`` keeps it running."""

import asyncio
import time
from collections.abc import Collection
from typing import Literal

import msgspec

from nixlet import errors
from nixlet.host import supervisor

#: What a child does: "waiting" for others; "starting", but not ready; "ready"; "stopping", since it is asked to end; "died", to be
#: started again; "gave up": not before long, if at all; "stopped" by us for good.
State = Literal["waiting", "starting", "ready", "stopping", "died", "gave up", "stopped"]


class Status(msgspec.Struct, frozen=True):
    """How a child does.

    Attributes:
        name: What people call it.
        pid: Its process, whether or not it is ready; 0: it has none.
        state: What it does.
        since: Since when, in seconds since 1970.
        restarts: How often it was started again, or that was tried.
        failure: Why it ended last; empty: it never did.
        log: The file that has what it printed.
    """

    name: str
    pid: int
    state: State
    since: float
    restarts: int
    failure: str
    log: str


class Child:
    """A child that is started again when it dies; ``Children`` makes it."""

    def __init__(self, program: supervisor.Program, others: "Collection[Child]") -> None:
        self.program = program
        #: Those that it waits for, and all for which those do, each once, in the order in which they start.
        self.others = others
        #: Its process; None while there is none.
        self.process: supervisor.Supervised | None = None
        #: The same while it is ready.
        self.current: supervisor.Supervised | None = None
        #: How often it was to be started, whether or not a process came of it.
        self.starts = 0
        #: Why it ended last; None: it never did.
        self.failure: errors.NixletError | None = None
        #: Whether it was ever ready.
        self.was_ready = False
        #: Why it could not be started, where it was never ready and that was nobody else's doing.
        self.refusal: errors.NixletError | None = None
        self.state: State = "waiting"
        self.since = time.time()
        self.is_ready = asyncio.Event()
        #: Done when it is not ready any more; each time that it is, there is a new one.
        self.away: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.away.set_result(None)
        #: Since when it is ready, by the loop's clock.
        self.ready_since = 0.0

    @property
    def name(self) -> str:
        """What people call it."""
        return self.program.name

    @property
    def restarts(self) -> int:
        """How often it was started again, or that was tried."""
        return max(0, self.starts - 1)

    @property
    def pid(self) -> int:
        """Its process, whether or not it is ready; 0: it has none."""
        return 0 if self.process is None or self.process.has_ended else self.process.pid

    def status(self) -> Status:
        """How it does."""
        failure = "" if self.failure is None else self.failure.message
        return Status(self.name, self.pid, self.state, self.since, self.restarts, failure, self.program.log_path)

    def check(self) -> None:
        """Check that it is ready.

        Raises:
            UnavailableError: It isn't, with the reason of its last end if that is why.
        """
        if self.current is not None:
            return
        # (who waits for nobody any more starts in this moment)
        away = ", ".join(other.name for other in self.others if other.current is None)
        if self.state == "waiting" and away:
            message = f"{self.name} is not running: it waits for {away}"
        elif self.state in {"starting", "waiting"}:
            before = "" if self.failure is None else f"; before that, {self.failure}"
            message = f"{self.name} is being started and is not ready yet{before}"
        elif self.state == "stopped":
            message = f"{self.name} is not running: it was stopped"
        else:
            what = "is being stopped" if self.state == "stopping" else "is not running"
            message = f"{self.name} {what}: {self.failure or 'the node ends'}"
        raise errors.UnavailableError(message)

    def enter(self, state: State, current: supervisor.Supervised | None = None) -> None:
        """Take notice of what it does now."""
        loop = asyncio.get_running_loop()
        self.state, self.since, self.current = state, time.time(), current
        if current is not None:
            self.was_ready = True
            self.away, self.ready_since = loop.create_future(), loop.time()
            self.is_ready.set()
        elif not self.away.done():
            self.away.set_result(None)
            self.is_ready.clear()


def obstacle(child: Child) -> errors.NixletError | None:
    """Why a child won't be ready for the first time before long; None: nothing is known to be in the way."""
    if child.was_ready:
        return None
    if child.refusal is not None:
        return child.refusal
    if child.state != "waiting":
        return None
    for other in child.others:
        if other.state == "gave up" and other.failure is not None:
            return other.failure
        if (error := obstacle(other)) is not None:
            return error
    return None
