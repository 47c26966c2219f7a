"""Files that are whole or not there, directories that are durable, and locks."""

import contextlib
import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator

from nixlet import errors


def sync_directory(path: str) -> None:
    """Write a directory's entries to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomically(path: str, data: bytes | str, *, mode: int = 0o644) -> None:
    """Replace a file whole: written beside it, synced, renamed over it."""
    directory = os.path.dirname(path) or "."
    content = data.encode() if isinstance(data, str) else data
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


def make_directory(path: str, *, mode: int = 0o755) -> None:
    """Make a directory and its parents; one that is there stays as it is, since it may be somebody else's.

    Raises:
        FailedPreconditionError: Something else has that name, or the file system refuses.
    """
    try:
        os.makedirs(path, mode=mode, exist_ok=True)
    except OSError as error:
        raise errors.FailedPreconditionError(
            f"can't make the directory {path}: {os.strerror(error.errno or errno.EIO)}"
        ) from error


@contextlib.contextmanager
def exclusive_lock(path: str, *, what: str) -> Iterator[None]:
    """Hold a lock file for the time of the context; it names our process for those who come second.

    Raises:
        FailedPreconditionError: Another process holds it; the sentence names that process.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(fd, 32).decode(errors="replace").strip()
            raise errors.FailedPreconditionError(
                f"{what} is in use by process {holder or 'unknown'}",
                hint="stop that process, or choose another directory",
            ) from error
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
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
