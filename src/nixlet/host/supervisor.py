"""A program that nixlet needs for as long as it runs: started, found ready, watched, logged, started again, stopped in order.

Its output comes through a pipe, so that its log can be put aside without losing or doubling a line, and its last words are at
hand. The pipe ends with nixlet, which is no loss: such a child does so, too.
"""

import asyncio
import contextlib
import dataclasses
import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Literal

from nixlet import errors
from nixlet.host import logfiles, process

#: How many of a child's last lines, and bytes at most, stand in our error when it dies.
_KEPT_LINES = 20
_KEPT_BYTES = 16 << 10

#: Seconds to wait for the end of a dead child's output, which a grandchild may hold open.
_LAST_WORDS = 0.5

_log = logging.getLogger("nixlet.supervisor")


class SupervisedChild:
    """A child that is running and was ready once."""

    def __init__(self, name: str, child: process.Child, log: logfiles.RotatingFile) -> None:
        self.name = name
        self._child = child
        self._last_words = b""
        assert child.stdout is not None
        self._reader = asyncio.create_task(self._keep_log(child.stdout, log), name=f"log of {name}")

    @property
    def pid(self) -> int:
        """The child's process ID."""
        return self._child.pid

    @property
    def last_lines(self) -> list[str]:
        """The last lines that it printed."""
        return self._last_words.decode(errors="replace").splitlines()[-_KEPT_LINES:]

    async def died(self) -> errors.CommandFailedError:
        """Wait until it ends by itself; the error that says so, with its last lines."""
        returncode = await self._child.wait()
        await asyncio.wait({self._reader}, timeout=_LAST_WORDS)
        return process.failure(self._child.argv, returncode, "\n".join(self.last_lines).encode())

    async def stop(self, grace: float, hastened: asyncio.Event | None) -> None:
        """End it: SIGTERM, and SIGKILL after ``grace`` seconds or as soon as it is ``hastened``."""
        stopping = asyncio.create_task(self._child.stop(grace), name=f"stop {self.name}")
        if hastened is not None:
            hurry = asyncio.create_task(hastened.wait(), name=f"hasten {self.name}")
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
async def supervise(
    name: str,
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    log_path: str,
    ready: Callable[[], Awaitable[object]],
    ready_timeout: float,
    grace: float = 10.0,
    hastened: asyncio.Event | None = None,
) -> AsyncIterator[SupervisedChild]:
    """Start a program and wait until it is ready; leaving the context stops it.

    Args:
        name: What people call it.
        argv: The program and its arguments.
        env: Its whole environment.
        log_path: The file that gets what it prints.
        ready: Returns when the program answers; it is cancelled when the program dies first.
        ready_timeout: Seconds to wait for that.
        grace: Seconds between SIGTERM and SIGKILL at the end.
        hastened: Cuts that time short when it is set.

    Raises:
        UnavailableError: There is no such program.
        FailedPreconditionError: Its log can't be written.
        CommandFailedError: It died before it was ready, or did not become ready in time; its last lines are in the error.
    """
    async with contextlib.AsyncExitStack() as stack:
        log = stack.enter_context(_open_log(name, log_path))
        child = await stack.enter_async_context(
            process.start(argv, env=env, stdout=process.PIPE, stderr=process.STDOUT, grace=grace)
        )
        supervised = SupervisedChild(name, child, log)
        try:
            await _wait_until_ready(supervised, ready, ready_timeout)
            _log.info("%s is ready", name, extra={"pid": child.pid})
            yield supervised
        finally:
            # Shielded: a cancelled owner must still not leave the child behind.
            await asyncio.shield(supervised.stop(grace, hastened))


def _open_log(name: str, path: str) -> logfiles.RotatingFile:
    try:
        return logfiles.RotatingFile(path)
    except OSError as error:
        raise errors.FailedPreconditionError(
            f"the log of {name} can't be written to {path}: {error.strerror}"
        ) from error


async def _wait_until_ready(
    child: SupervisedChild, ready: Callable[[], Awaitable[object]], ready_timeout: float
) -> None:
    async def wait() -> None:
        await ready()

    waiting = asyncio.create_task(wait(), name=f"{child.name} ready")
    dying = asyncio.create_task(child.died(), name=f"{child.name} died")
    try:
        done, _ = await asyncio.wait({waiting, dying}, timeout=ready_timeout, return_when=asyncio.FIRST_COMPLETED)
        if dying in done:
            raise dying.result()
        if waiting in done:
            waiting.result()
            return
        last = child.last_lines[-1] if child.last_lines else "it printed nothing"
        raise errors.CommandFailedError(
            f"{child.name} did not answer within {ready_timeout:g} s: {last}",
            returncode=0,
            output="\n".join(child.last_lines),
        )
    finally:
        for task in (waiting, dying):
            task.cancel()
        await asyncio.gather(waiting, dying, return_exceptions=True)


@dataclasses.dataclass(frozen=True, slots=True)
class RestartPolicy:
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


#: What happened to a child that is kept running.
Event = Literal["ready", "died", "gave up"]


class KeptChild:
    """A child that is started again when it dies; ``kept_running`` makes it."""

    def __init__(self, name: str) -> None:
        self.name = name
        #: The running child; None while there is none.
        self.current: SupervisedChild | None = None
        #: How often it was started again.
        self.restarts = 0
        #: Why it died last, while it is not running.
        self.failure: errors.NixletError | None = None
        self.given_up: asyncio.Future[errors.NixletError] = asyncio.get_running_loop().create_future()
        self.begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def ready(self) -> None:
        """Wait until it is ready for the first time.

        Raises:
            NixletError: It did not start; it is not tried again.
        """
        await asyncio.shield(self.begun)

    async def gave_up(self) -> errors.NixletError:
        """Wait until it died for good; the error that says why, with its last lines."""
        return await asyncio.shield(self.given_up)

    async def run(
        self,
        start: Callable[[], contextlib.AbstractAsyncContextManager[SupervisedChild]],
        policy: RestartPolicy,
        tell: Callable[[Event], None],
    ) -> None:
        """Keep it running until this is cancelled; ``ready`` learns how the first start went."""
        loop = asyncio.get_running_loop()
        failures = 0
        while True:
            began = loop.time()
            try:
                async with start() as child:
                    began, self.current, self.failure = loop.time(), child, None
                    if not self.begun.done():
                        self.begun.set_result(None)
                    tell("ready")
                    self.failure = await child.died()
                    self.current = None
            except errors.NixletError as error:
                if not self.begun.done():
                    # What can't even start is a matter for a person, who is waiting for the answer.
                    self.begun.set_exception(error)
                    return
                self.failure = error
            assert self.failure is not None
            if loop.time() - began >= policy.stable_after:
                failures = 0
            failures += 1
            tell("died")
            if failures > policy.tries:
                self.given_up.set_result(_final(self.name, failures, self.failure))
                tell("gave up")
                return
            delay = policy.delay(failures)
            _log.error("%s is started again in %g s: %s", self.name, delay, self.failure, extra={"failures": failures})
            await asyncio.sleep(delay)
            self.restarts += 1


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
    name: str,
    start: Callable[[], contextlib.AbstractAsyncContextManager[SupervisedChild]],
    policy: RestartPolicy,
    *,
    tell: Callable[[Event], None] = lambda _: None,
) -> AsyncIterator[KeptChild]:
    """Have a child running; it is started again when it dies after it was ready, and stopped when the context is left.

    It is being started when the context begins: see ``KeptChild.ready``.

    Args:
        name: What people call it.
        start: Starts it (``supervise``), with all that must be so before each start.
        policy: How patient we are.
        tell: Called with all that happens to it.
    """
    kept = KeptChild(name)
    keeping = asyncio.create_task(kept.run(start, policy, tell), name=f"keep {name}")

    def pass_on_bug(task: "asyncio.Task[None]") -> None:
        # Whoever waits for the end must not wait for ever because of a mistake of ours.
        if not task.cancelled() and (bug := task.exception()) is not None:
            (kept.given_up if kept.begun.done() else kept.begun).set_exception(bug)

    keeping.add_done_callback(pass_on_bug)
    try:
        yield kept
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        for future in (kept.begun, kept.given_up):
            if future.done() and not future.cancelled():
                future.exception()  # nobody may have asked
            future.cancel()
