"""Programs that go on without us."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from nixlet import errors
from nixlet.host import detached, supervisor, unixsocket

SERVES = (
    "import os, socket, sys, time; made = socket.socket(socket.AF_UNIX); made.bind(sys.argv[1] + '.new'); made.listen();"
    "print('it serves', flush=True); os.rename(sys.argv[1] + '.new', sys.argv[1]); time.sleep(600)"
)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[str]:
    """Where a program is to serve, which ends with the test."""
    path = f"{tmp_path}/socket"
    yield path
    with contextlib.suppress(errors.UnavailableError):
        pid = unixsocket.peer_of(path)
        if pid != os.getpid():
            os.kill(pid, signal.SIGKILL)


def program(place: str, script: str = SERVES, **more: Any) -> supervisor.Program:
    async def ready() -> None:
        while not unixsocket.is_served(place):
            await asyncio.sleep(0.01)

    said: dict[str, Any] = {"ready": ready, "ready_timeout": 30, "goes_on_at": place, **more}
    return supervisor.Program(
        name="kept",
        argv=[sys.executable, "-c", script, place],
        env=dict(os.environ),
        log_path=f"{place}.log",
        **said,
    )


@contextlib.asynccontextmanager
async def supervised(described: supervisor.Program) -> AsyncIterator[supervisor.Supervised]:
    async with supervisor.started(described) as running:
        assert await running.answered()
        yield running


async def test_it_goes_on_and_is_found_again(place: str) -> None:
    async with supervised(program(place)) as running:
        pid = running.pid
        # A session of its own, and somebody else's child: neither a terminal nor our end reaches it.
        assert os.getsid(pid) != os.getsid(0)
        assert int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) != os.getpid()
    assert unixsocket.peer_of(place) == pid
    async with supervised(program(place)) as running:
        assert (running.pid, running.has_ended) == (pid, False)
        os.kill(pid, signal.SIGKILL)
        error = await running.died()
        assert running.has_ended
    assert error.message == "kept has ended: it serves"
    assert error.hint == f"its log is {place}.log"
    async with supervised(program(place)) as running:
        assert running.pid != pid
    assert Path(f"{place}.log").read_text() == "it serves\n" * 2
    assert Path(f"{place}.log").stat().st_mode & 0o777 == 0o640


async def never() -> None:
    await asyncio.Event().wait()


def has_ended(pid: int) -> bool:
    """Whether a process has ended, also where its parent has not yet asked how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


async def test_one_that_never_answers_is_ended(place: str) -> None:
    script = "import time; print('it waits', flush=True); time.sleep(600)"
    async with supervisor.started(program(place, script, ready=never, ready_timeout=1)) as running:
        pid = running.pid
        with pytest.raises(errors.CommandFailedError, match="kept did not answer within 1 s"):
            await running.answered()
        assert not has_ended(pid)
    assert has_ended(pid)


async def test_one_that_ends_at_once_says_why(place: str) -> None:
    with pytest.raises((errors.CommandFailedError, errors.UnavailableError)) as caught:
        async with supervised(program(place, "import sys; sys.exit('no device')")):
            pass
    assert "has ended" in caught.value.message
    assert "its log is" in caught.value.hint
    assert Path(f"{place}.log").read_text() == "no device\n"


async def test_a_program_that_is_not_there(place: str) -> None:
    with pytest.raises(errors.UnavailableError, match="the program no-such-thing is not installed"):
        async with detached.found_or_started(
            ["no-such-thing", place], socket=place, log_path=f"{place}.log", env=os.environ
        ):
            pass


async def test_a_socket_of_somebody_else_is_left_alone(place: str) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(place)
        other.listen()
        with pytest.raises(
            errors.FailedPreconditionError, match=f"is served by another program .*process {os.getpid()}"
        ):
            async with supervised(program(place)):
                pass
