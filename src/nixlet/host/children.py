"""Programs that are kept running together: each started as soon as those that it waits for are ready, beside the others.

They are started again when they die, and stopped before those that they wait for. What ends because another one is away has not
failed: it waits until the other is ready again, and that costs none of its tries. One that fails again and again is given up: that
ends the node where it is essential to it; otherwise it is tried once more after a long time.
"""

import asyncio
import contextlib
import functools
import logging
import re
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import msgspec

from nixlet import errors
from nixlet.host import keptchild, supervisor, uncut

#: What a child may be called: its name is a label and stands in sentences.
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?")

_log = logging.getLogger("nixlet.supervisor")


class _Others:
    """Those that a child waits for, when it is started: all of them are ready."""

    def __init__(self, child: keptchild.Child) -> None:
        self._child = child
        self._away = {other.away: other for other in child.others}

    @property
    def needed(self) -> "Mapping[asyncio.Future[Any], keptchild.Child]":
        """Those with which it falls: done when they are not ready any more."""
        return {away: other for away, other in self._away.items() if other.name in self._child.program.falls_with}

    def fallen(self) -> errors.NixletError:
        """The error for one that has to end since another has."""
        other = next(other for away, other in self.needed.items() if away.done())
        return errors.UnavailableError(f"{self._child.name} can't go on without {other.name}, which has ended")

    def excuse(self) -> bool:
        """Whether the child's end is the doing of one of them, which is away (also if nobody was told yet) or was a short time ago."""
        recent = asyncio.get_running_loop().time() - self._child.program.restart.stable_after
        return any(
            other.current is None or other.current.has_ended or (away.done() and other.ready_since > recent)
            for away, other in self._away.items()
        )


class _Life(msgspec.Struct, frozen=True):
    """How a child lived once: why it ended, whether another one is to blame, and whether it had been ready for long."""

    failure: errors.NixletError
    excused: bool
    stable: bool


class Children:
    """The children of a node; ``kept_running`` makes it."""

    def __init__(self, hastened: asyncio.Event | None, tell: Callable[[str], None]) -> None:
        self._hastened = hastened
        self._tell = tell
        self._children: dict[str, keptchild.Child] = {}
        self._keeping: dict[str, asyncio.Task[None]] = {}
        self._given_up: asyncio.Future[errors.NixletError] = asyncio.get_running_loop().create_future()
        #: Done with the next change of any child, when there is another one.
        self._changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._closing = asyncio.Event()

    def __iter__(self) -> Iterator[keptchild.Child]:
        """The children, each after those that it waits for."""
        return iter(self._children.values())

    def __getitem__(self, name: str) -> keptchild.Child:
        """The child of a name."""
        return self._children[name]

    def start(self, *programs: supervisor.Program) -> None:
        """Have programs running, too; see ``ready``.

        Raises:
            ValueError: Two have one name, or wait for what is not there, or for each other. Nothing is started.
        """
        for program in _in_order(programs, self._children):
            # What one of them waits for may be away while that one lives on: its absence is felt all the same.
            others: dict[keptchild.Child, None] = {}
            for other in (self._children[name] for name in program.waits_for):
                others.update(dict.fromkeys([*other.others, other]))
            child = keptchild.Child(program, list(others))
            self._children[program.name] = child
            keeping = asyncio.create_task(self._keep(child), name=f"keep {program.name}")
            keeping.add_done_callback(functools.partial(self._pass_on_bug, child))
            self._keeping[program.name] = keeping

    async def ready(self, *names: str) -> None:
        """Wait until children were ready once: those that are named, or all that were started until now.

        Raises:
            NixletError: One of them, or of those that they wait for, could not be started, or was given up; or an essential one was.
                What isn't essential is tried again all the same: who goes on waiting has ``Child.is_ready``.
        """
        awaited = [self._children[name] for name in names or self._children]
        while not all(child.was_ready for child in awaited):
            if self._given_up.done():
                raise self._given_up.result()
            for child in awaited:
                if (error := keptchild.obstacle(child)) is not None:
                    raise error
            if self._closing.is_set():
                raise errors.UnavailableError("the node ends before all of its children were ready")
            await asyncio.shield(self._changed)

    async def gave_up(self) -> errors.NixletError:
        """Wait until an essential one can't be started, or died for good; the error that says why, with its last lines."""
        return await asyncio.shield(self._given_up)

    def status(self) -> list[keptchild.Status]:
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
        self._closing.set()
        self._wake()
        stopping: dict[str, asyncio.Task[None]] = {}
        for child in reversed(self._children.values()):
            before = [stopping[each.name] for each in self if child in each.others]
            stopping[child.name] = asyncio.create_task(self._stop(child, before), name=f"end of {child.name}")
        await asyncio.gather(*stopping.values())
        _passed_over(self._given_up)

    async def _stop(self, child: keptchild.Child, before: "Collection[asyncio.Task[None]]") -> None:
        keeping = self._keeping[child.name]
        if before and child.state in {"starting", "ready"}:
            await asyncio.wait(before)
        if child.pid:
            child.enter("stopping")
        keeping.cancel()
        await asyncio.wait({keeping})
        child.enter("stopped")

    def _enter(
        self, child: keptchild.Child, state: keptchild.State, current: supervisor.Supervised | None = None
    ) -> None:
        child.enter(state, current)
        self._wake()
        if not self._closing.is_set():
            self._tell(self.summary())

    def _wake(self) -> None:
        """Have those look who wait for a change."""
        changed, self._changed = self._changed, asyncio.get_running_loop().create_future()
        changed.set_result(None)

    async def _keep(self, child: keptchild.Child) -> None:
        """Keep one running until this is cancelled, or it is given up for good."""
        program, policy, failures, times = child.program, child.program.restart, 0, 0
        while not self._closing.is_set():
            await self._wait_for_others(child)
            life = await self._live(child)
            child.failure = life.failure
            if self._closing.is_set():
                _say(child, "is not started again, since the node ends", failures)
                self._enter(child, "died")
                return
            if life.stable:
                failures = times = 0
            if not life.excused:
                failures += 1
                if not child.was_ready:
                    # What can't even start is a matter for a person, who is waiting for the answer.
                    child.refusal = life.failure
            over = not life.excused and failures > policy.tries
            if program.essential and (over or child.refusal is not None):
                self._give_up(child, _final(child.name, failures, life.failure))
                return
            self._enter(child, "gave up" if over else "died")
            times += over
            delay = policy.pause_after(times) if over else policy.delay(max(failures, 1))
            what = "is given up, and tried once more" if over else "is started again"
            _say(child, f"{what} in {delay:g} s", failures)
            await asyncio.sleep(delay)

    async def _live(self, child: keptchild.Child) -> _Life:
        """Start one whose others are ready, and wait until it has ended."""
        loop, others, ready_at = asyncio.get_running_loop(), _Others(child), float("inf")
        self._enter(child, "starting")
        stable = fell = False
        child.starts += 1
        try:
            async with supervisor.started(child.program, hastened=self._hastened) as running:
                child.process = running
                try:
                    if await running.answered(others.needed):
                        ready_at = loop.time()
                        self._enter(child, "ready", running)
                        await _ended(running, others)
                    failure, fell = others.fallen(), True
                except errors.NixletError as error:
                    failure = error
                stable = loop.time() - ready_at >= child.program.restart.stable_after
                child.failure = failure
                # Those that need it learn so at once, and not when it has been cleaned up after.
                if running.has_ended:
                    child.enter("died")
                else:
                    self._enter(child, "stopping")
        except errors.NixletError as error:
            failure = error
        finally:
            child.process = None
        return _Life(failure, fell or others.excuse(), stable)

    async def _wait_for_others(self, child: keptchild.Child) -> None:
        while not all(other.is_ready.is_set() for other in child.others):
            if child.state != "waiting":
                self._enter(child, "waiting")
            for other in child.others:
                await other.is_ready.wait()

    def _give_up(self, child: keptchild.Child, error: errors.NixletError) -> None:
        if not self._given_up.done():
            self._given_up.set_result(error)
        self._enter(child, "gave up")

    def _pass_on_bug(self, child: keptchild.Child, task: "asyncio.Task[None]") -> None:
        # Whoever waits must not wait for ever because of a mistake of ours.
        if self._closing.is_set() and task.cancelled():
            return
        bug = RuntimeError(f"{child.name} is not kept running any more") if task.cancelled() else task.exception()
        if bug is not None:
            child.failure = errors.NixletError(
                f"{child.name} is not kept running because of a mistake in nixlet: {bug!r}"
            )
            if not self._given_up.done():
                self._given_up.set_exception(bug)
            self._enter(child, "gave up")


def _say(child: keptchild.Child, what: str, failures: int) -> None:
    """Tell the log that one has ended, with its last lines, and what is done about it."""
    output = child.failure.output if isinstance(child.failure, errors.CommandFailedError) else ""
    extra = {"failures": failures, **({"output": output} if output else {})}
    _log.error("%s %s: %s", child.name, what, child.failure, extra=extra)


def _passed_over(future: "asyncio.Future[Any]") -> None:
    """Nobody may have asked for it, and nobody will."""
    if future.done() and not future.cancelled():
        future.exception()
    future.cancel()


async def _ended(running: supervisor.Supervised, others: _Others) -> None:
    """Wait until one has to end that is ready, because one with which it falls has.

    Raises:
        CommandFailedError: It has ended by itself.
    """
    dying = asyncio.create_task(running.died(), name=f"{running.program.name} died")
    try:
        awaited: set[asyncio.Future[Any]] = {dying, *others.needed}
        await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
        if dying.done():
            raise dying.result()
    finally:
        dying.cancel()
        await asyncio.gather(dying, return_exceptions=True)


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
        if not _NAME.fullmatch(program.name):
            raise ValueError(f"{program.name!r} is no name for a child")
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
        # A cancelled owner must still not leave one behind.
        await uncut.to_its_end(children.close())
