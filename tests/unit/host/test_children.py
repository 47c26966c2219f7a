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
from nixlet.host import children, keptchild, process, supervisor

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


def running(child: keptchild.Child) -> supervisor.Supervised:
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
    assert [child.restarts for child in kept] == [0] * 4
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
        ({"a": (), "b c": ()}, "'b c' is no name for a child"),
        ({"a": (), "node/b": ()}, "'node/b' is no name for a child"),
        ({"a": (), "-b": ()}, "'-b' is no name for a child"),
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


async def test_the_absence_of_one_further_down_excuses_though_those_between_live_on(
    things: Things, kept: children.Children
) -> None:
    store = things.directory / "store"
    needs = f"touch up; while test -e {store}/up; do sleep 0.02; done; echo lease lost; exit 1"
    never = msgspec.structs.replace(QUICK, tries=0)
    kept.start(
        things.program("store", "test -e once && until test -e go; do sleep 0.02; done; touch once up; exec sleep 60"),
        things.program("server", waits_for=("store",)),
        things.program("needs", needs, waits_for=("server",), restart=never),
        things.program("above", waits_for=("needs", "server")),
    )
    await kept.ready()
    above = [each.name for each in kept["above"].others]
    assert above == ["store", "server", "needs"]
    os.kill(running(kept["store"]).pid, signal.SIGKILL)
    await until(lambda: kept["needs"].state in {"waiting", "gave up"})
    with pytest.raises(errors.UnavailableError, match=r"^needs is not running: it waits for store$"):
        kept["needs"].check()
    (store / "go").touch()
    await until(lambda: kept["needs"].state == "ready")
    assert [len(things.starts(name)) for name in ("store", "server", "needs", "above")] == [2, 1, 2, 1]
    assert [child.restarts for child in kept] == [1, 0, 1, 0]


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


@pytest.mark.parametrize("tries", [3, 0])
async def test_what_dies_while_all_end_is_told_and_not_started_again(
    things: Things, caplog: pytest.LogCaptureFixture, tries: int
) -> None:
    told: list[str] = []
    async with children.kept_running(tell=told.append) as kept:
        base = f"touch up; until grep -q asked {things.events}; do sleep 0.02; done; echo torn; exit 1"
        outlives = "while kill -0 $(cat ../base/starts); do sleep 0.02; done; sleep 0.5; exit 0"
        kept.start(
            things.program("base", base, restart=msgspec.structs.replace(QUICK, tries=tries)),
            things.program(
                "top",
                f"trap 'echo asked >> {things.events}; {outlives}' TERM; touch up; while :; do sleep 0.02; done",
                waits_for=("base",),
                grace=60.0,
            ),
        )
        await kept.ready()
    assert len(things.starts("base")) == 1
    (record,) = [each for each in caplog.records if "started again" in each.getMessage()]
    assert record.getMessage() == "base is not started again, since the node ends: base ended with status 1: torn"
    assert vars(record)["output"] == "torn"
    assert told[-1] == "2 of 2 children are ready"


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
    loop = asyncio.get_running_loop()
    real, calls = loop.subprocess_exec, 0

    async def refuse_some(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls in {2, 3}:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return await real(*arguments, **options)

    monkeypatch.setattr(loop, "subprocess_exec", refuse_some)
    kept.start(things.program("thing"))
    await kept.ready()
    os.kill(running(kept["thing"]).pid, signal.SIGKILL)
    await until(lambda: calls == 4 and kept["thing"].current is not None)
    # A try that never became a process is told all the same.
    assert (len(things.starts("thing")), kept["thing"].restarts) == (2, 3)
    calls = 1
    with pytest.raises(errors.UnavailableError, match=r"^sh can't be started: Resource temporarily unavailable$"):
        await process.run(["sh", "-c", "exit"])


@pytest.mark.parametrize("where", ["may_start", "ready"])
async def test_a_system_that_lacks_something_for_a_while_costs_tries_only(
    things: Things, kept: children.Children, where: str
) -> None:
    described = things.program("thing")
    calls = {"may_start": 0, "ready": 0}

    def lacks(step: str) -> None:
        calls[step] += 1
        if step == where and calls[step] in {2, 3}:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def may_start() -> None:
        described.may_start()
        lacks("may_start")

    async def ready() -> None:
        await described.ready()
        lacks("ready")

    kept.start(msgspec.structs.replace(described, may_start=may_start, ready=ready))
    await kept.ready()
    os.kill(running(kept["thing"]).pid, signal.SIGKILL)
    await until(lambda: calls[where] == 4 and kept["thing"].current is not None)
    assert kept["thing"].restarts == 3
    assert "Too many open files" in kept["thing"].status().failure
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(kept.gave_up(), 0.05)


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
    await until(lambda: kept["thing"].state == "gave up")
    assert kept["thing"].status().failure == (
        "thing is not kept running because of a mistake in nixlet: KeyError('a mistake')"
    )
    assert kept["thing"].pid == 0


@pytest.mark.parametrize("mistake", [KeyError("a mistake"), asyncio.CancelledError()])
async def test_a_mistake_of_ours_before_a_first_start_reaches_those_who_wait_for_another(
    things: Things, kept: children.Children, mistake: BaseException
) -> None:
    def may_start() -> None:
        raise mistake

    kept.start(things.program("thing", may_start=may_start), things.program("top", waits_for=("thing",)))
    with pytest.raises((KeyError, RuntimeError)):
        await asyncio.wait_for(kept.ready("top"), 30)
    assert (kept["thing"].state, kept["top"].state) == ("gave up", "waiting")


async def test_no_children_are_ready_and_never_give_up() -> None:
    async with children.kept_running() as kept:
        await kept.ready()
        assert kept.status() == []
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(kept.gave_up(), 0.05)


async def test_an_owner_that_is_cancelled_while_children_end_waits_for_them(things: Things) -> None:
    pids: list[int] = []

    async def own() -> None:
        async with children.kept_running() as kept:
            kept.start(things.program("deaf", "trap '' TERM; touch up; while :; do sleep 0.05; done", grace=1.0))
            await kept.ready()
            pids.append(running(kept["deaf"]).pid)

    owner = asyncio.create_task(own())
    await until(lambda: pids != [])
    for _ in range(3):
        owner.cancel()
        await asyncio.sleep(0.05)
    with pytest.raises(asyncio.CancelledError):
        await owner
    assert not alive(pids[0])


async def test_who_waits_for_all_learns_that_one_is_given_up_after_it_was_ready(
    things: Things, kept: children.Children
) -> None:
    kept.start(
        things.program("base", "touch up; sleep 0.2; exit 1"),
        things.program("slow", "exec sleep 60"),
        things.program("top", waits_for=("base", "slow")),
    )
    with pytest.raises(errors.CommandFailedError, match="base failed 4 times"):
        await asyncio.wait_for(kept.ready(), 30)


async def test_who_waits_for_one_learns_that_another_is_in_its_way(things: Things, kept: children.Children) -> None:
    long = msgspec.structs.replace(QUICK, tries=0)
    kept.start(
        things.program(
            "base", "touch up; until test -e go; do sleep 0.02; done; exit 3", essential=False, restart=long
        ),
        things.program("never", "exec sleep 60", waits_for=("base",)),
        things.program("middle", waits_for=("base", "never")),
        things.program("top", waits_for=("middle",)),
        things.program("aside"),
    )
    waiting = asyncio.create_task(kept.ready("top"))
    await until(lambda: things.starts("never") != [])
    await kept.ready("aside")
    assert not waiting.done()
    (things.directory / "base/go").touch()
    with pytest.raises(errors.CommandFailedError, match=r"^base ended with status 3: it printed nothing$"):
        await asyncio.wait_for(waiting, 30)
    # Who started before may still become ready.
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(kept.ready("never"), 0.1)
    # Others have nothing to do with it, and the node goes on.
    await asyncio.wait_for(kept.ready("aside", "base"), 30)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(kept.gave_up(), 0.1)


async def test_who_waits_learns_that_all_end(things: Things) -> None:
    async with children.kept_running() as kept:
        kept.start(things.program("never", "exec sleep 60"))
        waiting = asyncio.create_task(kept.ready())
        giving_up = asyncio.create_task(kept.gave_up())
        await until(lambda: things.starts("never") != [])
    with pytest.raises(asyncio.CancelledError):
        await giving_up
    with pytest.raises(errors.UnavailableError, match="the node ends"):
        await asyncio.wait_for(waiting, 30)


async def test_what_is_not_essential_is_told_at_its_first_failure_and_tried_again(
    things: Things, kept: children.Children, caplog: pytest.LogCaptureFixture
) -> None:
    kept.start(
        things.program(
            "extra", f"test -e again || {{ touch again; echo one; echo no disk; exit 7; }}; {STAYS}", essential=False
        ),
        things.program("slow", "exec sleep 60"),
        things.program("top", waits_for=("extra", "slow")),
    )
    with pytest.raises(errors.CommandFailedError) as caught:
        await kept.ready("extra")
    assert caught.value.message == "extra ended with status 7: no disk"
    assert caught.value.output == "one\nno disk"
    await until(lambda: kept["extra"].state == "ready")
    await asyncio.wait_for(kept.ready("extra"), 30)
    # It is in nobody's way any more.
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(kept.ready("top"), 0.1)
    assert len(things.starts("extra")) == 2
    (told,) = [each for each in caplog.records if each.levelname == "ERROR"]
    assert told.getMessage() == "extra is started again in 0.01 s: extra ended with status 7: no disk"
    assert vars(told)["output"] == "one\nno disk"


async def test_what_is_not_essential_is_given_up_without_the_node_and_tried_after_ever_longer_pauses(
    things: Things, kept: children.Children, caplog: pytest.LogCaptureFixture
) -> None:
    policy = supervisor.RestartPolicy(tries=1, first_delay=0.01, pause=0.1, longest_pause=0.3)
    script = f"test -e well && {{ {STAYS}; }}; touch up; sleep 0.05; echo no quorum; exit 2"
    kept.start(
        things.program("extra", script, essential=False, restart=policy),
        things.program("node"),
        things.program("later", waits_for=("extra",)),
    )
    extra = kept["extra"]
    await until(lambda: extra.state == "gave up")
    status = extra.status()
    assert (status.pid, status.failure) == (0, "extra ended with status 2: no quorum")
    with pytest.raises(errors.UnavailableError, match=r"^extra is not running: extra ended with status 2: no quorum$"):
        extra.check()

    def told() -> list[str]:
        words = [each.getMessage() for each in caplog.records if each.getMessage().startswith("extra ")]
        return [each.partition(": ")[0] for each in words if "once more" in each]

    await until(lambda: len(told()) >= 4)
    assert told()[:4] == [
        f"extra is given up, and tried once more in {pause} s" for pause in ("0.1", "0.2", "0.3", "0.3")
    ]
    # One start for each pause, beside the first one and its try.
    assert len(things.starts("extra")) in {5, 6}
    assert kept["node"].restarts == 0
    (things.directory / "extra/well").touch()
    await until(lambda: extra.state == "ready" and kept["later"].state == "ready")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(kept.gave_up(), 0.1)


async def test_what_was_given_up_and_is_well_again_has_all_its_tries_and_short_pauses(
    things: Things, kept: children.Children, caplog: pytest.LogCaptureFixture
) -> None:
    policy = supervisor.RestartPolicy(tries=1, first_delay=0.01, pause=0.02, longest_pause=100, stable_after=0.5)
    # Its first four starts end at once; the fifth stays until it may end, and all further ones end at once again.
    script = "touch up; test $(wc -l < starts) = 5 && until test -e go; do sleep 0.02; done; sleep 0.05; exit 2"
    kept.start(things.program("extra", script, essential=False, restart=policy))
    await until(lambda: len(things.starts("extra")) == 5 and kept["extra"].state == "ready")
    await asyncio.sleep(1)
    (things.directory / "extra/go").touch()
    await until(lambda: sum("once more" in each.getMessage() for each in caplog.records) == 4)
    told = [each.getMessage().partition(": ")[0].partition(" in ")[2] for each in caplog.records]
    assert [each for each in told if each][:6] == ["0.01 s", "0.02 s", "0.04 s", "0.08 s", "0.01 s", "0.02 s"]


async def test_a_child_falls_with_another_also_while_it_starts(things: Things, kept: children.Children) -> None:
    # Only its second start becomes ready.
    script = f"test -e again || {{ touch again; exec sleep 60; }}; {STAYS}"
    kept.start(things.program("base"), things.program("top", script, waits_for=("base",), falls_with=("base",)))
    await until((things.directory / "top/again").exists)
    first = things.starts("top")[0]
    await until(lambda: kept["top"].status().pid == first)
    os.kill(running(kept["base"]).pid, signal.SIGKILL)
    await asyncio.wait_for(kept.ready(), 30)
    await until(lambda: kept["top"].state == "ready" and kept["base"].state == "ready")
    assert (len(things.starts("top")), len(things.starts("base"))) == (2, 2)
    assert not alive(first)
    assert kept["top"].status().failure == "top can't go on without base, which has ended"


async def test_a_child_that_has_to_fall_is_stopping_until_its_process_has_ended(
    things: Things, kept: children.Children
) -> None:
    asked = things.directory / "asked"
    slow = f"trap 'echo >> {asked}; until test -e go; do sleep 0.02; done; exit 0' TERM; touch up; while :; do sleep 0.02; done"
    # That is nobody's failure, also when the other one has long been back by then.
    never = supervisor.RestartPolicy(tries=0, first_delay=0.01, stable_after=0.2)
    kept.start(
        things.program("base"),
        things.program("falls", slow, waits_for=("base",), falls_with=("base",), grace=60.0, restart=never),
    )
    await kept.ready()
    pid = running(kept["falls"]).pid
    os.kill(running(kept["base"]).pid, signal.SIGKILL)
    await until(asked.exists)
    status = kept["falls"].status()
    assert (status.state, status.pid, alive(pid)) == ("stopping", pid, True)
    with pytest.raises(errors.UnavailableError, match=r"^falls is being stopped: falls can't go on without base"):
        kept["falls"].check()
    await until(lambda: kept["base"].state == "ready")
    await asyncio.sleep(0.5)
    (things.directory / "falls/go").touch()
    await until(lambda: kept["falls"].state == "gave up" or len(things.starts("falls")) == 2)
    await until(lambda: kept["falls"].state in {"gave up", "ready"})
    assert kept["falls"].state == "ready"
    assert asked.read_text() == "\n"


async def test_a_child_that_is_falling_is_not_asked_again_when_all_end(things: Things) -> None:
    asked = things.directory / "asked"
    slow = f"trap 'echo >> {asked}' TERM; touch up; until test -e go; do sleep 0.02; done"
    async with children.kept_running() as kept:
        kept.start(
            things.program("base"), things.program("falls", slow, waits_for=("base",), falls_with=("base",), grace=60.0)
        )
        await kept.ready()
        pid = running(kept["falls"]).pid
        os.kill(running(kept["base"]).pid, signal.SIGKILL)
        await until(asked.exists)
        closing = asyncio.create_task(kept.close())
        await asyncio.sleep(0.3)
        assert (kept["falls"].state, kept["falls"].pid, closing.done()) == ("stopping", pid, False)
        (things.directory / "falls/go").touch()
        await closing
        assert asked.read_text() == "\n"
        assert not alive(pid)
        assert [child.state for child in kept] == ["stopped"] * 2
    assert len(things.starts("falls")) == 1


async def test_a_child_is_stopping_while_all_end(things: Things) -> None:
    asked = things.directory / "asked"
    slow = f"trap 'touch {asked}' TERM; touch up; until test -e go; do sleep 0.02; done"
    async with children.kept_running() as kept:
        kept.start(things.program("slow", slow, grace=60.0))
        await kept.ready()
        pid = kept["slow"].pid
        closing = asyncio.create_task(kept.close())
        await until(asked.exists)
        assert (kept["slow"].status().state, kept["slow"].status().pid) == ("stopping", pid)
        (things.directory / "slow/go").touch()
        await closing
        with pytest.raises(errors.UnavailableError, match=r"^slow is not running: it was stopped$"):
            kept["slow"].check()
        assert kept["slow"].pid == 0


async def test_an_end_with_another_gives_the_tries_back_of_who_was_up_for_long(
    things: Things, kept: children.Children
) -> None:
    # It fails at its first start after which it was ready, stays, falls with the other, and fails once more.
    script = "touch up; case $(wc -l < starts) in 1|3) sleep 0.05; exit 1;; *) exec sleep 60;; esac"
    once = supervisor.RestartPolicy(tries=1, first_delay=0.01, stable_after=0.5)
    kept.start(
        things.program("base"),
        things.program("needs", script, waits_for=("base",), falls_with=("base",), restart=once),
    )
    await until(lambda: len(things.starts("needs")) == 2 and kept["needs"].state == "ready")
    await asyncio.sleep(1)
    os.kill(running(kept["base"]).pid, signal.SIGKILL)
    await until(lambda: kept["needs"].state == "gave up" or len(things.starts("needs")) == 4)
    assert kept["needs"].state != "gave up"


async def test_a_fall_of_long_ago_excuses_nothing(things: Things, kept: children.Children) -> None:
    never = supervisor.RestartPolicy(tries=0, stable_after=0.2)
    script = "touch up; until test -e crash; do sleep 0.02; done; exit 9"
    kept.start(things.program("base"), things.program("needs", script, waits_for=("base",), restart=never))
    await kept.ready()
    os.kill(running(kept["base"]).pid, signal.SIGKILL)
    await until(lambda: kept["base"].restarts == 1 and kept["base"].state == "ready")
    await asyncio.sleep(1)
    (things.directory / "needs/crash").touch()
    error = await asyncio.wait_for(kept.gave_up(), 30)
    assert error.message.startswith("needs ended with status 9")
    assert len(things.starts("needs")) == 1


async def test_another_one_that_is_there_and_was_all_the_time_excuses_nothing(
    things: Things, kept: children.Children
) -> None:
    kept.start(things.program("base"), things.program("needs", "echo no key; exit 7", waits_for=("base",)))
    with pytest.raises(errors.CommandFailedError, match=r"^needs ended with status 7: no key$"):
        await asyncio.wait_for(kept.ready(), 30)
    assert len(things.starts("needs")) == 1


async def test_a_fall_that_nobody_was_told_of_yet_excuses_an_end(things: Things, kept: children.Children) -> None:
    never = supervisor.RestartPolicy(tries=0, first_delay=0.01)
    # Somebody holds its output, so that its last words are waited for, while the other sees its end at once.
    base = "sleep 300 & echo $! >> holders; echo $$ > pid; " + STAYS
    needs = "touch up; while kill -0 $(cat ../base/pid); do sleep 0.01; done; exit 1"
    kept.start(things.program("base", base), things.program("needs", needs, waits_for=("base",), restart=never))
    try:
        await kept.ready()
        os.kill(running(kept["base"]).pid, signal.SIGKILL)
        await until(lambda: kept["needs"].state == "gave up" or len(things.starts("needs")) == 2)
        assert kept["needs"].state != "gave up"
    finally:
        for pid in (things.directory / "base/holders").read_text().split():
            os.kill(int(pid), signal.SIGKILL)


async def test_a_fall_of_a_moment_ago_excuses_an_end(things: Things, kept: children.Children) -> None:
    never = supervisor.RestartPolicy(tries=0, first_delay=0.01)
    script = "touch up; test -e crash && exec sleep 60; until test -e crash; do sleep 0.02; done; exit 9"
    kept.start(things.program("base"), things.program("needs", script, waits_for=("base",), restart=never))
    await kept.ready()
    os.kill(running(kept["base"]).pid, signal.SIGKILL)
    await until(lambda: kept["base"].restarts == 1 and kept["base"].state == "ready")
    (things.directory / "needs/crash").touch()
    await until(lambda: kept["needs"].state == "gave up" or len(things.starts("needs")) == 2)
    assert kept["needs"].state != "gave up"


async def test_what_is_said_of_a_child_is_what_it_does(things: Things, kept: children.Children) -> None:
    kept.start(
        things.program(
            "base", "test -e once && exec sleep 60; touch once up; until test -e die; do sleep 0.02; done; exit 5"
        ),
        things.program("top", waits_for=("base",)),
        things.program("last", waits_for=("base", "top")),
    )
    await kept.ready()
    for child in kept:
        child.check()
    (things.directory / "base/die").touch()
    await until(lambda: kept["base"].state == "starting" and len(things.starts("base")) == 2)
    os.kill(running(kept["top"]).pid, signal.SIGKILL)
    await until(lambda: kept["top"].state == "waiting")
    with pytest.raises(errors.UnavailableError) as said:
        kept["base"].check()
    assert said.value.message == (
        "base is being started and is not ready yet; before that, base ended with status 5: it printed nothing"
    )
    with pytest.raises(errors.UnavailableError, match=r"^top is not running: it waits for base$"):
        kept["top"].check()
    kept.start(things.program("first", "exec sleep 60"))
    for is_there in (False, True):
        await until(lambda there=is_there: (kept["first"].pid != 0) == there)  # type: ignore[misc]  # bound here
        with pytest.raises(errors.UnavailableError, match=r"^first is being started and is not ready yet$"):
            kept["first"].check()
    assert kept["first"].restarts == 0


async def test_an_end_with_another_is_no_reason_to_give_up_once_more(
    things: Things, kept: children.Children, caplog: pytest.LogCaptureFixture
) -> None:
    policy = supervisor.RestartPolicy(tries=0, first_delay=0.01, pause=0.02)
    script = f"test $(wc -l < starts) = 1 && exit 1; {STAYS}"
    kept.start(
        things.program("base"),
        things.program("extra", script, waits_for=("base",), falls_with=("base",), essential=False, restart=policy),
    )
    await until(lambda: kept["extra"].state == "ready")
    os.kill(running(kept["base"]).pid, signal.SIGKILL)
    await until(lambda: len(things.starts("extra")) == 3 and kept["extra"].state == "ready")
    assert sum("once more" in each.getMessage() for each in caplog.records) == 1
