"""Children that are started again, and children that are hurried."""

import asyncio
import contextlib
import errno
import functools
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from nixlet import errors
from nixlet.host import process, signals, supervisor

QUICK = supervisor.RestartPolicy(tries=3, first_delay=0.01, longest_delay=0.05)


async def ready() -> None:
    return


def starter(
    directory: Path, script: str, *, hastened: asyncio.Event | None = None, grace: float = 10.0
) -> Callable[[], contextlib.AbstractAsyncContextManager[supervisor.SupervisedChild]]:
    """Starts of a shell script, each of which leaves a line in ``starts``."""

    async def scripted() -> None:
        while not (directory / "up").exists():
            await asyncio.sleep(0.01)

    return functools.partial(
        supervisor.supervise,
        "thing",
        ["sh", "-c", f"cd {directory}; echo $$ >> starts; {script}"],
        env=dict(os.environ),
        log_path=str(directory / "log"),
        ready=scripted if "up" in script else ready,
        ready_timeout=10,
        grace=grace,
        hastened=hastened,
    )


def starts(directory: Path) -> list[int]:
    return [int(line) for line in (directory / "starts").read_text().split()]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_child_that_dies_is_started_again(tmp_path: Path) -> None:
    told: list[supervisor.Event] = []
    async with supervisor.kept_running(
        "thing", starter(tmp_path, "touch up; exec sleep 60"), QUICK, tell=told.append
    ) as kept:
        await kept.ready()
        first = kept.current
        assert first is not None
        os.kill(first.pid, signal.SIGKILL)
        await until(lambda: kept.current is not None and kept.current is not first)
        assert kept.restarts == 1
        assert kept.failure is None
        second = kept.current
        assert second is not None
        # The first one's mark makes it ready before it has written anything.
        await until(lambda: starts(tmp_path)[1:] == [second.pid])
    assert told == ["ready", "died", "ready"]
    with pytest.raises(ProcessLookupError):
        os.kill(second.pid, 0)


async def test_a_child_that_fails_again_and_again_is_given_up_with_its_last_lines(tmp_path: Path) -> None:
    told: list[supervisor.Event] = []
    script = "touch up; sleep 0.05; echo words; echo no space left; exit 3"
    async with supervisor.kept_running("thing", starter(tmp_path, script), QUICK, tell=told.append) as kept:
        await kept.ready()
        error = await asyncio.wait_for(kept.gave_up(), 20)
        assert kept.current is None
    assert "thing failed 4 times in a short time and is not started again" in error.message
    assert "no space left" in error.message
    assert isinstance(error, errors.CommandFailedError)
    assert error.output.splitlines()[-2:] == ["words", "no space left"]
    assert error.returncode == 3
    assert len(starts(tmp_path)) == 1 + QUICK.tries
    assert told[-1] == "gave up"


async def test_a_failure_before_it_is_ready_counts_as_one(tmp_path: Path) -> None:
    # Up once; later starts die before they are ready.
    script = "test -e once && exit 4; touch once up; sleep 0.05; rm up; exit 5"
    async with supervisor.kept_running("thing", starter(tmp_path, script), QUICK) as kept:
        await kept.ready()
        error = await asyncio.wait_for(kept.gave_up(), 20)
    assert isinstance(error, errors.CommandFailedError)
    assert error.returncode == 4
    assert len(starts(tmp_path)) == 1 + QUICK.tries


async def test_a_child_that_stayed_up_has_all_its_tries_again(tmp_path: Path) -> None:
    policy = supervisor.RestartPolicy(tries=1, first_delay=0.01, stable_after=0.0)
    async with supervisor.kept_running("thing", starter(tmp_path, "touch up; sleep 0.02"), policy) as kept:
        await kept.ready()
        await until(lambda: kept.restarts >= 4)
        assert not kept.given_up.done()


async def test_never_means_once(tmp_path: Path) -> None:
    never = supervisor.RestartPolicy(tries=0)
    script = "touch up; sleep 0.05; echo bye; exit 6"
    async with supervisor.kept_running("thing", starter(tmp_path, script), never) as kept:
        await kept.ready()
        error = await asyncio.wait_for(kept.gave_up(), 20)
    assert error.message == "sh ended with status 6: bye"
    assert len(starts(tmp_path)) == 1


async def test_what_can_not_start_at_all_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(errors.CommandFailedError, match="status 7: wrong key"):
        async with supervisor.kept_running("thing", starter(tmp_path, "echo wrong key; exit 7; up"), QUICK) as kept:
            await kept.ready()
    assert len(starts(tmp_path)) == 1


async def test_a_system_that_starts_no_process_for_a_while_costs_tries_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = asyncio.create_subprocess_exec, 0

    async def refuse_some(*arguments: Any, **options: Any) -> asyncio.subprocess.Process:
        nonlocal calls
        calls += 1
        if calls in {2, 3}:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return await real(*arguments, **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", refuse_some)
    async with supervisor.kept_running("thing", starter(tmp_path, "touch up; exec sleep 60"), QUICK) as kept:
        await kept.ready()
        os.kill(starts(tmp_path)[0], signal.SIGKILL)
        # What the first one left makes the second one ready at once, perhaps before it notes its start.
        await until(lambda: calls == 4 and kept.current is not None and len(starts(tmp_path)) == 2)
        assert (len(starts(tmp_path)), kept.restarts) == (2, 3)
    calls = 1
    with pytest.raises(errors.UnavailableError, match=r"^sh can't be started: Resource temporarily unavailable$"):
        await process.run(["sh", "-c", "exit"])


async def test_mistakes_of_ours_reach_those_who_wait(tmp_path: Path) -> None:
    real = starter(tmp_path, "touch up; sleep 0.05; exit 1")
    calls = 0

    @contextlib.asynccontextmanager
    async def start() -> AsyncIterator[supervisor.SupervisedChild]:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise KeyError("a mistake")
        async with real() as child:
            yield child

    async with supervisor.kept_running("thing", start, QUICK) as kept:
        await kept.ready()
        with pytest.raises(KeyError):
            await asyncio.wait_for(kept.gave_up(), 20)


async def test_an_end_that_is_hastened_does_not_wait_for_the_grace(tmp_path: Path) -> None:
    hastened = asyncio.Event()
    script = "trap '' TERM; touch up; while :; do sleep 0.05; done"
    began = asyncio.get_running_loop().time()
    async with supervisor.kept_running(
        "thing", starter(tmp_path, script, hastened=hastened, grace=120.0), QUICK
    ) as kept:
        await kept.ready()
        assert kept.current is not None
        pid = kept.current.pid
        asyncio.get_running_loop().call_later(0.2, hastened.set)
    assert asyncio.get_running_loop().time() - began < 60
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_a_log_that_can_not_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    with pytest.raises(errors.FailedPreconditionError, match="log of thing can't be written"):
        async with starter(tmp_path, "exec sleep 60")():
            pass


def test_delays_double_up_to_a_limit() -> None:
    policy = supervisor.RestartPolicy(first_delay=1.0, longest_delay=10.0)
    assert [policy.delay(failures) for failures in range(1, 7)] == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0]


async def test_the_second_signal_hastens() -> None:
    stop = signals.watched()
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(stop.requested.wait(), 10)
    assert not stop.hastened.is_set()
    os.kill(os.getpid(), signal.SIGINT)
    await asyncio.wait_for(stop.hastened.wait(), 10)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().remove_signal_handler(number)
