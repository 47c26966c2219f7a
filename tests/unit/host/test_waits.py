"""Two things that are waited for, and tasks that somebody owns."""

import asyncio
import contextlib

import pytest

from nixlet import errors
from nixlet.host import waits


async def test_the_outcomes_of_both() -> None:
    going = asyncio.create_task(asyncio.sleep(0, "other"))
    assert await waits.both(going, asyncio.sleep(0, "work")) == ("other", "work")


@pytest.mark.parametrize("fails", ["other", "work"])
async def test_the_first_error_of_either_ends_both(fails: str) -> None:
    ended = []

    async def work(name: str) -> None:
        try:
            await asyncio.sleep(0)
            if name == fails:
                raise ValueError(name) from OSError("because")
            await asyncio.Event().wait()
        finally:
            ended.append(name)

    with pytest.raises(ValueError, match=fails) as caught:
        await waits.both(work("other"), work("work"))
    assert sorted(ended) == ["other", "work"]
    assert isinstance(caught.value.__cause__, OSError)
    assert not isinstance(caught.value.__context__, BaseExceptionGroup)


async def test_what_fails_at_once_leaves_nothing_of_the_other() -> None:
    async def fails() -> None:
        raise ValueError("at once")

    for other, work in ((fails(), asyncio.sleep(60)), (asyncio.sleep(60), fails())):
        with pytest.raises(ValueError, match="at once"):
            await asyncio.wait_for(waits.both(other, work), 30)


async def test_who_is_cancelled_cancels_both() -> None:
    going = asyncio.create_task(asyncio.Event().wait())
    waiting = asyncio.create_task(waits.both(going, asyncio.Event().wait()))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert going.cancelled()


async def test_an_owned_task_ends_with_its_owner_and_is_nobody_else_s_affair() -> None:
    async with contextlib.AsyncExitStack() as stack:
        endless = waits.owned(stack, asyncio.Event().wait(), "endless")
        failing = waits.owned(stack, asyncio.wait_for(asyncio.Event().wait(), 0), "failing")
        done = waits.owned(stack, asyncio.sleep(0, 7), "done")
        await asyncio.wait({failing, done})
    assert endless.cancelled()
    assert isinstance(failing.exception(), TimeoutError)
    assert done.result() == 7


async def test_what_ends_by_a_mistake_is_told_whoever_waits_for_it(caplog: pytest.LogCaptureFixture) -> None:
    async def wrong() -> None:
        raise ExceptionGroup("x", [KeyError("spec")])

    async def refused() -> None:
        raise errors.UnavailableError("told by whoever waits for it")

    async with contextlib.AsyncExitStack() as stack:
        ending = [waits.owned(stack, work, "the names of nodes") for work in (wrong(), refused())]
        waits.owned(stack, asyncio.Event().wait(), "what goes on")
        await asyncio.wait(ending)
        await asyncio.sleep(0)
    assert caplog.messages == ["the names of nodes ended because of a mistake in nixlet"]
