"""Starting programs: what they print, how they end, that nothing stays behind."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.host import process


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_output_and_status_are_kept() -> None:
    done = await process.run(["sh", "-c", "cat; echo bad >&2; exit 3"], stdin=b"in")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"in", b"bad\n")
    with pytest.raises(errors.CommandFailedError, match="sh ended with status 3: bad") as caught:
        done.check()
    assert caught.value.returncode == 3


@pytest.mark.parametrize("how", ["child", "-m", "console script"])
async def test_no_module_comes_from_where_we_happen_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    for name in ("nixlet", "click", "json", "uvloop", "msgspec"):
        (tmp_path / f"{name}.py").write_text("open('/proc/self/cwd/imported', 'a').write(__name__)")
    monkeypatch.chdir(tmp_path)
    if how == "child":
        argv = process.python("nixlet", "version")
    elif how == "-m":
        # What -m itself imports is Python's own business; it is told where nixlet is.
        (tmp_path / "nixlet.py").unlink()
        argv = [sys.executable, "-m", "nixlet", "version"]
    else:
        # As pip makes them, in a directory that others can write to.
        script = tmp_path / "nixlet"
        script.write_text("import sys\nfrom nixlet.__main__ import main\nsys.exit(main())\n")
        (tmp_path / "nixlet.py").unlink()
        argv = [sys.executable, str(script), "version"]
    done = await process.run(argv)
    assert done.stdout.startswith(b"nixlet "), done.stderr
    assert not (tmp_path / "imported").exists()


async def test_a_signal_is_named() -> None:
    done = await process.run(["sh", "-c", "kill -TERM $$"])
    with pytest.raises(errors.CommandFailedError, match="sh was ended by SIGTERM"):
        done.check()


async def test_a_missing_program_is_named() -> None:
    with pytest.raises(errors.UnavailableError, match="no-such-program is not installed"):
        await process.run(["no-such-program"])


async def test_the_time_limit_kills() -> None:
    with pytest.raises(errors.CommandFailedError, match=r"did not end within 0\.2 s"):
        await process.run(["sleep", "60"], timeout=0.2)


async def test_leaving_the_context_ends_the_program() -> None:
    async with process.start(["sleep", "60"]) as child:
        assert alive(child.pid)
    assert not alive(child.pid)


async def test_a_program_that_ignores_sigterm_is_killed() -> None:
    async with process.start(
        ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1; done"], stdout=process.PIPE, grace=0.2
    ) as child:
        assert child.stdout is not None
        await child.stdout.readline()
    assert child.returncode == -signal.SIGKILL


async def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    program = tmp_path / "parent.py"
    program.write_text(
        "import asyncio\n"
        "from nixlet.host import process\n"
        "async def main():\n"
        "    async with process.start(['sleep', '60']) as child:\n"
        "        print(child.pid, flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    async with process.start([sys.executable, str(program)], stdout=process.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(await parent.stdout.readline())
        assert alive(pid)
        parent.send_signal(signal.SIGKILL)
        await parent.wait()
        for _ in range(100):
            if not alive(pid):
                break
            await asyncio.sleep(0.02)
        assert not alive(pid)


def test_a_child_whose_parent_ended_at_once_never_becomes_the_program(tmp_path: Path) -> None:
    """The parent's end before prctl(2) sends no signal: here it has ended before the child's first step."""
    ran = tmp_path / "ran"
    command = process._command(["touch", str(ran)], guarded=True)
    # A stranger is its parent: what a child sees that has been handed on to init.
    orphan = subprocess.run(["sh", "-c", '"$@"; exit $?', "sh", *command], check=False)
    assert (orphan.returncode, ran.exists()) == (1, False)
    ours = subprocess.run(command, check=False)
    assert (ours.returncode, ran.exists()) == (0, True)


async def test_a_terminals_signals_do_not_reach_children() -> None:
    async with process.start(["sleep", "60"]) as child:
        assert os.getsid(child.pid) == os.getpgid(child.pid) == child.pid
        assert child.pid != os.getsid(0)
    # What ends with its input may ask for a password at our terminal.
    async with process.start(["cat"], stdin=process.PIPE, ends_with_input=True) as child:
        assert os.getsid(child.pid) == os.getsid(0)


async def test_an_owner_that_is_cancelled_again_and_again_leaves_no_process() -> None:
    pids: list[int] = []

    async def own() -> None:
        deaf = ["sh", "-c", "trap '' TERM; echo; while :; do sleep 0.05; done"]
        async with process.start(deaf, stdout=process.PIPE, grace=1.0) as child:
            assert child.stdout is not None
            await child.stdout.readline()
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


async def test_an_owner_that_is_cancelled_while_it_starts_leaves_no_process() -> None:
    def children() -> set[str]:
        return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())

    async def own() -> None:
        async with process.start(["sleep", "1000"]):
            await asyncio.Event().wait()

    before = children()
    for turns in range(12):
        owner = asyncio.create_task(own())
        for _ in range(turns % 6):
            await asyncio.sleep(0)
        owner.cancel()
        with pytest.raises(asyncio.CancelledError):
            await owner
        assert children() <= before


async def test_a_pipe_that_somebody_left_behind_holds_is_not_kept() -> None:
    async with process.start(["true"]):
        pass
    held = len(os.listdir("/proc/self/fd"))
    pids: list[int] = []
    try:
        for _ in range(3):
            script = "sleep 300 & echo $!; exec sleep 60"
            async with process.start(["sh", "-c", script], stdout=process.PIPE, grace=0.5) as child:
                assert child.stdout is not None
                pids.append(int(await child.stdout.readline()))
        await asyncio.sleep(0.1)
        assert len(os.listdir("/proc/self/fd")) < held + 3
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("ending", ["obeys", "is deaf", "by itself"])
async def test_who_is_left_behind_with_a_pipe_holds_up_no_end(ending: str) -> None:
    script = {
        "obeys": "exec sleep 60",
        "is deaf": "trap '' TERM; echo deaf; while :; do sleep 0.05; done",
        "by itself": "exit 3",
    }[ending]
    pids: list[int] = []
    try:
        # With what it waited for until now, this would not end in time.
        async with asyncio.timeout(30):
            async with process.start(
                ["sh", "-c", f"sleep 300 & echo $!; {script}"], stdout=process.PIPE, grace=0.2
            ) as child:
                assert child.stdout is not None
                pids.append(int(await child.stdout.readline()))
                if ending == "is deaf":
                    await child.stdout.readline()
                if ending == "by itself":
                    assert await child.wait() == 3
            assert await child.wait() == {"obeys": -signal.SIGTERM, "is deaf": -signal.SIGKILL, "by itself": 3}[ending]
        assert alive(pids[0])
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)


async def test_one_that_does_not_end_when_it_is_killed_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(process, "_KILLED_TIMEOUT", 0.2)
    # As one that hangs in the kernel, which takes no signal.
    with monkeypatch.context() as context:
        async with asyncio.timeout(30), process.start(["sleep", "60"], grace=0.2) as child:
            context.setattr(child, "send_signal", lambda _: None)
            assert await child.stop(0.2)
            assert not await child.stop(1000)
            assert child.returncode is None
    (told,) = [each for each in caplog.records if each.name == "nixlet.process"]
    assert told.getMessage() == "sleep was killed and has not ended: it hangs in the kernel"
    # (who lets go of its pipes kills it as well, and it may be gone by now)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child.pid, signal.SIGKILL)
    assert await asyncio.wait_for(child.wait(), 30) == -signal.SIGKILL


async def test_a_run_does_not_wait_for_who_is_left_behind_with_its_pipes() -> None:
    # It has its input, too, which is more than a pipe has room for.
    script = "sleep 300 & echo $!; echo bad >&2; head -c 3; exit 3"
    async with asyncio.timeout(60):
        done = await process.run(["sh", "-c", script], stdin=b"abc" + bytes(4 << 20))
    pid, _, rest = done.stdout.partition(b"\n")
    try:
        assert (done.returncode, rest, done.stderr) == (3, b"abc", b"bad\n")
        assert alive(int(pid))
    finally:
        os.kill(int(pid), signal.SIGKILL)


async def test_a_run_has_all_that_was_printed_and_gives_all_that_is_read() -> None:
    given = os.urandom(3 << 20)
    done = await process.run(["sh", "-c", "cat; head -c 3000000 /dev/zero >&2"], stdin=given)
    assert done.stdout == given
    assert done.stderr == bytes(3_000_000)
    # Who reads nothing of it is nobody's trouble.
    assert (await process.run(["true"], stdin=given)).returncode == 0
