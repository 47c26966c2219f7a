"""Programs that are kept running together: each started as soon as those that it waits for are ready, beside the others.

They are started again when they die, and stopped before those that they wait for. What ends because another one is away has not
failed: it waits until the other is ready again, and that costs none of its tries.
"""

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Literal

import msgspec

from nixlet import errors
from nixlet.host import supervisor

_log = logging.getLogger("nixlet.supervisor")

#: What a child does: "waiting" for others; "starting", but not ready; "ready"; "died", to be started again; "gave up": it isn't;
#: "stopped" by us.
State = Literal["waiting", "starting", "ready", "died", "gave up", "stopped"]


class Status(msgspec.Struct, frozen=True):
    """How a child does.

    Attributes:
        name: What people call it.
        pid: Its process; 0: it has none.
        state: What it does.
        since: Since when, in seconds since 1970.
        restarts: How often it was started again.
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

    def __init__(self, program: supervisor.Program, others: "Sequence[Child]") -> None:
        self.program = program
        #: Those that it waits for.
        self.others = others
        #: The running child, when it is ready; None while there is none.
        self.current: supervisor.SupervisedChild | None = None
        #: How often it was started again.
        self.restarts = 0
        #: Why it ended last; None: it never did.
        self.failure: errors.NixletError | None = None
        #: Done when it was ready for the first time; an error where it never will be.
        self.begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.state: State = "waiting"
        self.since = time.time()
        self.is_ready, self.is_away = asyncio.Event(), asyncio.Event()
        self.is_away.set()
        #: How often it was ready and then not any more.
        self.falls = 0

    @property
    def name(self) -> str:
        """What people call it."""
        return self.program.name

    def status(self) -> Status:
        """How it does."""
        pid = 0 if self.current is None else self.current.pid
        failure = "" if self.failure is None else self.failure.message
        return Status(self.name, pid, self.state, self.since, self.restarts, failure, self.program.log_path)

    def check(self) -> None:
        """Check that it is ready.

        Raises:
            UnavailableError: It isn't, with the reason of its last end if that is why.
        """
        if self.current is None:
            raise errors.UnavailableError(f"{self.name} is not running: {self.failure or 'it is being started'}")

    def enter(self, state: State, current: supervisor.SupervisedChild | None = None) -> None:
        """Take notice of what it does now."""
        if self.current is not None and current is None:
            self.falls += 1
        self.state, self.since, self.current = state, time.time(), current
        for event, holds in ((self.is_ready, current is not None), (self.is_away, current is None)):
            event.set() if holds else event.clear()

    def is_alone(self, falls: Sequence[int]) -> bool:
        """Whether one of those that it waits for is away, or was since they had fallen so often; also if nobody was told yet."""
        return any(
            other.current is None or other.current.has_ended or other.falls != before
            for other, before in zip(self.others, falls, strict=True)
        )


class Children:
    """The children of a node; ``kept_running`` makes it."""

    def __init__(self, hastened: asyncio.Event | None, tell: Callable[[str], None]) -> None:
        self._hastened = hastened
        self._tell = tell
        self._children: dict[str, Child] = {}
        self._keeping: dict[str, asyncio.Task[None]] = {}
        self._given_up: asyncio.Future[errors.NixletError] = asyncio.get_running_loop().create_future()
        self._closing = False

    def __iter__(self) -> Iterator[Child]:
        """The children, each after those that it waits for."""
        return iter(self._children.values())

    def __getitem__(self, name: str) -> Child:
        """The child of a name."""
        return self._children[name]

    def start(self, *programs: supervisor.Program) -> None:
        """Have programs running, too; see ``ready``.

        Raises:
            ValueError: Two have one name, or wait for what is not there, or for each other. Nothing is started.
        """
        for program in _in_order(programs, self._children):
            child = Child(program, [self._children[name] for name in program.waits_for])
            self._children[program.name] = child
            keeping = asyncio.create_task(self._keep(child), name=f"keep {program.name}")
            keeping.add_done_callback(functools.partial(self._pass_on_bug, child))
            self._keeping[program.name] = keeping

    async def ready(self, *names: str) -> None:
        """Wait until children are ready for the first time: those that are named, or all that were started until now.

        Raises:
            NixletError: One of them did not start; it is not tried again.
        """
        awaited = [self._children[name].begun for name in names or self._children]
        if awaited:
            await asyncio.wait(awaited, return_when=asyncio.FIRST_EXCEPTION)
        for each in awaited:
            if each.done():
                each.result()

    async def gave_up(self) -> errors.NixletError:
        """Wait until one can't be started, or died for good; the error that says why, with its last lines."""
        return await asyncio.shield(self._given_up)

    def status(self) -> list[Status]:
        """How each does."""
        return [child.status() for child in self]

    def summary(self) -> str:
        """How they do, in a line."""
        states = [f"{child.name}: {child.state}" for child in self]
        if len(states) == 1:
            return states[0]
        away = [state for state, child in zip(states, self, strict=True) if child.current is None]
        return "; ".join([f"{len(states) - len(away)} of {len(states)} children are ready", *away])

    async def close(self) -> None:
        """Stop all of them, each when those that wait for it have ended; where nothing waits, at the same time."""
        self._closing = True
        stopping: dict[str, asyncio.Task[None]] = {}
        for child in reversed(self._children.values()):
            before = [stopping[each.name] for each in self if child in each.others]
            stopping[child.name] = asyncio.create_task(self._stop(child, before), name=f"end of {child.name}")
        await asyncio.gather(*stopping.values())
        for child in self:
            _passed_over(child.begun)
        _passed_over(self._given_up)

    async def _stop(self, child: Child, before: "Collection[asyncio.Task[None]]") -> None:
        keeping = self._keeping[child.name]
        if before and child.state in {"starting", "ready"}:
            await asyncio.wait(before)
        keeping.cancel()
        await asyncio.wait({keeping})
        self._enter(child, "stopped")

    def _enter(self, child: Child, state: State, current: supervisor.SupervisedChild | None = None) -> None:
        child.enter(state, current)
        if not self._closing:
            self._tell(self.summary())

    async def _keep(self, child: Child) -> None:
        """Keep one running until this is cancelled; ``begun`` learns how the first start went."""
        policy, failures = child.program.restart, 0
        loop = asyncio.get_running_loop()
        while not self._closing:
            await self._wait_for_others(child)
            self._enter(child, "starting")
            falls, fell, up_since = [other.falls for other in child.others], False, float("inf")
            try:
                async with supervisor.supervise(child.program, hastened=self._hastened) as running:
                    up_since = loop.time()
                    self._enter(child, "ready", running)
                    if not child.begun.done():
                        child.begun.set_result(None)
                    failure, fell = await _ended(child, running)
                    # Those that need it learn so at once, and not when it has been cleaned up after.
                    child.enter("died")
            except errors.NixletError as error:
                failure = error
            child.failure = failure
            excused = fell or child.is_alone(falls)
            if not excused:
                failures = 1 if loop.time() - up_since >= policy.stable_after else failures + 1
            if not excused and not child.begun.done():
                # What can't even start is a matter for a person, who is waiting for the answer.
                child.begun.set_exception(failure)
                self._give_up(child, failure)
                return
            self._enter(child, "died")
            if failures > policy.tries:
                self._give_up(child, _final(child.name, failures, failure))
                return
            delay = policy.delay(max(failures, 1))
            if not self._closing:
                _log.error("%s is started again in %g s: %s", child.name, delay, failure, extra={"failures": failures})
            await asyncio.sleep(delay)
            child.restarts += 1

    async def _wait_for_others(self, child: Child) -> None:
        while not all(other.is_ready.is_set() for other in child.others):
            if child.state != "waiting":
                self._enter(child, "waiting")
            for other in child.others:
                await other.is_ready.wait()

    def _give_up(self, child: Child, error: errors.NixletError) -> None:
        self._enter(child, "gave up")
        if not self._given_up.done():
            self._given_up.set_result(error)

    def _pass_on_bug(self, child: Child, task: "asyncio.Task[None]") -> None:
        # Whoever waits must not wait for ever because of a mistake of ours.
        if not task.cancelled() and (bug := task.exception()) is not None:
            for future in (child.begun, self._given_up):
                if not future.done():
                    future.set_exception(bug)


def _passed_over(future: "asyncio.Future[Any]") -> None:
    """Nobody may have asked for it, and nobody will."""
    if future.done() and not future.cancelled():
        future.exception()
    future.cancel()


async def _ended(child: Child, running: supervisor.SupervisedChild) -> tuple[errors.NixletError, bool]:
    """Wait until it ends by itself, or has to because one with which it falls has; why, and whether it is the latter."""
    dying = asyncio.create_task(running.died(), name=f"{child.name} died")
    needed = [other for other in child.others if other.name in child.program.falls_with]
    falling = {asyncio.create_task(other.is_away.wait(), name=f"{other.name} is away"): other for other in needed}
    try:
        await asyncio.wait({dying, *falling}, return_when=asyncio.FIRST_COMPLETED)
        if dying.done():
            return dying.result(), False
        other = next(other for task, other in falling.items() if task.done())
        return errors.UnavailableError(f"{child.name} can't go on without {other.name}, which has ended"), True
    finally:
        for task in (dying, *falling):
            task.cancel()
        await asyncio.gather(dying, *falling, return_exceptions=True)


def _in_order(programs: Iterable[supervisor.Program], known: Collection[str]) -> list[supervisor.Program]:
    """Programs in an order in which each comes after those that it waits for.

    Raises:
        ValueError: There is none.
    """
    rest, placed = list(programs), set(known)
    names = [*known, *(program.name for program in rest)]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two children are called {', '.join(sorted(twice))}")
    for program in rest:
        if unknown := set(program.waits_for) - set(names):
            raise ValueError(f"{program.name} waits for {', '.join(sorted(unknown))}, which is no child")
        if astray := set(program.falls_with) - set(program.waits_for):
            raise ValueError(f"{program.name} falls with {', '.join(sorted(astray))}, for which it does not wait")
    ordered: list[supervisor.Program] = []
    while rest:
        free = [program for program in rest if placed.issuperset(program.waits_for)]
        if not free:
            raise ValueError(f"these children wait for each other: {', '.join(program.name for program in rest)}")
        ordered += free
        placed.update(program.name for program in free)
        rest = [program for program in rest if program.name not in placed]
    return ordered


def _final(name: str, failures: int, last: errors.NixletError) -> errors.NixletError:
    if failures == 1:
        return last
    output = last.output if isinstance(last, errors.CommandFailedError) else ""
    returncode = last.returncode if isinstance(last, errors.CommandFailedError) else 1
    error = errors.CommandFailedError(
        f"{name} failed {failures} times in a short time and is not started again; the last time: {last.message}",
        returncode=returncode,
        output=output,
        hint=last.hint,
    )
    error.__cause__ = last
    return error


@contextlib.asynccontextmanager
async def kept_running(
    *, hastened: asyncio.Event | None = None, tell: Callable[[str], None] = lambda _: None
) -> AsyncIterator[Children]:
    """Children, none at first, for the time of the context; leaving it stops them in order.

    Args:
        hastened: Cuts the time short that they get to end when it is set.
        tell: Learns how they do whenever that changes, in a line.
    """
    children = Children(hastened, tell)
    try:
        yield children
    finally:
        # Shielded: a cancelled owner must still not leave one behind.
        await asyncio.shield(children.close())
