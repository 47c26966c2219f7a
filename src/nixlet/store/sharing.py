"""Work that several callers share: it goes on while anyone waits for it, and its outcome stays open while anyone uses it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Generic, TypeVar

from nixlet.telemetry import progress

T = TypeVar("T")


class Shared(Generic[T]):
    """One piece of work with several users: it goes on while anyone waits for it, and stays open while anyone uses it."""

    def __init__(
        self, work: Callable[[progress.ProgressSink], contextlib.AbstractAsyncContextManager[T]], name: str
    ) -> None:
        """Begin ``work``, which tells its progress to the sink that it is given, in a task of this name."""
        self._sinks: list[progress.ProgressSink] = []
        self._left = asyncio.Event()
        self._result: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run(work), name=name)

    @property
    def ended(self) -> bool:
        """Whether it failed, or all who used it have left: who comes now is too late."""
        return self._left.is_set()

    @property
    def ready(self) -> bool:
        """Whether it succeeded and is still open."""
        return self._result.done() and not self.ended

    async def _run(self, work: Callable[[progress.ProgressSink], contextlib.AbstractAsyncContextManager[T]]) -> None:
        try:
            async with work(self._tell) as result:
                self._result.set_result(result)
                await self._left.wait()
        except BaseException as error:
            self._left.set()
            if isinstance(error, asyncio.CancelledError):
                self._result.cancel()
                raise
            if not self._result.done():
                self._result.set_exception(error)
                self._result.exception()  # what nobody waits for any more isn't worth a warning

    def _tell(self, step: progress.Progress) -> None:
        for sink in self._sinks:
            sink(step)

    @contextlib.asynccontextmanager
    async def used(self, sink: progress.ProgressSink) -> AsyncIterator[T]:
        """Wait for the result, and keep it for the time of the context."""
        self._sinks.append(sink)
        try:
            yield await asyncio.shield(self._result)
        finally:
            self._sinks.remove(sink)
            if not self._sinks:
                self._left.set()
                if not self._result.done():
                    self._task.cancel()
                await asyncio.wait([self._task])
