"""Which archives outside the store a ``nix:0`` reference may open.

Whoever may create a pod may write such a reference, so it must not become a way to read, or to find out about, other files of the
node: only archives of trusted owners below directories that the administrator chose, and one answer for everything else.
"""

import contextlib
import os
import stat
from collections.abc import Collection, Iterator, Sequence

from nixlet import errors


def no_archive(path: str, archive_dirs: Sequence[str]) -> errors.NotFoundError:
    """The one error for a path that is missing, unreadable, in another place, a link, or no archive."""
    places = ", ".join(archive_dirs) or "none"
    return errors.NotFoundError(
        f"there is no image archive {path}",
        hint=f"an archive must be a regular file, not writable for everyone, that root or the node's user owns, below one of "
        f"the archive directories ({places}), with no symbolic links on the way",
    )


@contextlib.contextmanager
def open_allowed_archive(path: str, archive_dirs: Sequence[str], owner_uids: Collection[int]) -> Iterator[int]:
    """Open an archive outside the store for reading, if the rules allow it.

    Args:
        path: Absolute and normalised, as ``reference.parse`` leaves it.
        archive_dirs: Absolute paths; links in these are followed, they are the administrator's.
        owner_uids: Whose files are trusted.

    Raises:
        NotFoundError: It can't be opened, for whatever reason.
    """
    try:
        fd = _open(path, archive_dirs, owner_uids)
    except OSError as error:
        # Not even the cause may reach the caller's answer: it would tell a missing file from a forbidden one.
        raise no_archive(path, archive_dirs) from error
    try:
        yield fd
    finally:
        os.close(fd)


def _open(path: str, archive_dirs: Sequence[str], owner_uids: Collection[int]) -> int:
    for directory in archive_dirs:
        base = directory.rstrip("/") + "/"
        if path.startswith(base):
            with contextlib.suppress(OSError):
                return _open_below(base, path.removeprefix(base).split("/"), owner_uids)
    raise PermissionError(path)


def _open_below(base: str, parts: Sequence[str], owner_uids: Collection[int]) -> int:
    if any(part in {"", ".", ".."} for part in parts):
        raise PermissionError(parts)
    with contextlib.ExitStack() as stack:
        fd = os.open(base, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        for part in parts[:-1]:
            fd = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            stack.callback(os.close, fd)
        # O_PATH opens nothing: what the name stands for is known before a device or a FIFO could be touched.
        fd = os.open(parts[-1], os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
        stack.callback(os.close, fd)
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid not in owner_uids or status.st_mode & stat.S_IWOTH:
            raise PermissionError(parts[-1])
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
