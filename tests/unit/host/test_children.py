"""Children together: the order in which they start and stop, who is started again, and what is told of them."""

import asyncio
import contextlib
import errno
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from nixlet import errors
from nixlet.host import children, process, supervisor

QUICK = supervisor.RestartPolicy(tries=3, first_delay=0.01, longest_delay=0.05)

#: Becomes ready at once and stays.
STAYS = "touch up; exec sleep 60"


class Things:
    """Shell scripts as children. Each has a directory, is ready when it has made ``up`` there, and leaves a line in ``starts``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        #: Their starts and ends, by name, as they happen.
        self.events = directory / "events"
        self.events.touch()

    def program(self, name: str, script: str = STAYS, **more: Any) -> supervisor.Program:
        place = self.directory / name
        place.mkdir()

        async def ready() -> None:
            while not (place / "up").exists():
                await asyncio.sleep(0.01)

        def clear() -> None:
            # Before it starts: it must not be taken for ready by what an earlier start left.
            (place / "up").unlink(missing_ok=True)

        head = f"cd {place}; echo $$ >> starts; echo {name} starts >> {self.events}; "
        return supervisor.Program(
            **{
                "name": name,
                "argv": ["sh", "-c", head + script],
                "env": dict(os.environ),
                "log_path": str(place / "log"),
                "ready": ready,
                "ready_timeout": 30,
                "restart": QUICK,
                "may_start": clear,
                **more,
            }
        )

    def starts(self, name: str) -> list[int]:
        with contextlib.suppress(FileNotFoundError):
            return [int(line) for line in (self.directory / name / "starts").read_text().split()]
        return []

    def happened(self) -> list[str]:
        return self.events.read_text().splitlines()

    def tells_its_end(self, name: str, seconds: float = 0.0) -> str:
        """A script that stays until it is asked to end, and takes its time for that."""
        return f"trap 'sleep {seconds}; echo {name} ends >> {self.events}; exit 0' TERM; touch up; while :; do sleep 0.02; done"


@pytest.fixture
def things(tmp_path: Path) -> Things:
    return Things(tmp_path)


@pytest.fixture
async def kept() -> AsyncIterator[children.Children]:
    async with children.kept_running() as kept:
        yield kept


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


def running(child: children.Child) -> supervisor.SupervisedChild:
    assert child.current is not None
    return child.current


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_a_child_that_dies_is_started_again(things: Things) -> None:
    told: list[str] = []
    async with children.kept_running(tell=told.append) as kept:
        kept.start(things.program("thing"))
        await kept.ready()
        thing = kept["thing"]
        first = running(thing)
        os.kill(first.pid, signal.SIGKILL)
        await until(lambda: thing.current not in {None, first})
        assert thing.restarts == 1
        second = running(thing)
        assert things.starts("thing") == [first.pid, second.pid]
        (status,) = kept.status()
        assert (status.name, status.pid, status.state, status.restarts) == ("thing", second.pid, "ready", 1)
        assert status.failure.startswith("thing was ended by SIGKILL")
        assert status.log == str(things.directory / "thing/log")
    assert told == [f"thing: {state}" for state in ("starting", "ready", "died", "starting", "ready")]
    assert not alive(second.pid)


async def test_a_child_that_fails_again_and_again_is_given_up_with_its_last_lines(
    things: Things, kept: children.Children
) -> None:
    kept.start(things.program("thing", "touch up; sleep 0.1; echo words; echo no space left; exit 3"))
    await kept.ready()
    error = await asyncio.wait_for(kept.gave_up(), 30)
    assert "thing failed 4 times in a short time and is not started again" in error.message
    assert "no space left" in error.message
    assert isinstance(error, errors.CommandFailedError)
    assert error.output.splitlines()[-2:] == ["words", "no space left"]
    assert error.returncode == 3
    assert len(things.starts("thing")) == 1 + QUICK.tries
    assert (kept["thing"].state, kept["thing"].current) == ("gave up", None)
    with pytest.raises(
        errors.UnavailableError, match=r"^thing is not running: thing ended with status 3: no space left$"
    ):
        kept["thing"].check()


async def test_a_failure_before_it_is_ready_counts_as_one(things: Things, kept: children.Children) -> None:
    # Up once; later starts die before they are ready.
    kept.start(things.program("thing", "test -e once && exit 4; touch once up; sleep 0.1; exit 5"))
    await kept.ready()
    error = await asyncio.wait_for(kept.gave_up(), 30)
    assert isinstance(error, errors.CommandFailedError)
    assert error.returncode == 4
    assert len(things.starts("thing")) == 1 + QUICK.tries


async def test_a_child_that_stayed_up_has_all_its_tries_again(things: Things, kept: children.Children) -> None:
    policy = supervisor.RestartPolicy(tries=1, first_delay=0.01, stable_after=0.0)
    kept.start(things.program("thing", "touch up; sleep 0.05", restart=policy))
    await until(lambda: kept["thing"].restarts >= 4)
    assert kept["thing"].state != "gave up"


async def test_never_means_once(things: Things, kept: children.Children) -> None:
    never = supervisor.RestartPolicy(tries=0)
    kept.start(things.program("thing", "touch up; sleep 0.1; echo bye; exit 6", restart=never))
    await kept.ready()
    error = await asyncio.wait_for(kept.gave_up(), 30)
    assert error.message == "thing ended with status 6: bye"
    assert len(things.starts("thing")) == 1


async def test_a_first_failure_is_told_at_once_whoever_is_still_starting(things: Things) -> None:
    async with children.kept_running() as kept:
        kept.start(
            things.program("slow", "exec sleep 60"),
            things.program("wrong", "echo one; echo wrong key; exit 7"),
            things.program("later", waits_for=("wrong",)),
        )
        with pytest.raises(errors.CommandFailedError) as caught:
            await kept.ready()
        assert caught.value.message == "wrong ended with status 7: wrong key"
        assert caught.value.output == "one\nwrong key"
        assert caught.value.hint.startswith("the command was: sh -c ")
        assert caught.value.hint.endswith(f"; its log is {things.directory}/wrong/log")
        assert await kept.gave_up() is caught.value
        assert [child.state for child in kept] == ["starting", "gave up", "waiting"]
    assert len(things.starts("wrong")) == 1
    assert things.starts("later") == []
    assert not any(map(alive, things.starts("slow")))
    assert (things.directory / "wrong/log").read_text() == "one\nwrong key\n"


async def test_a_child_starts_when_those_that_it_waits_for_are_ready(things: Things, kept: children.Children) -> None:
    held = "until test -e go; do sleep 0.02; done; "
    kept.start(
        things.program("last", waits_for=("second", "other")),
        things.program("second", waits_for=("first",)),
        things.program("first", held + STAYS),
        things.program("other"),
    )
    await kept.ready("other")
    await until(lambda: things.starts("first") != [])
    states = {child.name: child.state for child in kept}
    assert states == {"first": "starting", "other": "ready", "second": "waiting", "last": "waiting"}
    assert kept.summary() == "1 of 4 children are ready; first: starting; second: waiting; last: waiting"
    (things.directory / "first/go").touch()
    await kept.ready()
    assert kept.summary() == "4 of 4 children are ready"
    assert [line for line in things.happened() if "other" not in line] == [
        "first starts",
        "second starts",
        "last starts",
    ]


async def test_what_depends_on_nothing_of_each_other_starts_at_the_same_time(
    things: Things, kept: children.Children
) -> None:
    # Each is ready when both have started: one after the other they would never be.
    both = f"until test $(grep -c pair {things.events}) = 2; do sleep 0.02; done; touch up; exec sleep 60"
    kept.start(
        things.program("base"),
        things.program("pair-a", both, waits_for=("base",)),
        things.program("pair-b", both, waits_for=("base",)),
    )
    await asyncio.wait_for(kept.ready(), 30)


async def test_what_is_started_later_may_wait_for_what_is_there(things: Things, kept: children.Children) -> None:
    kept.start(things.program("first"))
    await kept.ready()
    kept.start(things.program("second", waits_for=("first",)))
    await kept.ready("second")
    assert [child.name for child in kept] == ["first", "second"]


@pytest.mark.parametrize(
    ("described", "fault"),
    [
        ({"a": ("b",)}, "a waits for b, which is no child"),
        ({"a": ("b",), "b": ("c",), "c": ("a",), "d": ()}, "these children wait for each other: a, b, c"),
        ({"a": ("a",)}, "these children wait for each other: a"),
        ({"there": ()}, "two children are called there"),
    ],
)
async def test_a_wrong_description_is_refused_at_once_and_nothing_starts(
    things: Things, kept: children.Children, described: dict[str, tuple[str, ...]], fault: str
) -> None:
    kept.start(things.program("there"))
    await kept.ready()
    blank = kept["there"].program
    with pytest.raises(ValueError, match=fault):
        kept.start(*(msgspec.structs.replace(blank, name=name, waits_for=others) for name, others in described.items()))
    with pytest.raises(ValueError, match="x falls with there, for which it does not wait"):
        kept.start(msgspec.structs.replace(blank, name="x", falls_with=("there",)))
    assert [child.name for child in kept] == ["there"]
    assert len(things.starts("there")) == 1


async def test_a_child_outlives_those_that_it_waited_for_unless_it_is_described_otherwise(
    things: Things, kept: children.Children
) -> None:
    kept.start(
        things.program("base"),
        things.program("stays", waits_for=("base",)),
        things.program("falls", waits_for=("base",), falls_with=("base",)),
    )
    await kept.ready()
    os.kill(running(kept["base"]).pid, signal.SIGKILL)
    await until(lambda: len(things.starts("falls")) == 2 and kept["falls"].state == "ready")
    assert len(things.starts("base")) == 2
    assert len(things.starts("stays")) == 1
    assert [child.restarts for child in kept] == [1, 0, 1]
    assert kept["falls"].status().failure == "falls can't go on without base, which has ended"
    first, second = things.starts("falls")
    assert (alive(first), alive(second)) == (False, True)


async def test_what_fails_while_another_is_away_is_tried_again_and_has_all_its_tries(
    things: Things, kept: children.Children
) -> None:
    base = things.directory / "base"
    # It ends when the other is away, and would never be started again for a failure of its own.
    needs = f"touch up; while test -e {base}/up; do sleep 0.02; done; echo base is away; exit 1"
    kept.start(
        # The next start takes until it may.
        things.program("base", "test -e once && until test -e go; do sleep 0.02; done; touch once up; exec sleep 60"),
        things.program("needs", needs, waits_for=("base",), restart=msgspec.structs.replace(QUICK, tries=0)),
    )
    await kept.ready()
    os.kill(running(kept["base"]).pid, signal.SIGKILL)
    await until(lambda: kept["needs"].state == "waiting")
    assert kept["needs"].failure is not None
    assert "base is away" in kept["needs"].failure.message
    (base / "go").touch()
    await until(lambda: kept["needs"].state == "ready" and len(things.starts("needs")) == 2)
    assert len(things.starts("base")) == 2


async def test_a_first_start_that_another_spoils_is_no_first_failure(things: Things, kept: children.Children) -> None:
    # The first start waits until the other has gone, and ends for that.
    script = f"test -e again && {{ {STAYS}; }}; touch again; until test -e {things.directory}/gone; do sleep 0.02; done; exit 1"
    kept.start(things.program("base"), things.program("needs", script, waits_for=("base",)))
    await until(lambda: len(things.starts("needs")) == 1)
    first = running(kept["base"])
    os.kill(first.pid, signal.SIGKILL)
    await first.died()
    (things.directory / "gone").touch()
    await asyncio.wait_for(kept.ready(), 30)
    assert len(things.starts("needs")) == 2


async def test_children_stop_before_those_that_they_wait_for(things: Things) -> None:
    async with children.kept_running() as kept:
        kept.start(
            things.program("base", things.tells_its_end("base")),
            things.program("middle", things.tells_its_end("middle", 0.1), waits_for=("base",)),
            things.program("top", things.tells_its_end("top", 0.2), waits_for=("middle",)),
        )
        await kept.ready()
    assert [line for line in things.happened() if line.endswith("ends")] == ["top ends", "middle ends", "base ends"]
    assert [child.state for child in kept] == ["stopped"] * 3


async def test_what_depends_on_nothing_of_each_other_stops_at_the_same_time(things: Things) -> None:
    # Each ends when both have been asked to: one after the other they would be killed, which leaves no line.
    def ends(name: str) -> str:
        both = f"echo asked {name} >> {things.events}; until test $(grep -c asked {things.events}) = 2; do sleep 0.02; done"
        return f"trap '{both}; echo {name} ends >> {things.events}; exit' TERM; touch up; while :; do sleep 0.02; done"

    async with children.kept_running() as kept:
        kept.start(things.program("a", ends("a"), grace=30.0), things.program("b", ends("b"), grace=30.0))
        await kept.ready()
    assert sorted(line for line in things.happened() if line.endswith("ends")) == ["a ends", "b ends"]


async def test_what_dies_while_all_end_is_not_started_again(things: Things) -> None:
    async with children.kept_running() as kept:
        base = f"touch up; until grep -q 'top ends' {things.events}; do sleep 0.02; done; exit 1"
        kept.start(
            things.program("base", base),
            things.program("top", things.tells_its_end("top"), waits_for=("base",)),
        )
        await kept.ready()
    assert len(things.starts("base")) == 1


async def test_an_end_that_is_hastened_does_not_wait_for_the_grace(things: Things) -> None:
    hastened = asyncio.Event()
    deaf = "trap '' TERM; touch up; while :; do sleep 0.05; done"
    began = asyncio.get_running_loop().time()
    async with children.kept_running(hastened=hastened) as kept:
        kept.start(
            things.program("base", deaf, grace=120.0), things.program("top", deaf, grace=120.0, waits_for=("base",))
        )
        await kept.ready()
        pids = [running(child).pid for child in kept]
        asyncio.get_running_loop().call_later(0.2, hastened.set)
    assert asyncio.get_running_loop().time() - began < 60
    assert not any(map(alive, pids))


async def test_a_start_that_is_cancelled_leaves_no_process(things: Things) -> None:
    async def start() -> None:
        async with children.kept_running() as kept:
            kept.start(
                things.program("base"),
                things.program("never", "exec sleep 60", waits_for=("base",)),
                things.program("top", waits_for=("never",)),
            )
            await kept.ready()

    starting = asyncio.create_task(start())
    await until(lambda: len(things.starts("never")) == 1)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not any(map(alive, things.starts("base") + things.starts("never")))
    assert things.starts("top") == []


async def test_a_system_that_starts_no_process_for_a_while_costs_tries_only(
    things: Things, kept: children.Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = asyncio.create_subprocess_exec, 0

    async def refuse_some(*arguments: Any, **options: Any) -> asyncio.subprocess.Process:
        nonlocal calls
        calls += 1
        if calls in {2, 3}:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return await real(*arguments, **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", refuse_some)
    kept.start(things.program("thing"))
    await kept.ready()
    os.kill(running(kept["thing"]).pid, signal.SIGKILL)
    await until(lambda: calls == 4 and kept["thing"].current is not None)
    assert (len(things.starts("thing")), kept["thing"].restarts) == (2, 3)
    calls = 1
    with pytest.raises(errors.UnavailableError, match=r"^sh can't be started: Resource temporarily unavailable$"):
        await process.run(["sh", "-c", "exit"])


async def test_what_may_not_start_is_told_as_it_is(things: Things, kept: children.Children) -> None:
    def may_start() -> None:
        raise errors.FailedPreconditionError("nobody listens")

    kept.start(things.program("thing", may_start=may_start))
    with pytest.raises(errors.FailedPreconditionError, match="nobody listens"):
        await kept.ready()
    assert things.starts("thing") == []


async def test_mistakes_of_ours_reach_those_who_wait(things: Things, kept: children.Children) -> None:
    calls = 0

    def may_start() -> None:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise KeyError("a mistake")

    kept.start(things.program("thing", "touch up; sleep 0.1; exit 1", may_start=may_start))
    await kept.ready()
    with pytest.raises(KeyError):
        await asyncio.wait_for(kept.gave_up(), 30)


async def test_no_children_are_ready_and_never_give_up() -> None:
    async with children.kept_running() as kept:
        await kept.ready()
        assert kept.status() == []
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(kept.gave_up(), 0.05)
