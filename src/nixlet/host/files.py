"""Files that are whole or not there, directories that are durable, and locks.

Directories, pipes and files that outlive us are made here, with the mode that is asked for: a person's umask may be 0077, and what we
make for containers and other programs must not depend on it. The umask itself is one for all threads, so nobody may change it.
"""

import contextlib
import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator

from nixlet import errors

_ROOM = "make room on that file system, or choose another directory"
_IN_THE_WAY = "move away what has that name, or choose another directory"

#: What to do about what a file system refuses.
_HINTS = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EROFS: "choose a directory on a file system that can be written",
    errno.EEXIST: _IN_THE_WAY,
    errno.ENOTDIR: _IN_THE_WAY,
    errno.EISDIR: _IN_THE_WAY,
}


def refused(what: str, error: OSError) -> errors.FailedPreconditionError:
    """The error for what a file system refuses, with its reason and what to do about that.

    Args:
        what: The sentence up to the reason ("/x can't be written").
        error: The refusal.
    """
    number = error.errno or errno.EIO
    return errors.FailedPreconditionError(f"{what}: {os.strerror(number)}", hint=_HINTS.get(number, ""))


def sync_directory(path: str) -> None:
    """Write a directory's entries to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomically(path: str, data: bytes | str, *, mode: int = 0o644) -> None:
    """Replace a file whole: written beside it, synced, renamed over it.

    Raises:
        FailedPreconditionError: The file system refuses; what was there before still is.
    """
    content = data.encode() if isinstance(data, str) else data
    try:
        _write_atomically(path, content, mode)
    except OSError as error:
        raise refused(f"{path} can't be written", error) from error


def _write_atomically(path: str, content: bytes, mode: int) -> None:
    directory = os.path.dirname(path) or "."
    fd, temporary = tempfile.mkstemp(dir=directory, prefix=f".{os.path.basename(path)}.")
    try:
        with os.fdopen(fd, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_directory(directory)


def new_directory(path: str, mode: int = 0o755) -> None:
    """Make one directory that is not there yet, with exactly this mode.

    Raises:
        OSError: As ``os.mkdir``.
    """
    os.mkdir(path, mode)
    os.chmod(path, mode)


def new_directories(path: str, mode: int = 0o755) -> None:
    """Make a directory, and its parents with mode 0755; what is there stays as it is, since it may be somebody else's.

    Raises:
        OSError: As ``os.makedirs``; also when something else has that name.
    """
    path = os.path.abspath(path)
    parent = os.path.dirname(path)
    if not os.path.lexists(parent):
        new_directories(parent)
    try:
        new_directory(path, mode)
    except OSError:
        # A file system that can't be written to, for one, is no trouble where the directory is there.
        if not os.path.isdir(path):
            raise


def make_directory(path: str, *, mode: int = 0o755) -> None:
    """``new_directories``, with an error in words.

    Raises:
        FailedPreconditionError: Something else has that name, or the file system refuses.
    """
    try:
        new_directories(path, mode)
    except OSError as error:
        raise refused(f"can't make the directory {path}", error) from error


def new_file(path: str, mode: int = 0o644) -> int:
    """A descriptor for writing to a file that is not there yet, with exactly this mode.

    Raises:
        OSError: As ``os.open`` with O_EXCL.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    os.fchmod(fd, mode)
    return fd


def open_for_appending(path: str, mode: int) -> int:
    """A descriptor for writing to a file's end; a file that is not there is made with exactly this mode.

    Raises:
        OSError: As ``os.open``.
    """
    with contextlib.suppress(FileExistsError):
        os.close(new_file(path, mode))
    # Without O_CREAT: a symlink that leads to nothing is none of ours to make something of.
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)


def new_pipe(path: str) -> None:
    """Make a named pipe for us alone.

    Raises:
        OSError: As ``os.mkfifo``.
    """
    os.mkfifo(path, 0o600)
    os.chmod(path, 0o600)


@contextlib.contextmanager
def exclusive_lock(path: str, *, what: str) -> Iterator[None]:
    """Hold a lock file for the time of the context; it names our process for those who come second.

    Raises:
        FailedPreconditionError: Another process holds it; the sentence names that process. Or the file system refuses.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.fchmod(fd, 0o600)
    except OSError as error:
        raise refused(f"the lock {path} can't be opened", error) from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(fd, 32).decode(errors="replace").strip()
            raise errors.FailedPreconditionError(
                f"{what} is in use by process {holder or 'unknown'}",
                hint="stop that process, or choose another directory",
            ) from error
        try:
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            raise refused(f"the lock {path} can't be written", error) from error
        yield
    finally:
        os.close(fd)


def holder(path: str) -> int:
    """The process that holds a lock file; 0 for nobody.

    Raises:
        PermissionError: We may not look.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0
    try:
        # Shared, and given up at once: a node that starts in this very moment would have to be told otherwise.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return int(os.read(fd, 32) or 0)
    else:
        return 0
    finally:
        os.close(fd)
