"""What sqlite says of the snapshotter's database, in words."""

import contextlib
import errno
import os
import sqlite3

from nixlet import errors
from nixlet.host import files


def told(path: str, error: BaseException) -> Exception:
    """What whoever waits for a change is told.

    Args:
        path: The database's file.
        error: Why the change was not made: sqlite's reason is put in words, and what would end more than one change is not
            thrown at those who wait for it.
    """
    if isinstance(error, sqlite3.Error):
        said = in_words(path, error)
        said.__cause__ = error
        return said
    # No future takes a StopIteration.
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    wrapped = errors.UnavailableError(f"a change of the snapshotter's database {path} failed: {type(error).__name__}")
    wrapped.__cause__ = error
    return wrapped


def in_words(path: str, error: sqlite3.Error) -> errors.NixletError:
    """What sqlite says, with what to do about it (https://www.sqlite.org/rescode.html)."""
    # Errors that Python makes up itself have no code.
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    what = f"the snapshotter's database {path}"
    if code == sqlite3.SQLITE_FULL or (code in {sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN} and _disk_is_full(path)):
        return files.refused(f"{what} can't be written", OSError(errno.ENOSPC, ""))
    if code == sqlite3.SQLITE_IOERR:
        return files.refused(f"{what} can't be used", OSError(errno.EIO, ""))
    if code == sqlite3.SQLITE_READONLY:
        return files.refused(f"{what} can't be written", OSError(errno.EROFS, ""))
    if code in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}:
        return unreadable(path, error)
    return errors.UnavailableError(f"{what} can't be used: {error}")


def unreadable(path: str, error: Exception) -> errors.FailedPreconditionError:
    """The error for a database, or for something in it, that can't be read."""
    return errors.FailedPreconditionError(
        f"the snapshotter's database {path} can't be read: {error}", hint=way_out(path)
    )


def uncertain(problem: Exception) -> Exception:
    """The same, for a change of which nobody knows yet whether it was made."""
    if not isinstance(problem, errors.NixletError):
        return problem
    said = type(problem)(f"{problem.message}; the next start may find the change made", hint=problem.hint)
    said.__cause__ = problem
    return said


def _disk_is_full(path: str) -> bool:
    # A broken disk doesn't even say that.
    with contextlib.suppress(OSError):
        return files.is_full(os.path.dirname(path))
    return False


def way_out(path: str) -> str:
    """What to do about a database that can't be used any more, as a hint.

    containerd relies on the snapshots that it was told of: its own directory (of which the snapshotter's is often a part) has to begin
    anew as well.
    """
    return (
        f"restore {path} from a backup; or, to begin anew: end nixlet and containerd, move containerd's directory and"
        f" {os.path.dirname(path)} away, and load the images again"
    )
