"""Work that its caller's cancellation doesn't cut in half."""

import asyncio
import threading

import pytest

from nixlet.host import uncut


async def test_a_cancelled_caller_waits_for_the_end() -> None:
    stopped, may_end, ended = asyncio.Event(), asyncio.Event(), list[str]()

    async def work() -> None:
        await may_end.wait()
        ended.append("work")

    caller = asyncio.create_task(uncut.to_its_end(work(), stopped.set))
    await asyncio.sleep(0)
    for _ in range(3):
        caller.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not caller.done()
    assert stopped.is_set()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert ended == ["work"]


async def test_a_thread_is_asked_for_its_end() -> None:
    stop = threading.Event()
    caller = asyncio.create_task(uncut.to_its_end(asyncio.to_thread(stop.wait), stop.set))
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller


async def test_results_and_errors_are_the_works_own() -> None:
    async def fail() -> None:
        raise ValueError("mine")

    assert await uncut.to_its_end(asyncio.sleep(0, "result")) == "result"
    with pytest.raises(ValueError, match="mine"):
        await uncut.to_its_end(fail())
