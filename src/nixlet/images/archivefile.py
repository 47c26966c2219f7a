"""The file that an archive is: copied first where it is a pipe, since archives aren't read from front to back."""

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import Callable, Iterator

from nixlet import errors
from nixlet.host import epoll, files, uncut
from nixlet.images import expand, scratch

_CHUNK = 1024 * 1024

#: What is copied at most before others get the thread (bytes), however fast it comes.
_TURN = 16 * _CHUNK


@contextlib.contextmanager
def regular(fd: int, shown: str, directory: str | None = None) -> Iterator[int]:
    """A file that can be read at any place: the one that is given, or a copy of what a pipe or a socket has.

    Args:
        fd: Open for reading; stays the caller's. What was read of it before belongs to somebody else.
        shown: What errors call it.
        directory: Where the unnamed copy goes; the system's directory for temporary files by default.

    Raises:
        InvalidArgumentError: It is neither a file nor a stream, can't be read, or has more than any archive has.
        NixletError: The file system refuses the copy, as in ``scratch.opened``.
    """
    if not _is_stream(fd, shown):
        yield fd
        return
    with _copying(shown, directory) as copy:
        with files.refusing(f"{shown} can't be read"):
            while chunk := os.read(fd, _CHUNK):
                copy.take(chunk)
        yield copy.whole()


async def received(stack: contextlib.ExitStack, fd: int, shown: str, directory: str) -> int:
    """As ``regular``, for whoever has an event loop: however long nothing comes, no thread waits for it.

    Args:
        stack: Owns the copy.
        fd: As for ``regular``. It may be shared with others, and isn't made non-blocking.
        shown: What errors call it.
        directory: Where the copy goes.
    """
    if not _is_stream(fd, shown):
        return fd
    copy = await uncut.to_its_end(asyncio.to_thread(stack.enter_context, _copying(shown, directory)))
    with files.refusing(f"{shown} can't be read"), _reading(fd) as read:
        more = True
        while more:
            await epoll.ready(fd)
            more = await uncut.to_its_end(asyncio.to_thread(_take_what_is_there, read, copy))
    return copy.whole()


def _is_stream(fd: int, shown: str) -> bool:
    """Whether it has to be copied."""
    kind = os.fstat(fd).st_mode
    if stat.S_ISREG(kind) and os.lseek(fd, 0, os.SEEK_CUR) == 0:
        return False
    if not (stat.S_ISREG(kind) or stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind)):
        hint = f"pack it: tar -C {shown} -c . | nixlet image load" if stat.S_ISDIR(kind) else ""
        raise errors.InvalidArgumentError(
            f"{shown} is not an image archive: it is neither a file nor a pipe", hint=hint
        )
    return True


class _Copy:
    """A copy that is being made."""

    def __init__(self, file: scratch.ScratchFile, shown: str) -> None:
        self._file = file
        self._shown = shown
        self.size = 0

    def take(self, chunk: bytes) -> None:
        self.size += len(chunk)
        if self.size > expand.MAX_EXPANDED_BYTES:
            raise errors.InvalidArgumentError(f"{self._shown} has more than {expand.MAX_EXPANDED_BYTES} bytes")
        self._file.write(chunk)

    def whole(self) -> int:
        """The copy, when all has come."""
        if not self.size:
            raise errors.InvalidArgumentError(
                f"{self._shown} is empty", hint="let it be written by docker save or skopeo copy, for example"
            )
        return self._file.fileno()


@contextlib.contextmanager
def _copying(shown: str, directory: str | None) -> Iterator[_Copy]:
    with scratch.opened(f"{shown} can't be copied to", directory) as file:
        yield _Copy(file, shown)


@contextlib.contextmanager
def _reading(fd: int) -> Iterator[Callable[[], bytes]]:
    """What reads a stream piece by piece and never waits for more: it raises BlockingIOError where nothing is there."""
    kind = os.fstat(fd).st_mode
    with contextlib.ExitStack() as stack:
        if stat.S_ISREG(kind):
            yield lambda: os.read(fd, _CHUNK)
        elif stat.S_ISSOCK(kind):
            own = stack.enter_context(socket.socket(fileno=os.dup(fd)))
            yield lambda: own.recv(_CHUNK, socket.MSG_DONTWAIT)
        else:
            # Only splice(2) can be told not to wait, whatever the descriptor says of that: others may be quicker.
            reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            stack.callback(os.close, reader)
            stack.callback(os.close, writer)

            def read() -> bytes:
                size = os.splice(fd, writer, _CHUNK, flags=os.SPLICE_F_NONBLOCK)
                return os.read(reader, size) if size else b""

            yield read


def _take_what_is_there(read: Callable[[], bytes], copy: _Copy) -> bool:
    """Take what is there, or as much as a turn has; whether more may come."""
    end = copy.size + _TURN
    while copy.size < end:
        try:
            chunk = read()
        except BlockingIOError:
            break
        if not chunk:
            return False
        copy.take(chunk)
    return True
