"""Work that outlives whoever asked for it."""

import asyncio

import pytest

from nixlet.snapshots import tasks


async def test_what_never_ends_is_given_up_when_the_end_has_come(caplog: pytest.LogCaptureFixture) -> None:
    made, done = tasks.Tasks(), list[str]()

    async def work(name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        done.append(name)

    async def never() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            # What undoes it is work as well.
            await made.start(work("undone", 0.01), "undo")

    task = made.start(never(), "a download")
    made.background(work("quick", 0), "something quick")
    await made.finish(0.05)
    assert task.cancelled()
    assert done == ["quick", "undone"]
    assert "a download takes too long and is given up" in caplog.text
