"""A person at a terminal: a program that runs in a real one, what it shows, and keys."""

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Iterator, Sequence

SECONDS = 30


class Terminal:
    """A terminal with a program in it.

    Attributes:
        pid: The program.
        fd: The person's side.
        shown: All that was shown.
    """

    def __init__(self, pid: int, fd: int) -> None:
        self.pid = pid
        self.fd = fd
        self.shown = b""
        self._read = 0

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def press(self, keys: bytes) -> None:
        os.write(self.fd, keys)

    def wait_for(self, text: bytes) -> bytes:
        """Wait until something is shown that was not waited for yet; all that came up to it."""
        deadline = time.monotonic() + SECONDS
        while (found := self.shown.find(text, self._read)) < 0:
            assert self._more(deadline), f"{text!r} is not in {self.shown[self._read :]!r}"
        end = found + len(text)
        seen, self._read = self.shown[self._read : end], end
        return seen

    def _more(self, deadline: float) -> bool:
        ready, _, _ = select.select([self.fd], [], [], max(0, deadline - time.monotonic()))
        if not ready:
            return False
        try:
            data = os.read(self.fd, 1 << 16)
        except OSError:
            # The program has ended, and nobody has the other side any more.
            return False
        self.shown += data
        return bool(data)

    def settings(self) -> list[object]:
        """The terminal's settings (termios(3))."""
        return list(termios.tcgetattr(self.fd))

    def end(self) -> int:
        """Wait for the program's end; its exit status."""
        deadline = time.monotonic() + SECONDS
        while self._more(deadline):
            pass
        status = os.waitpid(self.pid, 0)[1]
        self.pid = 0
        return os.waitstatus_to_exitcode(status)


@contextlib.contextmanager
def running(arguments: Sequence[str], environment: dict[str, str]) -> Iterator[Terminal]:
    """A verb of the command line in a terminal of 80 columns and 25 rows."""
    with started([sys.executable, "-m", "nixlet", *arguments], environment) as terminal:
        yield terminal


@contextlib.contextmanager
def started(argv: Sequence[str], environment: dict[str, str]) -> Iterator[Terminal]:
    """A program in such a terminal."""
    pid, fd = pty.fork()
    if pid == 0:
        os.execve(argv[0], list(argv), environment)
    terminal = Terminal(pid, fd)
    terminal.resize(80, 25)
    try:
        yield terminal
    finally:
        if terminal.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(terminal.pid, signal.SIGKILL)
            os.waitpid(terminal.pid, 0)
        os.close(fd)
