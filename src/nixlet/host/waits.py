"""Waiting for the first of several things, with nothing left running that only the wait had begun."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


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
