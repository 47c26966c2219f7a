"""Our own ends of streams that are handed to the node: what can be handed over is, and the rest goes through pipes of ours.

The node writes to a pipe or a file of ours by itself, without us in between. A terminal, a device or a socket it never gets: it must not
wait for a person, and others have them too. There is a pipe for each of these, which we empty into them.
"""

import errno
import fcntl
import os
import stat

from nixlet import errors

#: What a pipe of ours holds, and what is moved at once (bytes).
_PIPE = 1 << 20
_CHUNK = 1 << 16

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from typing import Self
else:
    # As in ``varlink.client``.
    import _socket as socket


class Gone(Exception):
    """Nobody has the other side of our stream any more.

    Attributes:
        terminal: It was a terminal.
    """

    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal


class _Stream:
    """A stream of ours that the node doesn't get, and the pipe for it.

    Attributes:
        pipe: Our end.
    """

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe
        self._data = memoryview(b"")
        self._own = -1
        self._socket: socket.socket | None = None

    @property
    def waits(self) -> bool:
        """Whether something has been read that there is no room for yet."""
        return bool(self._data)

    def close(self) -> None:
        """Close what is ours; who has the pipe's other end sees its end."""
        for fd in (self.pipe, self._own):
            if fd >= 0:
                os.close(fd)
        self.pipe = self._own = -1
        if self._socket is not None:
            self._socket.close()


class Output(_Stream):
    """An output of ours: what comes through a pipe goes there."""

    def __init__(self, ours: int, pipe: int) -> None:
        super().__init__(pipe)
        self._name = "standard error" if ours == 2 else "standard output"
        self._terminal = os.isatty(ours)
        #: What is waited for until it can be written.
        self.writing = ours
        self._put: Callable[[memoryview], int] = lambda data: os.write(ours, data)
        if stat.S_ISSOCK(os.fstat(ours).st_mode):
            own = self._socket = socket.socket(fileno=os.dup(ours))
            self._put = lambda data: own.send(data, socket.MSG_DONTWAIT)
            return
        try:
            self._own = _opened_anew(ours, os.O_WRONLY)
        except OSError:
            # Somebody else's terminal, after su(1): we wait when it does.
            return
        self.writing = self._own
        self._put = lambda data: os.write(self._own, data)

    def read(self) -> bool:
        """Take more from the pipe; whether there was more."""
        try:
            self._data = memoryview(os.read(self.pipe, _CHUNK))
        except BlockingIOError:
            return True
        return bool(self._data)

    def write(self) -> None:
        """Write what can be written without waiting.

        Raises:
            Gone: Nobody reads it any more.
            FailedPreconditionError: It can't be written for another reason.
        """
        while self._data:
            try:
                self._data = self._data[self._put(self._data) :]
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in {errno.EPIPE, errno.ECONNRESET} or (error.errno == errno.EIO and self._terminal):
                    raise Gone(terminal=self._terminal) from None
                raise errors.FailedPreconditionError(
                    f"{self._name} can't be written: {error.strerror}", hint="send it elsewhere"
                ) from error


class Input(_Stream):
    """Our standard input, for a pipe that the node reads."""

    def __init__(self, pipe: int, ours: int = 0) -> None:
        super().__init__(pipe)
        os.set_blocking(pipe, False)
        #: What is waited for until something can be read.
        self.reading = ours
        self._get: Callable[[], bytes] = lambda: os.read(ours, _CHUNK)
        # Others may read it too, and have been quicker: then there is nothing, and it must not be waited for.
        mode = os.fstat(ours).st_mode
        if stat.S_ISSOCK(mode):
            own = self._socket = socket.socket(fileno=os.dup(ours))
            self._get = lambda: own.recv(_CHUNK, socket.MSG_DONTWAIT)
        elif stat.S_ISFIFO(mode) or os.isatty(ours):
            # Not a file: opened anew, that would be read from its beginning. Somebody else's can't be: we wait when they do.
            try:
                self._own = _opened_anew(ours, os.O_RDONLY)
            except OSError:
                return
            self._get = lambda: os.read(self._own, _CHUNK)

    def read(self) -> bytes | None:
        """What our input gives now; empty at its end, and when the terminal is gone; None: somebody else has taken what was there."""
        try:
            return self._get()
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def give(self, data: bytes) -> None:
        """Hand it on, as soon as there is room."""
        self._data = memoryview(bytes(self._data) + data)
        self.write()

    def write(self) -> bool:
        """Write what there is room for; False when nobody reads it any more."""
        try:
            while self._data:
                self._data = self._data[os.write(self.pipe, self._data) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._data = memoryview(b"")
            return False
        return True


class Ends:
    """All three; a context manager.

    Attributes:
        descriptors: What is handed over with a call.
        streams: How the call names them: indices by the streams' names.
        outputs: Those that go through pipes of ours.
        input: Our input, if it is wanted.
    """

    def __init__(self, *, stdin: bool, stdout: bool = True, stderr: bool = True) -> None:
        """Make what is needed.

        Args:
            stdin: Our input is wanted.
            stdout: There is an output.
            stderr: There is another one; a terminal has only one.
        """
        self.descriptors: list[int] = []
        self.streams: dict[str, int] = {}
        self.outputs: list[Output] = []
        self.input: Input | None = None
        self._handed: list[int] = []
        for fd, name, wanted in ((1, "stdout", stdout), (2, "stderr", stderr)):
            if not wanted:
                continue
            mode = os.fstat(fd).st_mode
            if stat.S_ISFIFO(mode) or stat.S_ISREG(mode):
                self._hand_over(name, fd)
                continue
            reader, writer = _pipe()
            os.set_blocking(reader, False)
            self._handed.append(writer)
            self._hand_over(name, writer)
            self.outputs.append(Output(fd, reader))
        if stdin:
            reader, writer = _pipe()
            self._handed.append(reader)
            self._hand_over("stdin", reader)
            self.input = Input(writer)

    def _hand_over(self, name: str, fd: int) -> None:
        self.streams[name] = len(self.descriptors)
        self.descriptors.append(fd)

    def handed_over(self) -> None:
        """The node has got them: what was only for it is closed."""
        while self._handed:
            os.close(self._handed.pop())

    def without_input(self) -> None:
        """Our input turns out not to be wanted: it stays as it is."""
        if self.input is not None:
            self.input.close()
            self.input = None

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *_: object) -> None:
        self.handed_over()
        for output in self.outputs:
            output.close()
        if self.input is not None:
            self.input.close()


def _opened_anew(fd: int, flags: int) -> int:
    """A descriptor of our own for the same file: what others have open too must not be made non-blocking."""
    return os.open(f"/proc/self/fd/{fd}", flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)


def _pipe() -> tuple[int, int]:
    reader, writer = os.pipe2(os.O_CLOEXEC)
    # Users have a limit for all of their pipes together (pipe(7)).
    try:
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, _PIPE)
    except PermissionError:
        pass
    return reader, writer
