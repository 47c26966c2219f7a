"""Which archives outside the store a ``nix:0`` reference may open.

Whoever may create a pod may write such a reference, so it must not become a way to read, or to find out about, other files of the
node: only archives of trusted owners below directories that the administrator chose, and one answer for everything else.
"""

import contextlib
import os
import stat
from collections.abc import Collection, Iterator, Sequence

from nixlet import errors


class NotAdmittedError(errors.NotFoundError):
    """The one answer for a path that is missing, unreadable, in another place, a link, or no archive.

    Attributes:
        reason: What it is in truth, for those who may read the node's files anyway.
    """

    def __init__(self, path: str, archive_dirs: Sequence[str], reason: errors.NixletError) -> None:
        places = ", ".join(archive_dirs) or "none"
        super().__init__(
            f"there is no image archive {path}",
            hint=f"an archive must be a regular file, not writable for everyone, that root or the node's user owns, below one "
            f"of the archive directories ({places}), with no symbolic links on the way",
        )
        self.reason = reason


@contextlib.contextmanager
def open_allowed_archive(path: str, archive_dirs: Sequence[str], owner_uids: Collection[int]) -> Iterator[int]:
    """Open an archive outside the store for reading, if the rules allow it.

    Args:
        path: Absolute and normalised, as ``reference.parse`` leaves it.
        archive_dirs: Absolute paths; links in these are followed, they are the administrator's.
        owner_uids: Whose files are trusted.

    Raises:
        NotAdmittedError: It can't be opened, for whatever reason.
    """
    try:
        fd = _open(path, archive_dirs, owner_uids)
    except errors.NixletError as error:
        raise NotAdmittedError(path, archive_dirs, error) from error
    except OSError as error:
        reason = errors.NotFoundError(f"the image archive {path} can't be opened: {error.strerror}")
        raise NotAdmittedError(path, archive_dirs, reason) from error
    try:
        yield fd
    finally:
        os.close(fd)


def _open(path: str, archive_dirs: Sequence[str], owner_uids: Collection[int]) -> int:
    bases = [base for base in (directory.rstrip("/") + "/" for directory in archive_dirs) if path.startswith(base)]
    if not bases:
        raise errors.NotFoundError(
            f"{path} lies below none of the archive directories ({', '.join(archive_dirs) or 'there are none'})",
            hint="put the archive there, or start the node with --archive-dir",
        )
    for base in bases[:-1]:
        with contextlib.suppress(OSError, errors.NixletError):
            return _open_below(base, path.removeprefix(base).split("/"), owner_uids)
    return _open_below(bases[-1], path.removeprefix(bases[-1]).split("/"), owner_uids)


def _open_below(base: str, parts: Sequence[str], owner_uids: Collection[int]) -> int:
    path = base + "/".join(parts)
    if any(part in {"", ".", ".."} for part in parts):
        raise errors.NotFoundError(f"{path} is not written without '.', '..' and '//'")
    with contextlib.ExitStack() as stack:
        fd = os.open(base, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        # O_PATH opens nothing: what a name stands for is known before a device or a FIFO could be touched.
        for number in range(len(parts)):
            fd = os.open(parts[number], os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            stack.callback(os.close, fd)
            if stat.S_ISLNK(os.fstat(fd).st_mode):
                raise errors.NotFoundError(
                    f"{base}{'/'.join(parts[: number + 1])} is a symbolic link, which isn't followed",
                    hint="name what it leads to, or put a copy there",
                )
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise errors.NotFoundError(f"{path} is not an image archive: it is no regular file")
        if status.st_uid not in owner_uids:
            raise errors.NotFoundError(
                f"the image archive {path} belongs to user {status.st_uid}, whom the node doesn't trust",
                hint=f"give it to root: chown root {path}",
            )
        if status.st_mode & stat.S_IWOTH:
            raise errors.NotFoundError(
                f"the image archive {path} can be written by everyone", hint=f"take that away: chmod o-w {path}"
            )
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
