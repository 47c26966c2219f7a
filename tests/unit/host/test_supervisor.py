"""One supervised child: when it is ready, how its death is told, as whom it runs."""

import asyncio
import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from nixlet import errors
from nixlet.host import supervisor


def program(directory: Path, script: str, **more: Any) -> supervisor.Program:
    async def ready() -> None:
        return

    return supervisor.Program(
        **{
            "name": "thing",
            "argv": ["sh", "-c", script],
            "env": dict(os.environ),
            "log_path": str(directory / "log"),
            "ready": ready,
            "ready_timeout": 10,
            **more,
        }
    )


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@contextlib.asynccontextmanager
async def supervised(described: supervisor.Program) -> AsyncIterator[supervisor.Supervised]:
    async with supervisor.started(described) as child:
        assert await child.answered()
        yield child


async def never() -> None:
    await asyncio.Event().wait()


async def test_a_supervised_child_is_ready_when_it_answers(tmp_path: Path) -> None:
    async def ready() -> None:
        while not (tmp_path / "answer").exists():
            await asyncio.sleep(0.01)

    script = f"echo starting; touch {tmp_path}/answer; exec sleep 60"
    async with supervised(
        program(
            tmp_path,
            script,
            ready=ready,
            ready_timeout=10,
        )
    ) as child:
        assert alive(child.pid)
    assert (tmp_path / "log").read_text() == "starting\n"


async def test_an_early_death_is_told_with_its_last_lines(tmp_path: Path) -> None:
    with pytest.raises(errors.CommandFailedError, match="status 7: no such config") as caught:
        async with supervised(
            program(
                tmp_path,
                "echo one; echo no such config; exit 7",
                ready=never,
                ready_timeout=10,
            )
        ):
            pass
    assert caught.value.output == "one\nno such config"


async def test_a_child_that_never_answers_is_told_and_ended(tmp_path: Path) -> None:
    with pytest.raises(errors.CommandFailedError, match=r"thing did not answer within 0\.3 s: waiting"):
        async with supervised(
            program(
                tmp_path,
                f"echo $$ > {tmp_path}/pid; echo waiting; exec sleep 60",
                ready=never,
                ready_timeout=0.3,
            )
        ):
            pass
    assert not alive(int((tmp_path / "pid").read_text()))


async def test_a_later_death_is_noticed(tmp_path: Path) -> None:
    async def ready() -> None:
        return

    async with supervised(
        program(
            tmp_path,
            "echo bye; sleep 0.1; exit 1",
            ready=ready,
            ready_timeout=10,
        )
    ) as child:
        error = await asyncio.wait_for(child.died(), 10)
    assert "bye" in str(error)


async def test_a_log_that_can_not_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    with pytest.raises(errors.FailedPreconditionError, match="log of thing can't be written"):
        async with supervised(program(tmp_path, "exec sleep 60")):
            pass


async def test_a_child_of_another_user_has_no_rights_of_ours(tmp_path: Path) -> None:
    async def ready() -> None:
        while "NoNewPrivs" not in (tmp_path / "log").read_text():
            await asyncio.sleep(0.01)

    script = (
        "grep -E '^(Uid|Gid|Groups|CapInh|CapPrm|CapEff|CapBnd|CapAmb|NoNewPrivs):' /proc/self/status; exec sleep 60"
    )
    async with supervised(program(tmp_path, script, user=(65534, 65533), ready=ready)) as child:
        said = dict(line.split(":", 1) for line in (tmp_path / "log").read_text().splitlines())
        assert said["Uid"].split() == ["65534"] * 4
        assert said["Gid"].split() == ["65533"] * 4
        assert said["Groups"].split() == []
        sets = {kind: int(said[kind], 16) for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}
        assert sets == dict.fromkeys(sets, 0)
        assert said["NoNewPrivs"].strip() == "1"
        assert alive(child.pid)


def test_a_child_of_another_user_ends_with_us_all_the_same() -> None:
    """The kernel forgets whom a process is to end with when its user changes."""
    script = """
import asyncio, os, signal
from nixlet.host import process

async def main():
    async with process.start(["sleep", "60"], user=(65534, 65533)) as child:
        while os.readlink(f"/proc/{child.pid}/exe").rpartition("/")[2] in {"setpriv", "sh", "dash", "bash"}:
            await asyncio.sleep(0.01)
        assert os.stat(f"/proc/{child.pid}").st_uid == 65534
        print(child.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    deadline = time.monotonic() + 30
    # Whoever takes orphans up may be slow to bury them.
    while alive(int(done.stdout)) and "Z" not in Path(f"/proc/{int(done.stdout)}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_delays_double_up_to_a_limit() -> None:
    policy = supervisor.RestartPolicy(first_delay=1.0, longest_delay=10.0)
    assert [policy.delay(failures) for failures in range(1, 7)] == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0]


def test_pauses_double_up_to_a_limit_however_often() -> None:
    policy = supervisor.RestartPolicy(pause=300.0, longest_pause=3600.0)
    assert [policy.pause_after(times) for times in (1, 2, 3, 4, 5, 100_000)] == [
        300.0,
        600.0,
        1200.0,
        2400.0,
        3600.0,
        3600.0,
    ]


@contextlib.contextmanager
def ended_afterwards(pids: Path) -> Iterator[None]:
    """Ends the processes that a script has written down there."""
    try:
        yield
    finally:
        for pid in pids.read_text().split():
            os.kill(int(pid), signal.SIGKILL)


async def test_a_grandchild_that_holds_the_output_neither_hides_the_end_nor_keeps_the_pipe(tmp_path: Path) -> None:
    holders = tmp_path / "holders"
    held = len(os.listdir("/proc/self/fd"))
    with ended_afterwards(holders):
        for _ in range(3):
            script = f"sleep 300 & echo $! >> {holders}; sleep 0.1; echo bye; exit 3"
            async with supervised(program(tmp_path, script)) as child:
                error = await asyncio.wait_for(child.died(), 30)
            assert (error.returncode, error.output) == (3, "bye")
        # What a loop opens at its first child it may keep.
        assert len(os.listdir("/proc/self/fd")) < held + 3


async def test_a_grandchild_that_holds_the_output_does_not_hold_up_the_end(tmp_path: Path) -> None:
    holders = tmp_path / "holders"
    with ended_afterwards(holders):
        script = f"sleep 300 & echo $! >> {holders}; touch {tmp_path}/up; exec sleep 60"

        async def ready() -> None:
            while not (tmp_path / "up").exists():
                await asyncio.sleep(0.01)

        async with asyncio.timeout(30), supervised(program(tmp_path, script, ready=ready)) as child:
            pid = child.pid
        assert not alive(pid)


async def test_a_flood_of_output_is_logged_whole(tmp_path: Path) -> None:
    async with supervisor.started(program(tmp_path, "seq 200000; echo end; exit 1")) as child:
        error = await asyncio.wait_for(child.died(), 30)
    assert (tmp_path / "log").read_text() == "".join(f"{number}\n" for number in range(1, 200_001)) + "end\n"
    assert error.output.splitlines()[-2:] == ["200000", "end"]


async def test_all_that_a_child_prints_comes_in_its_order(tmp_path: Path) -> None:
    async with supervisor.started(
        program(tmp_path, "for i in 1 2 3; do echo $i; echo bad $i >&2; done; exit 1")
    ) as child:
        await asyncio.wait_for(child.died(), 30)
    assert (tmp_path / "log").read_text() == "1\nbad 1\n2\nbad 2\n3\nbad 3\n"


async def test_a_system_that_has_no_pipe_left_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pipe", mock.Mock(side_effect=OSError(errno.EMFILE, os.strerror(errno.EMFILE))))
    with pytest.raises(errors.UnavailableError, match=r"^thing can't be started: Too many open files$") as caught:
        async with supervised(program(tmp_path, "exec sleep 60")):
            pass
    assert "ulimit -n" in caught.value.hint


async def test_a_check_that_ends_cancelled_is_a_failure(tmp_path: Path) -> None:
    async def ready() -> None:
        raise asyncio.CancelledError

    with pytest.raises(
        errors.CommandFailedError, match=r"^thing may be ready or not, since what asks it was cancelled"
    ):
        async with supervised(program(tmp_path, "exec sleep 60", ready=ready)):
            pass


async def test_a_check_that_says_never_is_told(tmp_path: Path) -> None:
    async def ready() -> None:
        raise errors.FailedPreconditionError("it has no plugin")

    with pytest.raises(errors.FailedPreconditionError, match="it has no plugin"):
        async with supervised(program(tmp_path, "exec sleep 60", ready=ready)):
            pass


async def test_what_is_not_to_go_on_is_not_waited_for(tmp_path: Path) -> None:
    lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    async with supervisor.started(program(tmp_path, "exec sleep 60", ready=never, ready_timeout=600)) as child:
        asyncio.get_running_loop().call_later(0.05, lost.set_result, None)
        assert not await asyncio.wait_for(child.answered([lost]), 30)
        assert not child.has_ended
    assert child.has_ended


async def test_words_of_a_child_are_cut_and_steer_no_terminal(tmp_path: Path) -> None:
    coloured = r"printf '\033[31mfirst\033[0m\tline\nlast \033]0;title\007words \001 here\n'; "
    for script, ended in (
        (f"{coloured} exit 1", "thing ended with status 1"),
        (f"{coloured} exec sleep 60", "thing did not answer within 1 s"),
    ):
        with pytest.raises(errors.CommandFailedError) as caught:
            async with supervised(program(tmp_path, script, ready=never, ready_timeout=1)):
                pass
        assert caught.value.message == f"{ended}: last words here"
        assert caught.value.output == "first   line\nlast words  here"
    long = "head -c 9000 /dev/zero | tr '\\0' x"
    for script in (f"{long}; exit 1", f"{long}; exec sleep 60"):
        argv = ["sh", "-c", script, "y" * 5000]
        with pytest.raises(errors.CommandFailedError) as caught:
            async with supervised(program(tmp_path, script, argv=argv, ready=never, ready_timeout=1)):
                pass
        assert caught.value.message.endswith(f": {'x' * 300} …")
        assert len(caught.value.output) == 2000
        assert len(caught.value.hint) < 1000
        assert caught.value.hint.endswith(f"its log is {tmp_path}/log")


async def test_an_owner_that_is_cancelled_again_and_again_leaves_no_process(tmp_path: Path) -> None:
    pids: list[int] = []

    async def own() -> None:
        deaf = f"trap 'echo >> {tmp_path}/asked' TERM; touch {tmp_path}/deaf; while :; do sleep 0.05; done"

        async def ready() -> None:
            while not (tmp_path / "deaf").exists():
                await asyncio.sleep(0.01)

        async with supervised(program(tmp_path, deaf, grace=1.0, ready=ready)) as child:
            pids.append(child.pid)

    owner = asyncio.create_task(own())
    while not pids:
        await asyncio.sleep(0.01)
    for _ in range(3):
        owner.cancel()
        await asyncio.sleep(0.05)
    with pytest.raises(asyncio.CancelledError):
        await owner
    assert not alive(pids[0])
    assert (tmp_path / "asked").read_text() == "\n"


async def test_the_end_of_all_output_is_waited_for_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_LAST_WORDS", 1000.0)
    described = program(tmp_path, "(sleep 0.3; echo bye) & exit 1")
    async with asyncio.timeout(30), supervisor.started(described) as child:
        assert (await child.died()).output == "bye"


async def test_a_child_that_has_ended_is_not_ready_whoever_answers_and_holds_its_output(tmp_path: Path) -> None:
    holders = tmp_path / "holders"
    with ended_afterwards(holders):
        script = f"sleep 300 & echo $! >> {holders}; echo address in use; exit 5"
        ended = asyncio.Event()
        async with supervisor.started(program(tmp_path, script, ready=ended.wait)) as child:
            answering = asyncio.create_task(child.answered())
            while not child.has_ended:
                await asyncio.sleep(0)
            # Its last words are still waited for.
            ended.set()
            with pytest.raises(errors.CommandFailedError, match=r"^thing ended with status 5: address in use$"):
                await asyncio.wait_for(answering, 30)


@pytest.mark.parametrize(
    ("lack", "words", "hint"),
    [
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "Too many open files", "LimitNOFILE"),
        (RuntimeError("can't start new thread"), "no further thread can be started", "TasksMax"),
    ],
)
async def test_what_the_system_lacks_is_told_as_that(tmp_path: Path, lack: Exception, words: str, hint: str) -> None:
    def may_start() -> None:
        raise lack

    async def ready() -> None:
        raise lack

    with pytest.raises(errors.UnavailableError, match=f"^thing can't be started: {words}$") as caught:
        async with supervised(program(tmp_path, "exec sleep 60", may_start=may_start)):
            pass
    assert hint in caught.value.hint
    said = rf"^thing may be ready or not, since it can't be asked \({words}\): it printed nothing$"
    with pytest.raises(errors.CommandFailedError, match=said):
        async with supervised(program(tmp_path, "exec sleep 60", ready=ready)):
            pass


async def test_another_error_of_a_question_is_a_mistake_of_ours(tmp_path: Path) -> None:
    def may_start() -> None:
        raise RuntimeError("a mistake")

    async def ready() -> None:
        raise RuntimeError("a mistake")

    for mistake in ({"may_start": may_start}, {"ready": ready}):
        with pytest.raises(RuntimeError, match="a mistake"):
            async with supervised(program(tmp_path, "exec sleep 60", **mistake)):
                pass


async def test_who_had_to_be_killed_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hastened = asyncio.Event()
    deaf = f"trap '' TERM; touch {tmp_path}/deaf; while :; do sleep 0.05; done"

    async def ready() -> None:
        while not (tmp_path / "deaf").exists():
            await asyncio.sleep(0.01)

    def told() -> list[str]:
        # (asyncio itself may complain that subprocess, which looks before it sends a signal, was told of the end before it)
        ours = [each for each in caplog.records if each.name.startswith("nixlet.")]
        return [each.getMessage() for each in ours if each.levelname == "WARNING"]

    async with supervised(program(tmp_path, "exec sleep 60")):
        pass
    assert told() == []
    async with supervised(program(tmp_path, deaf, grace=0.1, ready=ready)):
        pass
    async with supervisor.started(program(tmp_path, deaf, grace=600, ready=ready), hastened=hastened) as child:
        assert await child.answered()
        hastened.set()
    assert told() == [
        "thing did not end within 0.1 s and was killed",
        "thing is killed, since the end is hastened",
    ]


async def test_a_logs_directory_that_is_gone_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "of" / "log"
    async with supervisor.started(program(tmp_path, "echo there; exit 1", log_path=str(path))) as child:
        await asyncio.wait_for(child.died(), 30)
    assert path.read_text() == "there\n"
    assert path.parent.stat().st_mode & 0o777 == 0o700


async def test_why_it_has_ended_is_said_first(tmp_path: Path) -> None:
    """Also where what it printed last says nothing of it."""
    script = "echo disk full; for i in 1 2 3; do echo goroutine $i; done; exit 2"
    described = program(tmp_path, script, ready=never, cause=lambda said: "it is full" if "disk full" in said else "")
    async with supervisor.started(described) as child:
        with pytest.raises(errors.CommandFailedError) as caught:
            await child.answered()
    assert caught.value.message == "it is full: thing ended with status 2: goroutine 3"
