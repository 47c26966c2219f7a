"""The file that an archive is: copied first where it is a pipe, since archives aren't read from front to back."""

import contextlib
import os
import select
import stat
import threading
from collections.abc import Iterator

from nixlet import errors
from nixlet.host import files
from nixlet.images import expand, scratch

_CHUNK = 1024 * 1024

#: Milliseconds between two looks whether anybody still wants what a pipe doesn't bring.
_LOOK = 200


@contextlib.contextmanager
def regular(fd: int, shown: str, directory: str | None = None, stop: threading.Event | None = None) -> Iterator[int]:
    """A file that can be read at any place: the one that is given, or a copy of what a pipe or a socket has.

    Args:
        fd: Open for reading; stays the caller's. What was read of it before belongs to somebody else.
        shown: What errors call it.
        directory: Where the unnamed copy goes; the system's directory for temporary files by default.
        stop: Ends the copying early when it is set, also while nothing comes.

    Raises:
        CallCancelledError: ``stop`` was set.
        InvalidArgumentError: It is neither a file nor a stream, can't be read, or has more than any archive has.
        NixletError: The file system refuses the copy, as in ``scratch.opened``.
    """
    kind = os.fstat(fd).st_mode
    if stat.S_ISREG(kind) and os.lseek(fd, 0, os.SEEK_CUR) == 0:
        yield fd
        return
    if not (stat.S_ISREG(kind) or stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind)):
        hint = f"pack it: tar -C {shown} -c . | nixlet image load" if stat.S_ISDIR(kind) else ""
        raise errors.InvalidArgumentError(
            f"{shown} is not an image archive: it is neither a file nor a pipe", hint=hint
        )
    with scratch.opened(f"{shown} can't be copied to", directory) as copy:
        copied = 0
        while chunk := _read(fd, shown, stop):
            copied += len(chunk)
            if copied > expand.MAX_EXPANDED_BYTES:
                raise errors.InvalidArgumentError(f"{shown} has more than {expand.MAX_EXPANDED_BYTES} bytes")
            copy.write(chunk)
        if not copied:
            raise errors.InvalidArgumentError(
                f"{shown} is empty", hint="let it be written by docker save or skopeo copy, for example"
            )
        yield copy.fileno()


def _read(fd: int, shown: str, stop: threading.Event | None) -> bytes:
    coming = select.poll()
    coming.register(fd, select.POLLIN)
    while stop is not None and (stop.is_set() or not coming.poll(_LOOK)):
        if stop.is_set():
            raise errors.CallCancelledError(f"{shown} is not wanted any more")
    try:
        return os.read(fd, _CHUNK)
    except OSError as error:
        raise files.refused(f"{shown} can't be read", error) from error
