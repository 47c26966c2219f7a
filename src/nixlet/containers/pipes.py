"""Bytes between named pipes and the descriptors of clients, moved by the kernel where it can; nothing here blocks the event loop.

A client shares its descriptors with others, so none is ever made non-blocking: O_NONBLOCK belongs to what all of them have open.
splice(2) can be told not to block whatever the descriptor says, a file has a thread of its own that is left behind where it doesn't
come back, and devices are opened anew.
"""

import asyncio
import contextlib
import errno
import fcntl
import os
import socket
import stat
import termios
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from nixlet import errors
from nixlet.host import epoll, filethread, tee

#: As much as a pipe of ours holds (bytes), and as is moved at once: the most that an ordinary user may ask for
#: (/proc/sys/fs/pipe-max-size). What a container prints while nobody reads waits here.
PIPE_BYTES: Final = 1 << 20

#: What is read at once when it isn't moved by the kernel (bytes).
CHUNK: Final = 1 << 17

#: Seconds in which the output of a process that has ended must go on, or it is taken to be complete.
_DRAIN = 0.5

_WRITABLE = (os.O_WRONLY, os.O_RDWR)


def open_reader(path: str) -> int:
    """Open a named pipe to read from, with room for ``PIPE_BYTES`` where that is allowed.

    Raises:
        OSError: As ``os.open``.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    _widen(fd)
    return fd


def open_writer(path: str) -> int | None:
    """Open a named pipe to write to; None where nobody reads it.

    Raises:
        OSError: As ``os.open``.
    """
    try:
        return os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return None


def new_pipe() -> tuple[int, int]:
    """A pipe of our own: the end to read from, and the other one."""
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    _widen(reader)
    return reader, writer


def _widen(fd: int) -> None:
    # Users have a limit for all of their pipes together (pipe(7)); a smaller one does.
    with contextlib.suppress(PermissionError):
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)


async def read(fd: int) -> bytes:
    """What a pipe of ours gives next; empty at its end."""
    while True:
        await epoll.ready(fd)
        with contextlib.suppress(BlockingIOError):
            return os.read(fd, CHUNK)


class Peeker:
    """Reads pipes of ours in two steps: what has been seen stays in the pipe until it is taken, also when we are killed in between."""

    def __init__(self) -> None:
        self._fds = contextlib.ExitStack()
        # One for all: nothing stays in it.
        self._reader, self._writer = new_pipe()
        self._nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        for fd in (self._reader, self._writer, self._nowhere):
            self._fds.callback(os.close, fd)

    def close(self) -> None:
        """Close what was needed for it."""
        self._fds.close()

    async def see(self, fd: int) -> bytes:
        """What a pipe gives next; empty at its end."""
        while True:
            await epoll.ready(fd)
            with contextlib.suppress(BlockingIOError):
                size = tee.tee(fd, self._writer, CHUNK)
                return os.read(self._reader, size) if size else b""

    def take(self, fd: int, size: int) -> None:
        """Take so many bytes that were seen out of a pipe."""
        while size:
            size -= os.splice(fd, self._nowhere, size, flags=os.SPLICE_F_NONBLOCK)


def unread(fd: int) -> int:
    """How many bytes wait in a pipe."""
    return int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, bytes(4)), "little", signed=True)


async def complete(
    ended: "asyncio.Future[Any]", readers: Mapping[int, "asyncio.Task[None]"], busy: Callable[[], bool]
) -> None:
    """Wait for the end of a process, and for all of its output.

    What the process left running may hold its pipes for ever: after its end, output must go on within a moment.

    Args:
        ended: The process's end.
        readers: What reads each of its pipes.
        busy: Whether output that was read is still being handed on; whoever takes it may be slow.

    Raises:
        Exception: What one of these raised.
    """
    waiting: set[asyncio.Future[Any]] = {ended, *readers.values()}
    while not ended.done():
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for each in done:
            each.result()
    while reading := {fd: reader for fd, reader in readers.items() if not reader.done()}:
        done, _ = await asyncio.wait(reading.values(), timeout=_DRAIN)
        if not done and not busy() and not any(map(unread, reading)):
            break
    for reader in readers.values():
        if reader.done():
            reader.result()


async def drain(fd: int) -> None:
    """Read a pipe to its end, for nobody."""
    while await read(fd):
        pass


def _file_thread(fd: int) -> filethread.FileThread:
    own = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
    try:
        return filethread.FileThread(own)
    except RuntimeError as error:
        os.close(own)
        raise errors.ResourceExhaustedError(
            f"a file that was handed over can't be served: {error}", hint="hand a pipe over"
        ) from error


class Destination:
    """Where bytes go: a descriptor of whatever kind, duplicated, so that whoever handed it over may close theirs."""

    def __init__(self, fd: int) -> None:
        """Take a descriptor.

        Raises:
            InvalidArgumentError: It can't be written to, or might block whoever writes.
        """
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE not in _WRITABLE:
            raise errors.InvalidArgumentError("a descriptor for output can't be written to")
        mode = os.fstat(fd).st_mode
        self._put: Callable[[memoryview], Awaitable[int]] | None = None
        self._file: filethread.FileThread | None = None
        self._fds = contextlib.ExitStack()
        if stat.S_ISSOCK(mode):
            own = self._fds.enter_context(socket.socket(fileno=fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)))
            self.fd = own.fileno()
            self._put = lambda data: self._when_able(lambda: own.send(data, socket.MSG_DONTWAIT))
        elif stat.S_ISCHR(mode):
            try:
                self.fd = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
            except OSError as error:
                raise errors.InvalidArgumentError(
                    f"a device for output can't be opened by the node: {error.strerror}", hint="hand a pipe over"
                ) from error
            self._put = lambda data: self._when_able(lambda: os.write(self.fd, data))
            self._fds.callback(os.close, self.fd)
        elif stat.S_ISFIFO(mode):
            self.fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
            self._fds.callback(os.close, self.fd)
        elif stat.S_ISREG(mode):
            file = self._file = _file_thread(fd)
            self._put = lambda data: file.call(lambda own: os.write(own, data))
            self._fds.callback(file.close)
        else:
            raise errors.InvalidArgumentError(
                "a descriptor for output is neither a pipe nor a file, a socket or a device", hint="hand a pipe over"
            )
        #: Whether it has bytes in hand that are in no pipe any more.
        self.busy = False

    def close(self) -> None:
        """Close it; a file is closed a little later."""
        self._fds.close()

    async def closed(self) -> None:
        """Wait until it is closed."""
        if self._file is not None:
            await self._file.closed()

    async def move(self, source: int) -> None:
        """Take all that a pipe of ours gives, until its end.

        Raises:
            BrokenPipeError: Nobody reads there any more.
            OSError: It can't be written for another reason.
        """
        if self._put is None:
            await self._splice(source)
            return
        while data := await read(source):
            self.busy = True
            view = memoryview(data)
            while view:
                view = view[await self._put(view) :]
            self.busy = False

    async def _splice(self, source: int) -> None:
        moved = 1
        while moved:
            await epoll.ready(source)
            try:
                moved = os.splice(source, self.fd, PIPE_BYTES, flags=os.SPLICE_F_NONBLOCK)
            except BlockingIOError:
                # There is something to move, so there is no room for it.
                await epoll.ready(self.fd, writing=True)

    async def _when_able(self, put: Callable[[], int]) -> int:
        while True:
            try:
                return put()
            except BlockingIOError:
                await epoll.ready(self.fd, writing=True)


async def write(fd: int, data: bytes) -> None:
    """Write all of it to a pipe of ours.

    Args:
        fd: The pipe.
        data: What is written.

    Raises:
        BrokenPipeError: Nobody reads it any more.
    """
    view = memoryview(data)
    while view:
        try:
            count = os.write(fd, view)
        except BlockingIOError:
            await epoll.ready(fd, writing=True)
        else:
            view = view[count:]


class Source:
    """Where a process's input comes from: a pipe, or a file, that a client handed over, duplicated."""

    def __init__(self, fd: int) -> None:
        """Take a descriptor.

        Raises:
            InvalidArgumentError: It can't be read, or not without waiting.
        """
        mode = os.fstat(fd).st_mode
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY or not (
            stat.S_ISFIFO(mode) or stat.S_ISREG(mode)
        ):
            raise errors.InvalidArgumentError(
                "a descriptor for input is neither a pipe nor a file that can be read", hint="hand a pipe over"
            )
        self._fds = contextlib.ExitStack()
        self._pipe = -1
        self._file: filethread.FileThread | None = None
        if stat.S_ISREG(mode):
            self._file = _file_thread(fd)
            self._fds.callback(self._file.close)
        else:
            self._pipe = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
            self._fds.callback(os.close, self._pipe)

    def close(self) -> None:
        """Close it; a file is closed a little later."""
        self._fds.close()

    async def closed(self) -> None:
        """Wait until it is closed."""
        if self._file is not None:
            await self._file.closed()

    async def feed(self, pipe: int) -> None:
        """Hand all that it gives to a pipe of ours, until its end.

        Raises:
            BrokenPipeError: Nobody reads the pipe any more.
            OSError: The file can't be read.
        """
        if self._file is not None:
            while data := await self._file.call(lambda own: os.read(own, CHUNK)):
                await write(pipe, data)
            return
        moved = 1
        while moved:
            await epoll.ready(self._pipe)
            try:
                moved = os.splice(self._pipe, pipe, PIPE_BYTES, flags=os.SPLICE_F_NONBLOCK)
            except BlockingIOError:
                # Where somebody else has read it first, the next turn waits for more.
                if unread(self._pipe):
                    await epoll.ready(pipe, writing=True)
