"""A file in a thread of its own: whoever waits for a read, a write or the closing may go, and the thread stays behind.

A file on a network, or of a file system that some program serves, may take for ever. No other work waits in such a thread's queue, and
the end of our process doesn't wait for it either, as it would for those of an executor.
"""

import asyncio
import contextlib
import os
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

_Call = tuple[Callable[[int], Any], "asyncio.Future[Any]"]


class FileThread:
    """One file. Its descriptor belongs to the thread, which closes it when it has done all that it was asked for."""

    def __init__(self, fd: int) -> None:
        """Take a descriptor.

        Raises:
            RuntimeError: There can't be a thread more.
        """
        self._fd = fd
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        threading.Thread(target=self._run, name=f"file {fd}", daemon=True).start()

    async def call(self, work: Callable[[int], T]) -> T:
        """What a function returns for the descriptor. Who is cancelled doesn't wait for it; it may be done nevertheless.

        Raises:
            Exception: What the function raises.
        """
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._calls.put((work, answer))
        return await answer

    def close(self) -> None:
        """Close the file, after what was asked before, and without waiting for that."""
        self._calls.put(None)

    async def closed(self) -> None:
        """Wait until it is closed."""
        await asyncio.shield(self._closed)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            work, answer = call
            result, failure = None, None
            try:
                result = work(self._fd)
            except Exception as error:  # noqa: BLE001 (it is raised where it is waited for)
                failure = error
            _tell(answer, result, failure)
        # What could not be written is told by fsync(2) alone for certain, which nobody has asked for.
        with contextlib.suppress(OSError):
            os.close(self._fd)
        _tell(self._closed, None, None)


def _tell(answer: "asyncio.Future[Any]", result: object, failure: Exception | None) -> None:
    # The loop may be gone.
    with contextlib.suppress(RuntimeError):
        answer.get_loop().call_soon_threadsafe(_answer, answer, result, failure)


def _answer(answer: "asyncio.Future[Any]", result: object, failure: Exception | None) -> None:
    if answer.done():
        return
    if failure is None:
        answer.set_result(result)
    else:
        answer.set_exception(failure)
