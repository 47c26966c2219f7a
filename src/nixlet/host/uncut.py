"""Work that isn't cut in half: a caller may be cancelled, but goes on only when the work has ended."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def to_its_end(work: Coroutine[Any, Any, T], stop: Callable[[], None] = lambda: None) -> T:
    """Run something in a task of its own; a caller that is cancelled meanwhile waits for its end before it gives up.

    Args:
        work: What isn't cancelled.
        stop: Is called when the caller is cancelled, to ask the work for an early end.
    """
    return await outcome(asyncio.create_task(work), stop)


async def outcome(future: "asyncio.Future[T]", stop: Callable[[], None] = lambda: None) -> T:
    """The outcome of something that goes on by itself; a caller that is cancelled meanwhile waits for it before it gives up.

    Args:
        future: What is waited for, and isn't cancelled.
        stop: As in ``to_its_end``.
    """
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        stop()
        while not future.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([future])
        if not future.cancelled():
            future.exception()  # whoever asked is gone
        raise
