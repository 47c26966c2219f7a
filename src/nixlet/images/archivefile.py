"""The file that an archive is: opened without harm, and copied first where it is a pipe, since archives aren't read from front to back."""

import contextlib
import os
import stat
from collections.abc import Iterator

from nixlet import errors
from nixlet.host import files
from nixlet.images import expand, scratch

_CHUNK = 1024 * 1024


def opened(path: str, *, piped: bool = False) -> int:
    """Open an archive for reading; the caller closes it.

    Args:
        path: Where it is.
        piped: Whether it may be a pipe, which is waited for.

    Raises:
        NotFoundError: There is none.
        InvalidArgumentError: It can't be read, or is no file.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | (0 if piped else os.O_NONBLOCK))
    except FileNotFoundError as error:
        raise errors.NotFoundError(f"there is no image archive {path}", hint="check the path") from error
    except OSError as error:
        raise errors.InvalidArgumentError(f"can't read the image archive {path}: {error.strerror}") from error
    if not piped and not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise errors.InvalidArgumentError(f"{path} is not an image archive: it is no regular file")
    return fd


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
        while chunk := _read(fd, shown):
            copied += len(chunk)
            if copied > expand.MAX_EXPANDED_BYTES:
                raise errors.InvalidArgumentError(f"{shown} has more than {expand.MAX_EXPANDED_BYTES} bytes")
            copy.write(chunk)
        if not copied:
            raise errors.InvalidArgumentError(
                f"{shown} is empty", hint="let it be written by docker save or skopeo copy, for example"
            )
        yield copy.fileno()


def _read(fd: int, shown: str) -> bytes:
    try:
        return os.read(fd, _CHUNK)
    except OSError as error:
        raise files.refused(f"{shown} can't be read", error) from error
