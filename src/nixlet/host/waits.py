"""Waiting for several things, with nothing left running that only the wait had begun, or that nobody waits for any more."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar

from nixlet import errors

S = TypeVar("S")
T = TypeVar("T")

_log = logging.getLogger("nixlet.node")


class Interrupted(Exception):
    """Something came to be before the work had ended."""


async def first(*works: "asyncio.Future[Any] | Coroutine[Any, Any, object]") -> None:
    """Wait until one of several has ended. Tasks go on, and coroutines are given up."""
    waited = [asyncio.ensure_future(each) for each in works]
    ours = [task for task, work in zip(waited, works, strict=True) if task is not work]
    try:
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in ours:
            task.cancel()
        await asyncio.gather(*ours, return_exceptions=True)


async def unless(event: asyncio.Event, work: Coroutine[Any, Any, T]) -> T:
    """Do something until it has ended, or until an event is set: then it is cancelled.

    Raises:
        Interrupted: The event was set before.
    """
    working = asyncio.create_task(work)
    try:
        await first(working, event.wait())
        if not working.done():
            raise Interrupted
        return working.result()
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


async def both(other: Awaitable[S], work: Awaitable[T]) -> tuple[S, T]:
    """The outcomes of two; the first error of either ends both.

    Args:
        other: Goes on in a task.
        work: Is done by the caller's own task, in which whatever it enters may be left again.
    """
    going = asyncio.ensure_future(other)

    async def ended() -> S:
        return await going

    try:
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(ended(), name="the other of both")
            outcome = await work
    except BaseExceptionGroup as errors_of_both:
        first_error = errors_of_both.exceptions[0]
    else:
        return waiting.result(), outcome
    finally:
        await _given_up(going)
    # Here, where it doesn't tell of the group as well.
    raise first_error


def owned(stack: contextlib.AsyncExitStack, work: Coroutine[Any, Any, T], name: str) -> "asyncio.Task[T]":
    """A task that ends with ``stack`` at the latest; how it ends is for whoever waits for it. A mistake is told, since that may be nobody."""
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_tell)
    stack.push_async_callback(_given_up, task)
    return task


def _tell(task: "asyncio.Task[Any]") -> None:
    error = None if task.cancelled() else task.exception()
    if error is not None and not isinstance(error, errors.NixletError):
        _log.error("%s ended because of a mistake in nixlet", task.get_name(), exc_info=error)


async def _given_up(task: "asyncio.Future[Any]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
