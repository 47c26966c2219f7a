"""Files that are whole or not there, directories that are durable, and locks.

Directories, pipes and files that outlive us are made here, with the mode that is asked for: a person's umask may be 0077, and what we
make for containers and other programs must not depend on it. The umask itself is one for all threads, so nobody may change it.
"""

import contextlib
import errno
import fcntl
import os
import stat
import sys
import tempfile
from collections.abc import Collection, Iterator

from nixlet import errors

_ROOM = "make room on that file system, or choose another directory"
_IN_THE_WAY = "move away what has that name, or choose another directory"

#: A disk with less room than this is full (bytes).
_SMALL = 64 << 10

#: How many characters tell temporary files apart (mkstemp's).
_RANDOM = 8

#: What to do about what a file system refuses.
_HINTS = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EROFS: "choose a directory on a file system that can be written",
    errno.EEXIST: _IN_THE_WAY,
    errno.ENOTDIR: _IN_THE_WAY,
    errno.EISDIR: _IN_THE_WAY,
    errno.EIO: "the kernel's log says what the disk's trouble is: dmesg",
}

#: What kinds of errors refusals are; a state of things for all others.
_KINDS: dict[int, type[errors.NixletError]] = {
    errno.ENOSPC: errors.ResourceExhaustedError,
    errno.EDQUOT: errors.ResourceExhaustedError,
    errno.EMFILE: errors.ResourceExhaustedError,
    errno.ENFILE: errors.ResourceExhaustedError,
    errno.EIO: errors.UnavailableError,
}


def refused(what: str, error: OSError) -> errors.NixletError:
    """The error for what a file system refuses, with its reason and what to do about that.

    A full disk makes a ResourceExhaustedError, a broken one an UnavailableError, all else a FailedPreconditionError.

    Args:
        what: The sentence up to the reason ("/x can't be written").
        error: The refusal.
    """
    number = error.errno or errno.EIO
    kind = _KINDS.get(number, errors.FailedPreconditionError)
    return kind(f"{what}: {os.strerror(number)}", hint=_HINTS.get(number, ""))


def exhausted(error: OSError) -> errors.NixletError | None:
    """The error for an unforeseen refusal if the disk, or a limit of this host, is the cause and not we; else None."""
    if error.errno not in _KINDS:
        return None
    return refused(f"{error.filename or 'a file'} can't be used", error)


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """Have what a file system refuses in the context told as ``refused`` does."""
    try:
        yield
    except OSError as error:
        raise refused(what, error) from error


def is_full(directory: str) -> bool:
    """Whether a directory's file system has no room for as much as a small file: of its blocks, or of its inodes."""
    # Some file systems (btrfs) don't count inodes.
    free = os.statvfs(directory)
    return _room(free) < _SMALL or (free.f_files > 0 and not free.f_favail)


def room(directory: str) -> int:
    """The bytes that a file system has left at a directory, as df counts: for others than root."""
    return _room(os.statvfs(directory))


def _room(free: os.statvfs_result) -> int:
    # Some file systems count nothing.
    return free.f_bavail * free.f_frsize if free.f_blocks else sys.maxsize


def check_room(directory: str) -> None:
    """Check that a directory's file system is not full.

    Raises:
        ResourceExhaustedError: It is.
    """
    if is_full(directory):
        raise refused(f"{directory} is full", OSError(errno.ENOSPC, ""))


def sync_directory(path: str) -> None:
    """Write a directory's entries to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomically(path: str, data: bytes | str, *, mode: int = 0o644, group: int = -1) -> None:
    """Replace a file whole: written beside it, synced, renamed over it. One that is so already is left alone.

    Args:
        path: The file.
        data: What it holds then.
        mode: Its mode, whatever the umask is.
        group: The number of the group that it belongs to; -1: whatever group the file system gives it.

    Raises:
        NixletError: The file system refuses, as in ``refused``; what was there before still is.
    """
    content = data.encode() if isinstance(data, str) else data
    try:
        if not _is_written(path, content, mode, group):
            _write_atomically(path, content, mode, group)
    except OSError as error:
        raise refused(f"{path} can't be written", error) from error


def _is_written(path: str, content: bytes, mode: int, group: int) -> bool:
    """Whether a file of ours is as it would be written: a node's start would sync a handful of them for nothing."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and status.st_nlink == 1
        ours = ours and group in {-1, status.st_gid}
        same = stat.S_IMODE(status.st_mode) == mode and status.st_size == len(content)
        return ours and same and file.read(len(content) + 1) == content


def _write_atomically(path: str, content: bytes, mode: int, group: int) -> None:
    directory = os.path.dirname(path) or "."
    fd, temporary = tempfile.mkstemp(dir=directory, prefix=f".{os.path.basename(path)}.")
    try:
        with os.fdopen(fd, "wb") as file:
            # The group first: it may clear bits of the mode, and until then the file is ours alone.
            if group != -1:
                os.fchown(file.fileno(), -1, group)
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


def link_atomically(path: str, target: str) -> None:
    """Have a symbolic link lead to a target, in place of whatever file had its name. One that is so already is left alone.

    Raises:
        NixletError: The file system refuses, as in ``refused``; what was there before still is.
    """
    # As mkstemp names them: two may be at it at once.
    temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{os.urandom(4).hex()}")
    try:
        if os.path.islink(path) and os.readlink(path) == target:
            return
        os.symlink(target, temporary)
        try:
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        sync_directory(os.path.dirname(path) or ".")
    except OSError as error:
        raise refused(f"{path} can't be made a link", error) from error


def write_whole(fd: int, data: bytes) -> None:
    """Write all of some bytes, without a buffer: what a file system refuses is told here, and not once more when the file is closed.

    Raises:
        OSError: As ``os.write``; some of it may be written.
    """
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def sweep(directory: str, names: Collection[str]) -> None:
    """Remove what is left of files of these names whose writer was killed. Nobody may be writing them meanwhile.

    Raises:
        NixletError: The file system refuses, as in ``refused``.
    """
    with refusing(f"what is left in {directory} can't be removed"):
        for entry in os.listdir(directory):
            name, dot, random = entry.removeprefix(".").rpartition(".")
            if dot and name in names and len(random) == _RANDOM and entry.startswith("."):
                os.unlink(os.path.join(directory, entry))


def new_directory(path: str, mode: int = 0o755) -> None:
    """Make one directory that is not there yet, with exactly this mode.

    Raises:
        OSError: As ``os.mkdir``.
    """
    os.mkdir(path, mode)
    os.chmod(path, mode)


def own_directory(path: str, mode: int = 0o755) -> bool:
    """Have one directory of our own, with exactly this mode; whether it was not there yet.

    Raises:
        OSError: As ``os.mkdir``; also when something else has that name.
    """
    try:
        new_directory(path, mode)
    except FileExistsError:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            # Whoever made it may have been killed before it had its mode.
            status = os.fstat(fd)
            if stat.S_IMODE(status.st_mode) != mode and status.st_uid == os.geteuid():
                os.fchmod(fd, mode)
        finally:
            os.close(fd)
        return False
    return True


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
        NixletError: Something else has that name, or the file system refuses, as in ``refused``.
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
    """A descriptor for writing to a file's end, and for reading; a file that is not there is made with exactly this mode.

    Raises:
        OSError: As ``os.open``.
    """
    with contextlib.suppress(FileExistsError):
        os.close(new_file(path, mode))
    # Without O_CREAT: a symlink that leads to nothing is none of ours to make something of.
    return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)


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
