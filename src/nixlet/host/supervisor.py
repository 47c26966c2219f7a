"""A program that nixlet needs for as long as it runs: described, started, found ready, watched, logged, stopped.

Its output comes through a pipe, so that its log can be put aside without losing or doubling a line, and its last words are at
hand. The pipe ends with nixlet, which is no loss: such a child does so, too, unless it is described as going on (``detached``). How
several are kept running together is told in ``children``.
"""

import abc
import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import msgspec

from nixlet import errors
from nixlet.host import detached, files, logfiles, process, uncut, words

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
        pause: Seconds before one that was given up is tried once more, where that doesn't end the node; each further time it is
            twice as long.
        longest_pause: Seconds that are never exceeded.
    """

    tries: int = 5
    first_delay: float = 0.5
    longest_delay: float = 30.0
    stable_after: float = 60.0
    pause: float = 300.0
    longest_pause: float = 3600.0

    def delay(self, failures: int) -> float:
        """Seconds to wait after so many quick failures, the latest included."""
        return _doubled(self.first_delay, failures, self.longest_delay)

    def pause_after(self, times: int) -> float:
        """Seconds to wait when it was given up so many times, the latest included."""
        return _doubled(self.pause, times, self.longest_pause)


def _doubled(first: float, times: int, limit: float) -> float:
    # The exponent is limited as well: what goes on for years must not end as an overflow.
    return min(first * 2.0 ** min(times - 1, 64), limit)


def _nothing() -> None:
    """No condition."""


def _unknown(_: str) -> str:
    """No cause."""
    return ""


class Program(msgspec.Struct, frozen=True, kw_only=True):
    """All that there is to know of a program that is kept running.

    Attributes:
        name: What people call it, and other programs that wait for it.
        argv: The program and its arguments.
        env: Its whole environment.
        log_path: The file that gets what it prints.
        ready: Returns when it answers; it is cancelled when the program dies first. A ``NixletError`` says that it never will; so
            does a system that lacks what it needs to ask (``process.lack``).
        ready_timeout: Seconds to wait for that.
        user: The numbers of the user and group as whom it runs; None: as ourselves.
        waits_for: The children that have to be ready before it is started, the first time as later, with all for which they wait.
        falls_with: Those among them with which it ends, to be started anew when they are ready again; it lives on without the others.
        may_start: Raises a ``NixletError`` where it can't be started now; asked before each start.
        cause: Says in a sentence why it has ended, by the last lines that it printed, where they alone don't tell a person; empty:
            they do.
        goes_on_at: The socket that it serves, by which it is found again, where it goes on without us; empty: it ends with us. It is
            one of its arguments. Only one that never answered is ended.
        restart: How patient we are with it.
        grace: Seconds between SIGTERM and SIGKILL at its end.
        essential: Whether the node ends when this one can't be started, or is given up. Otherwise its first failure is told, too,
            but it is tried again, and when it is given up once more after each ``RestartPolicy.pause``.
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
    cause: Callable[[str], str] = _unknown
    goes_on_at: str = ""
    restart: RestartPolicy = RestartPolicy()
    grace: float = 10.0
    essential: bool = True


class Supervised(abc.ABC):
    """A program that runs; ``started`` makes it."""

    def __init__(self, program: Program, pid: int) -> None:
        self.program = program
        self.pid = pid
        #: Whether it ever answered.
        self.has_answered = False

    @property
    @abc.abstractmethod
    def has_ended(self) -> bool:
        """Whether it has ended, which is known before its last words are."""

    @property
    @abc.abstractmethod
    def last_lines(self) -> list[str]:
        """The last lines that it printed."""

    @abc.abstractmethod
    async def died(self) -> errors.CommandFailedError:
        """Wait until it ends by itself; the error that says so, with its last lines."""

    @abc.abstractmethod
    async def stop(self, hastened: asyncio.Event | None) -> None:
        """End it: SIGTERM, and SIGKILL when its grace is over or as soon as it is ``hastened``."""

    async def answered(self, unless: "Collection[asyncio.Future[Any]]" = ()) -> bool:
        """Wait until it is ready; whether it is.

        Args:
            unless: When one of these is done before, it isn't waited for any more, and not ready.

        Raises:
            CommandFailedError: It died before, or took too long, or nobody can tell any more.
            NixletError: As ``Program.ready``.
        """
        program = self.program

        async def wait() -> None:
            await program.ready()

        waiting = asyncio.create_task(wait(), name=f"{program.name} ready")
        dying = asyncio.create_task(self.died(), name=f"{program.name} died")
        try:
            await asyncio.wait(
                {waiting, dying, *unless}, timeout=program.ready_timeout, return_when=asyncio.FIRST_COMPLETED
            )
            # (its end is known before its last words are, and whoever answers then is another one)
            if dying.done() or self.has_ended:
                raise await dying
            if any(each.done() for each in unless):
                return False
            if not waiting.done():
                raise self._failed(f"did not answer within {program.ready_timeout:g} s")
            if waiting.cancelled():
                # Not by us: it has ended so by itself.
                raise self._failed("may be ready or not, since what asks it was cancelled")
            if (lack := process.lack(waiting.exception())) is not None:
                raise self._failed(f"may be ready or not, since it can't be asked ({lack.strerror or lack})") from lack
            waiting.result()
            self.has_answered = True
            _log.info("%s is ready", program.name, extra={"pid": self.pid})
            return True
        finally:
            for task in (waiting, dying):
                task.cancel()
            await asyncio.gather(waiting, dying, return_exceptions=True)

    def _failed(self, what: str) -> errors.CommandFailedError:
        """The error for one that has not ended, with its last lines."""
        output = words.shown_output("\n".join(self.last_lines))
        message = f"{self.program.name} {what}: {words.last_line(output)}"
        return self._told(errors.CommandFailedError(message, returncode=0, output=output))

    def _told(self, error: errors.CommandFailedError) -> errors.CommandFailedError:
        """An error with its cause, and with the place where more is said."""
        if cause := self.program.cause("\n".join(self.last_lines)):
            error.message = f"{cause}: {error.message}"
        error.hint = "; ".join(filter(None, (error.hint, f"its log is {self.program.log_path}")))
        return error


class SupervisedChild(Supervised):
    """A child of ours."""

    def __init__(self, program: Program, child: process.Child, output: int, log: logfiles.RotatingFile) -> None:
        """Take care of a process.

        Args:
            program: What it is.
            child: The process.
            output: A descriptor, which doesn't block, for what it prints.
            log: Gets that.
        """
        super().__init__(program, child.pid)
        self._child = child
        self._last_words = b""
        self._output, self._log = output, log
        #: Done at the end of its output.
        self._is_silent: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().add_reader(output, self._keep_output)

    @property
    def has_ended(self) -> bool:
        """As above."""
        return self._child.returncode is not None

    @property
    def last_lines(self) -> list[str]:
        """As above."""
        return self._last_words.decode(errors="replace").splitlines()[-_KEPT_LINES:]

    async def died(self) -> errors.CommandFailedError:
        """As above."""
        returncode = await self._child.wait()
        await asyncio.wait({self._is_silent}, timeout=_LAST_WORDS)
        output = "\n".join(self.last_lines).encode()
        return self._told(words.failure(self._child.argv, returncode, output, name=self.program.name))

    async def stop(self, hastened: asyncio.Event | None) -> None:
        """As above."""
        name = self.program.name
        stopping = asyncio.create_task(self._child.stop(self.program.grace), name=f"stop {name}")
        if hastened is not None:
            hurry = asyncio.create_task(hastened.wait(), name=f"hasten {name}")
            await asyncio.wait({stopping, hurry}, return_when=asyncio.FIRST_COMPLETED)
            hurry.cancel()
            if not stopping.done():
                _log.warning("%s is killed, since the end is hastened", name, extra={"pid": self.pid})
                stopping.cancel()
                await self._child.kill()
        await asyncio.wait({stopping})
        if not stopping.cancelled() and stopping.result():
            _log.warning("%s did not end within %g s and was killed", name, self.program.grace, extra={"pid": self.pid})
        # A grandchild that holds its output is not waited for.
        await asyncio.wait({self._is_silent}, timeout=_LAST_WORDS)

    def release(self) -> None:
        """Take no more of its output."""
        asyncio.get_running_loop().remove_reader(self._output)

    def _keep_output(self) -> None:
        """Write what it has printed to its log file and keep the end of it."""
        try:
            chunk = os.read(self._output, 1 << 16)
        except BlockingIOError:
            return
        if not chunk:
            self.release()
            self._is_silent.set_result(None)
            return
        self._log.write(chunk)
        self._last_words = (self._last_words + chunk)[-_KEPT_BYTES:]


class SupervisedDetached(Supervised):
    """A program that goes on without us."""

    def __init__(self, program: Program, watched: detached.Detached) -> None:
        super().__init__(program, watched.pid)
        self._watched = watched

    @property
    def has_ended(self) -> bool:
        """As above."""
        return self._watched.ended.done()

    @property
    def last_lines(self) -> list[str]:
        """As above."""
        return self._watched.last_words().decode(errors="replace").splitlines()[-_KEPT_LINES:]

    async def died(self) -> errors.CommandFailedError:
        """As above; how it ended only its parent knows."""
        await asyncio.wait({self._watched.ended})
        return self._failed("has ended")

    async def stop(self, hastened: asyncio.Event | None) -> None:
        """As above."""
        await self._watched.stop(0 if hastened is not None and hastened.is_set() else self.program.grace)


@contextlib.asynccontextmanager
async def started(program: Program, *, hastened: asyncio.Event | None = None) -> AsyncIterator[Supervised]:
    """Start a program; leaving the context stops it, however often its owner is cancelled meanwhile, unless it goes on without us.

    Args:
        program: What to start.
        hastened: Cuts its grace short when it is set.

    Raises:
        UnavailableError: There is no such program, or the system can't start one.
        FailedPreconditionError: Its log can't be written.
        NixletError: As ``Program.may_start``.
    """
    try:
        program.may_start()
    except (OSError, RuntimeError) as error:
        if (lack := process.lack(error)) is None:
            raise
        raise process.unstartable(program.name, lack) from error
    if program.goes_on_at:
        async with _detached(program, hastened) as running:
            yield running
        return
    async with contextlib.AsyncExitStack() as stack:
        log = stack.enter_context(_open_log(program))
        output, into = stack.enter_context(_pipe(program))
        child = await stack.enter_async_context(
            process.start(
                program.argv,
                env=program.env,
                stdout=into.fileno(),
                stderr=process.STDOUT,
                grace=program.grace,
                user=program.user,
            )
        )
        # The pipe's end comes with that of those who write to it.
        into.close()
        supervised = SupervisedChild(program, child, output.fileno(), log)
        stack.callback(supervised.release)
        try:
            yield supervised
        finally:
            # A cancelled owner must still not leave the child behind.
            await uncut.to_its_end(supervised.stop(hastened))


@contextlib.asynccontextmanager
async def _detached(program: Program, hastened: asyncio.Event | None) -> AsyncIterator[Supervised]:
    async with detached.found_or_started(
        program.argv, socket=program.goes_on_at, log_path=program.log_path, env=program.env
    ) as (watched, was_running):
        supervised = SupervisedDetached(program, watched)
        if was_running:
            _log.info(
                "%s runs since before; an update of it waits until it has ended",
                program.name,
                extra={"pid": watched.pid},
            )
        try:
            yield supervised
        finally:
            if not supervised.has_answered:
                await uncut.to_its_end(supervised.stop(hastened))


@contextlib.contextmanager
def _pipe(program: Program) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """A pipe for a program's output: where we read, which doesn't block, and where it writes.

    Not the process's own, as asyncio has them: a grandchild that holds such a pipe keeps the child's end from being noticed, and
    the pipe open for as long as it lives.
    """
    try:
        reading, writing = os.pipe()
    except OSError as error:
        raise process.unstartable(program.name, error) from error
    os.set_blocking(reading, False)
    with open(reading, "rb", buffering=0) as output, open(writing, "wb", buffering=0) as into:
        yield output, into


def _open_log(program: Program) -> logfiles.RotatingFile:
    path = program.log_path
    try:
        with contextlib.suppress(FileNotFoundError):
            return logfiles.RotatingFile(path)
        # Somebody has removed its directory.
        files.make_directory(os.path.dirname(path), mode=0o700)
        return logfiles.RotatingFile(path)
    except OSError as error:
        raise errors.FailedPreconditionError(
            f"the log of {program.name} can't be written to {path}: {error.strerror}"
        ) from error
