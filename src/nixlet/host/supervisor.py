"""A program that nixlet needs for as long as it runs: described, started, found ready, watched, logged, stopped.

Its output comes through a pipe, so that its log can be put aside without losing or doubling a line, and its last words are at
hand. The pipe ends with nixlet, which is no loss: such a child does so, too. How several are kept running together is told in
``children``.
"""

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

import msgspec

from nixlet import errors
from nixlet.host import logfiles, process

#: How many of a child's last lines, and bytes at most, stand in our error when it dies.
_KEPT_LINES = 20
_KEPT_BYTES = 16 << 10

#: Seconds to wait for the end of a dead child's output, which a grandchild may hold open.
_LAST_WORDS = 0.5

_log = logging.getLogger("nixlet.supervisor")


class RestartPolicy(msgspec.Struct, frozen=True):
    """When a child that died is started again.

    Attributes:
        tries: How often it is started again after failures that follow quickly on each other; 0: never.
        first_delay: Seconds before the first such start; each further one waits twice as long.
        longest_delay: Seconds that are never exceeded.
        stable_after: A child that was up for this long (seconds) has recovered: all is counted anew.
    """

    tries: int = 5
    first_delay: float = 0.5
    longest_delay: float = 30.0
    stable_after: float = 60.0

    def delay(self, failures: int) -> float:
        """Seconds to wait after so many quick failures, the latest included."""
        return min(self.first_delay * 2.0 ** (failures - 1), self.longest_delay)


def _nothing() -> None:
    """No condition."""


class Program(msgspec.Struct, frozen=True, kw_only=True):
    """All that there is to know of a program that is kept running.

    Attributes:
        name: What people call it, and other programs that wait for it.
        argv: The program and its arguments.
        env: Its whole environment.
        log_path: The file that gets what it prints.
        ready: Returns when it answers; it is cancelled when the program dies first.
        ready_timeout: Seconds to wait for that.
        user: The numbers of the user and group as whom it runs; None: as ourselves.
        waits_for: The children that have to be ready before it is started, the first time as later.
        falls_with: Those among them with which it ends, to be started anew when they are ready again; it lives on without the others.
        may_start: Raises a ``NixletError`` where it can't be started now; asked before each start.
        restart: How patient we are with it.
        grace: Seconds between SIGTERM and SIGKILL at its end.
    """

    name: str
    argv: Sequence[str]
    env: Mapping[str, str]
    log_path: str
    ready: Callable[[], Awaitable[object]]
    ready_timeout: float
    user: tuple[int, int] | None = None
    waits_for: tuple[str, ...] = ()
    falls_with: tuple[str, ...] = ()
    may_start: Callable[[], None] = _nothing
    restart: RestartPolicy = RestartPolicy()
    grace: float = 10.0


class SupervisedChild:
    """A child that is running and was ready once."""

    def __init__(self, program: Program, child: process.Child, log: logfiles.RotatingFile) -> None:
        self.program = program
        self._child = child
        self._last_words = b""
        assert child.stdout is not None
        self._reader = asyncio.create_task(self._keep_log(child.stdout, log), name=f"log of {program.name}")

    @property
    def pid(self) -> int:
        """The child's process ID."""
        return self._child.pid

    @property
    def has_ended(self) -> bool:
        """Whether it has ended, which is known before its last words are."""
        return self._child.returncode is not None

    @property
    def last_lines(self) -> list[str]:
        """The last lines that it printed."""
        return self._last_words.decode(errors="replace").splitlines()[-_KEPT_LINES:]

    async def died(self) -> errors.CommandFailedError:
        """Wait until it ends by itself; the error that says so, with its last lines."""
        returncode = await self._child.wait()
        await asyncio.wait({self._reader}, timeout=_LAST_WORDS)
        output = "\n".join(self.last_lines).encode()
        return self._told(process.failure(self._child.argv, returncode, output, name=self.program.name))

    async def answered(self) -> None:
        """Wait until it is ready.

        Raises:
            CommandFailedError: It died before, or took too long.
        """
        program = self.program

        async def wait() -> None:
            await program.ready()

        waiting = asyncio.create_task(wait(), name=f"{program.name} ready")
        dying = asyncio.create_task(self.died(), name=f"{program.name} died")
        try:
            await asyncio.wait({waiting, dying}, timeout=program.ready_timeout, return_when=asyncio.FIRST_COMPLETED)
            if dying.done():
                raise dying.result()
            if waiting.done():
                waiting.result()
                return
            last = self.last_lines[-1] if self.last_lines else "it printed nothing"
            message = f"{program.name} did not answer within {program.ready_timeout:g} s: {last}"
            raise self._told(errors.CommandFailedError(message, returncode=0, output="\n".join(self.last_lines)))
        finally:
            for task in (waiting, dying):
                task.cancel()
            await asyncio.gather(waiting, dying, return_exceptions=True)

    def _told(self, error: errors.CommandFailedError) -> errors.CommandFailedError:
        """An error with the place where more is said."""
        error.hint = "; ".join(filter(None, (error.hint, f"its log is {self.program.log_path}")))
        return error

    async def stop(self, hastened: asyncio.Event | None) -> None:
        """End it: SIGTERM, and SIGKILL when its grace is over or as soon as it is ``hastened``."""
        name = self.program.name
        stopping = asyncio.create_task(self._child.stop(self.program.grace), name=f"stop {name}")
        if hastened is not None:
            hurry = asyncio.create_task(hastened.wait(), name=f"hasten {name}")
            await asyncio.wait({stopping, hurry}, return_when=asyncio.FIRST_COMPLETED)
            hurry.cancel()
            if not stopping.done():
                self._child.send_signal(signal.SIGKILL)
        await stopping
        await asyncio.wait({self._reader}, timeout=_LAST_WORDS)
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)

    async def _keep_log(self, stream: asyncio.StreamReader, log: logfiles.RotatingFile) -> None:
        """Write its output to its log file and keep the end of it."""
        while chunk := await stream.read(1 << 16):
            log.write(chunk)
            self._last_words = (self._last_words + chunk)[-_KEPT_BYTES:]


@contextlib.asynccontextmanager
async def supervise(program: Program, *, hastened: asyncio.Event | None = None) -> AsyncIterator[SupervisedChild]:
    """Start a program and wait until it is ready; leaving the context stops it.

    Args:
        program: What to start.
        hastened: Cuts its grace short when it is set.

    Raises:
        UnavailableError: There is no such program.
        FailedPreconditionError: Its log can't be written.
        CommandFailedError: It died before it was ready, or did not become ready in time; its last lines are in the error.
        NixletError: As ``Program.may_start``.
    """
    program.may_start()
    async with contextlib.AsyncExitStack() as stack:
        log = stack.enter_context(_open_log(program))
        child = await stack.enter_async_context(
            process.start(
                program.argv,
                env=program.env,
                stdout=process.PIPE,
                stderr=process.STDOUT,
                grace=program.grace,
                user=program.user,
            )
        )
        supervised = SupervisedChild(program, child, log)
        try:
            await supervised.answered()
            _log.info("%s is ready", program.name, extra={"pid": child.pid})
            yield supervised
        finally:
            # Shielded: a cancelled owner must still not leave the child behind.
            await asyncio.shield(supervised.stop(hastened))


def _open_log(program: Program) -> logfiles.RotatingFile:
    path = program.log_path
    try:
        return logfiles.RotatingFile(path)
    except OSError as error:
        raise errors.FailedPreconditionError(
            f"the log of {program.name} can't be written to {path}: {error.strerror}"
        ) from error
