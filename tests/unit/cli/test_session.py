"""A process in front of a person: their terminal, their signals, and the keys that leave it alone."""

import os
import pty
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator

import pytest

from nixlet.cli import session
from support import pipes


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """A terminal: the person's side, and the program's."""
    person, program = pty.openpty()
    yield person, program
    os.close(person)
    os.close(program)


def test_a_terminal_is_afterwards_as_it_was(terminal: tuple[int, int]) -> None:
    _, program = terminal
    before = termios.tcgetattr(program)

    def fail() -> None:
        with session.Raw(program):
            assert not termios.tcgetattr(program)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert termios.tcgetattr(program) == before


def test_what_is_no_terminal_stays_alone() -> None:
    with pipes.pipe() as pipe, session.Raw(pipe.reader):
        pass


def test_signals_are_kept_for_somebody_else() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with session.Signals() as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert select.select([signals], [], [], 5)[0]
        assert sorted(signals.take()) == sorted([signal.SIGUSR1, signal.SIGTERM])
        assert not select.select([signals], [], [], 0)[0]
        assert signals.take() == []
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.parametrize(
    ("pieces", "typed", "detached"),
    [
        ((b"ls\r",), b"ls\r", False),
        ((b"ls\x10\x11rest",), b"ls", True),
        ((b"ls\x10", b"\x11"), b"ls", True),
        ((b"\x10", b"a", b"\x10", b"\x10", b"\x11"), b"\x10a\x10", True),
        ((b"\x11\x10",), b"\x11", False),
    ],
)
def test_two_keys_leave_it_alone(pieces: tuple[bytes, ...], typed: bytes, detached: bool) -> None:
    keys = session.Keys()
    assert b"".join(map(keys.typed, pieces)) == typed
    assert keys.detached == detached


#: Ctrl-C at the moment in which a module is looked for.
INTERRUPTED = """
import os, signal, sys
# Whoever runs the tests in the background may have it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
class Finder:
    def find_spec(self, name, *_):
        if name == module:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
module = sys.argv.pop()
sys.meta_path.insert(0, Finder())
from nixlet import __main__
sys.argv += ["ps", "--state-dir", "/no/such"]
__main__.main()
"""


@pytest.mark.parametrize("module", ["nixlet.cli.streams", "nixlet.cli.containers", "nixlet.varlink.client"])
def test_an_interrupted_import_is_no_fault(module: str) -> None:
    argv = [sys.executable, "-P", "-c", INTERRUPTED, module]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "")
