"""A program that nixlet needs for as long as it runs: started, found ready, watched, logged, and stopped in order."""

import asyncio
import collections
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

from nixlet import errors
from nixlet.host import process

#: A child's log is started anew beyond this size (bytes), keeping one older file; k3s rotates at the same size.
_LOG_LIMIT = 50 << 20

#: How many of a child's last lines stand in our error when it dies.
_KEPT_LINES = 20

_log = logging.getLogger("nixlet.supervisor")


class SupervisedChild:
    """A child that is running and was ready once."""

    def __init__(self, name: str, child: process.Child) -> None:
        self.name = name
        self._child = child
        self.last_lines: collections.deque[str] = collections.deque(maxlen=_KEPT_LINES)

    @property
    def pid(self) -> int:
        """The child's process ID."""
        return self._child.pid

    async def died(self) -> errors.CommandFailedError:
        """Wait until it ends by itself; the error that says so, with its last lines."""
        returncode = await self._child.wait()
        # The reader of its output needs a turn to take up what it said at the end.
        await asyncio.sleep(0.05)
        return process.failure(self._child.argv, returncode, "\n".join(self.last_lines).encode())


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

    Raises:
        UnavailableError: There is no such program.
        CommandFailedError: It died before it was ready, or did not become ready in time; its last lines are in the error.
    """
    async with process.start(argv, env=env, stdout=process.PIPE, stderr=process.STDOUT, grace=grace) as child:
        supervised = SupervisedChild(name, child)
        assert child.stdout is not None
        reader = asyncio.create_task(_keep_log(child.stdout, log_path, supervised.last_lines), name=f"log of {name}")
        try:
            await _wait_until_ready(supervised, ready, ready_timeout)
            _log.info("%s is ready", name, extra={"pid": child.pid})
            yield supervised
        finally:
            await asyncio.shield(child.stop(grace))
            # A grandchild may hold the pipe open: what the child itself said is in it by now.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader, 1.0)


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


async def _keep_log(stream: asyncio.StreamReader, path: str, last_lines: "collections.deque[str]") -> None:
    """Write a child's output to its log file and keep the last lines."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(path, "ab", buffering=0))  # noqa: ASYNC230 (appending a line doesn't wait)
        size = os.fstat(file.fileno()).st_size
        while chunk := await stream.read(1 << 16):
            if size > _LOG_LIMIT:
                os.replace(path, f"{path}.1")
                file.close()
                file = stack.enter_context(open(path, "ab", buffering=0))  # noqa: ASYNC230
                size = 0
            file.write(chunk)
            size += len(chunk)
            last_lines.extend(chunk.decode(errors="replace").splitlines())
