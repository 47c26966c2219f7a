"""Files that a node obeys: nobody but root and the node's own user may be able to change them.

A configuration file names programs that the node runs as root, so whoever can write it, or swap it for another, is root.

In the user namespace of an ordinary user's node that user is root, and what belongs to the machine's root looks as if it belonged to
anybody else. So whoever makes the namespace says before which files and directories are root's (``of_root``), by their numbers.
"""

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from nixlet import errors
from nixlet.host import userns
from nixlet.node.settings import names

#: As many links as the kernel follows (path_resolution(7)).
_MAX_LINKS = 40


def read(path: str, max_bytes: int) -> bytes:
    """What stands in a configuration file that only root and the node's own user can write.

    Args:
        path: The file; symbolic links are followed.
        max_bytes: How large it may be.

    Raises:
        UsageError: It is missing, can't be read, is no regular file, or is larger.
        PermissionDeniedError: Somebody else can write it, or a directory on the way to it.
    """
    with opened(path, "the configuration file") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise errors.UsageError(f"the configuration file {path} is larger than {max_bytes} bytes")
    return content


@contextlib.contextmanager
def opened(path: str, what: str) -> Iterator[BinaryIO]:
    """A file that only root and the node's own user can write, open for reading.

    The directories that lead to it are looked at as well, those behind symbolic links too: in a directory that others can
    write, a file can be replaced. A sticky directory (/tmp, /nix/store) keeps its files from that.

    Args:
        path: The file; symbolic links are followed.
        what: What errors call it.

    Raises:
        UsageError: It is missing, can't be read, or is no regular file.
        PermissionDeniedError: Somebody else can write it, or a directory on the way to it.
    """
    try:
        file = open(path, "rb", opener=_open)  # noqa: SIM115 (closed below)
    except OSError as error:
        raise errors.UsageError(f"{what} {path} can't be read: {error.strerror}") from error
    with file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise errors.UsageError(f"{what} {path} is not a regular file")
        _check(path, status, sticky_is_safe=False)
        for directory in sorted(_directories(path, os.readlink(f"/proc/self/fd/{file.fileno()}"))):
            _check(directory, os.stat(directory), sticky_is_safe=True)
        yield file


def check_directory(path: str) -> None:
    """Check that only root and the node's own user can put files into a directory.

    Raises:
        PermissionDeniedError: Somebody else can.
    """
    _check(path, os.stat(path), sticky_is_safe=False)


def of_root(paths: Iterable[str]) -> str:
    """Which of some files, and of the directories that lead to them, are root's: what ``names.INSIDE`` says in the namespaces of a node."""
    found = set()
    for path in paths:
        real = os.path.realpath(path)
        for each in (real, *_directories(path, real)):
            with contextlib.suppress(OSError):
                status = os.stat(each)
                if status.st_uid == 0:
                    found.add(_number(status))
    return ",".join(sorted(found))


def _number(status: os.stat_result) -> str:
    return f"{status.st_dev}:{status.st_ino}"


def _is_trusted(status: os.stat_result) -> bool:
    if status.st_uid in {0, os.geteuid()}:
        return True
    return userns.is_inside() and _number(status) in os.environ.get(names.INSIDE, "").split(",")


def _open(path: str, flags: int) -> int:
    """Not blocking: a FIFO would keep us waiting for its writer."""
    return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)


def _directories(path: str, real_path: str) -> set[str]:
    """The directories where a name on the way to a file could be changed."""
    directories = set(_parents(real_path))
    step = os.path.abspath(path)
    for _ in range(_MAX_LINKS):
        directories.update(_parents(step))
        if not os.path.islink(step):
            break
        step = os.path.abspath(os.path.join(os.path.dirname(step), os.readlink(step)))
    return directories


def _parents(path: str) -> Iterator[str]:
    while path != "/":
        path = os.path.dirname(path)
        yield path


def _check(path: str, status: os.stat_result, *, sticky_is_safe: bool) -> None:
    if not _is_trusted(status):
        inside = userns.is_inside()
        raise errors.PermissionDeniedError(
            f"{path} belongs to {'another user' if inside else f'user {status.st_uid}'}, who could have the node run anything",
            hint=f"check what stands there, then: chown {'YOU' if inside else 'root'} {path}",
        )
    if sticky_is_safe and status.st_mode & stat.S_ISVTX:
        return
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        who = "everyone" if status.st_mode & stat.S_IWOTH else f"group {status.st_gid}"
        raise errors.PermissionDeniedError(
            f"{path} can be written by {who}, who could have the node run anything",
            hint=f"check what stands there, then: chmod go-w {path}",
        )
