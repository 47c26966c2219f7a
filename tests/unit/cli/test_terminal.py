"""The person's terminal, with a real one."""

import asyncio
import os
import pty
import signal
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from nixlet.cli import terminal


@pytest.fixture
def ends() -> Iterator[tuple[int, int]]:
    """A terminal: the person's side, and the program's."""
    person, program = pty.openpty()
    yield person, program
    for fd in (person, program):
        try:
            os.close(fd)
        except OSError:
            continue


def test_a_terminal_is_afterwards_as_it_was(ends: tuple[int, int]) -> None:
    _, program = ends
    before = termios.tcgetattr(program)

    def fail() -> None:
        with terminal.raw(program):
            assert not termios.tcgetattr(program)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert termios.tcgetattr(program) == before


def test_what_is_no_terminal_stays_alone() -> None:
    read, write = os.pipe()
    with terminal.raw(read):
        pass
    os.close(read)
    os.close(write)


async def test_input_of_a_pipe() -> None:
    read, write = os.pipe()
    try:
        source = terminal.Input(read)
        waiting = asyncio.create_task(anext(source))
        await asyncio.sleep(0.02)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        os.write(write, b"after a wait that was given up")
        assert await anext(source) == b"after a wait that was given up"
        os.close(write)
        with pytest.raises(StopAsyncIteration):
            await anext(source)
    finally:
        os.close(read)


async def test_input_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "input"
    file.write_bytes(b"x" * 100_000)
    fd = os.open(file, os.O_RDONLY)
    try:
        assert b"".join([data async for data in terminal.Input(fd)]) == b"x" * 100_000
    finally:
        os.close(fd)


async def test_input_of_a_terminal_that_goes(ends: tuple[int, int]) -> None:
    person, program = ends
    os.write(person, b"line\n")
    source = terminal.Input(program)
    assert await anext(source) == b"line\n"
    os.close(person)
    with pytest.raises(StopAsyncIteration):
        await anext(source)


async def test_signals_are_for_somebody_else() -> None:
    got: list[int] = []

    async def deliver(number: int) -> None:
        got.append(number)

    before = signal.getsignal(signal.SIGUSR1)
    with terminal.signals_forwarded(deliver):
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(100):
            if len(got) == 2:
                break
            await asyncio.sleep(0.01)
    assert set(got) == {signal.SIGUSR1, signal.SIGTERM}
    assert signal.getsignal(signal.SIGUSR1) == before
