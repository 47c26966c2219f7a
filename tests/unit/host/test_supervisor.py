"""One supervised child: when it is ready, how its death is told, as whom it runs."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

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


async def never() -> None:
    await asyncio.Event().wait()


async def test_a_supervised_child_is_ready_when_it_answers(tmp_path: Path) -> None:
    async def ready() -> None:
        while not (tmp_path / "answer").exists():
            await asyncio.sleep(0.01)

    script = f"echo starting; touch {tmp_path}/answer; exec sleep 60"
    async with supervisor.supervise(
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
        async with supervisor.supervise(
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
        async with supervisor.supervise(
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

    async with supervisor.supervise(
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
        async with supervisor.supervise(program(tmp_path, "exec sleep 60")):
            pass


async def test_a_child_of_another_user_has_no_rights_of_ours(tmp_path: Path) -> None:
    async def ready() -> None:
        while "CapEff" not in (tmp_path / "log").read_text():
            await asyncio.sleep(0.01)

    script = "grep -E '^(Uid|Gid|Groups|CapPrm|CapEff):' /proc/self/status; exec sleep 60"
    async with supervisor.supervise(program(tmp_path, script, user=(65534, 65533), ready=ready)) as child:
        said = dict(line.split(":", 1) for line in (tmp_path / "log").read_text().splitlines())
        assert said["Uid"].split() == ["65534"] * 4
        assert said["Gid"].split() == ["65533"] * 4
        assert said["Groups"].split() == []
        assert (int(said["CapPrm"], 16), int(said["CapEff"], 16)) == (0, 0)
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
