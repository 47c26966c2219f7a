"""The directories of snapshots: made in advance, measured, deleted. What walks a tree blocks: call it in a thread."""

import collections
import itertools
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterable

from nixlet import errors
from nixlet.host import files, mounts
from nixlet.snapshots import model

#: So many inodes are looked at without a thread.
_FEW = 16

#: Seconds between two of the directories that are made in advance: calls come first.
_BREATH = 0.002

#: How many directories are made in advance; as many as containers that may start at the same moment.
_SPARES = 16


def usage(directory: str) -> model.Usage:
    """What a tree takes, as du(1) counts: blocks of 512 bytes, each inode once."""
    counted = _count(directory, sys.maxsize)
    assert counted is not None
    return counted


def small_usage(directory: str) -> model.Usage | None:
    """The same for a tree of a few files, which takes less time than giving the work to a thread; None for a larger one."""
    return _count(directory, _FEW)


def _count(directory: str, limit: int) -> model.Usage | None:
    status = os.lstat(directory)
    size = status.st_blocks * 512
    seen = {(status.st_dev, status.st_ino)}
    pending = [directory]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                if (status.st_dev, status.st_ino) in seen:
                    continue
                if len(seen) == limit:
                    return None
                seen.add((status.st_dev, status.st_ino))
                size += status.st_blocks * 512
                if stat.S_ISDIR(status.st_mode):
                    pending.append(entry.path)
    return model.Usage(size, len(seen))


def remove_trees(paths: Iterable[str], removed: Callable[[], None] = lambda: None) -> None:
    """Delete the directories of snapshots, but none in which something is mounted; ``removed`` is called after each.

    Raises:
        FailedPreconditionError: Something is mounted in one of them; the others are gone.
    """
    mounted = [entry.path for entry in mounts.table()]
    left = []
    for path in paths:
        inside = [each for each in mounted if each == path or each.startswith(f"{path}/")]
        if inside:
            left.append(inside[-1])
        else:
            shutil.rmtree(path, ignore_errors=True)
            removed()
    if left:
        raise errors.FailedPreconditionError(f"a removed snapshot's directory stays, since {left[0]} is still mounted")


class Spares:
    """Empty directories for snapshots, made in advance: making three takes a file system as long as a durable commit."""

    def __init__(self, directory: str) -> None:
        """Keep them in a directory, on the file system of the snapshots; what is there already is left over and goes."""
        shutil.rmtree(directory, ignore_errors=True)
        files.new_directory(directory, 0o700)
        self._directory = directory
        self._ready: collections.deque[str] = collections.deque()
        self._names = itertools.count(1)
        self._refilling = False

    def take(self) -> str:
        """A directory with an empty ``fs`` and ``work``, for the caller to move away or to delete."""
        return self._ready.popleft() if self._ready else self._make()

    def claim_refill(self) -> bool:
        """Whether it is time to refill, which is up to the caller then."""
        if self._refilling or len(self._ready) >= _SPARES // 2:
            return False
        self._refilling = True
        return True

    def refill(self) -> None:
        """Make as many as should be there; blocks."""
        try:
            while len(self._ready) < _SPARES:
                self._ready.append(self._make())
                time.sleep(_BREATH)
        finally:
            self._refilling = False

    def _make(self) -> str:
        path = os.path.join(self._directory, str(next(self._names)))
        files.new_directory(path, 0o700)
        files.new_directory(os.path.join(path, "fs"), 0o755)
        files.new_directory(os.path.join(path, "work"), 0o711)
        return path
