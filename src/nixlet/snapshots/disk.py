"""The directories of snapshots: made in advance, measured, deleted. What walks a tree blocks: call it in a thread."""

import collections
import contextlib
import dataclasses
import itertools
import logging
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterable, Sequence

from nixlet import errors
from nixlet.host import files, mounts
from nixlet.snapshots import mappedroots, model

_log = logging.getLogger("nixlet.snapshots")

#: So many files of a layer, and of so many bytes, are written to the disk one by one.
_FEW_FILES = 64
_FEW_BYTES = 16 << 20

#: Seconds between two of the directories that are made in advance: calls come first.
_BREATH = 0.002

#: How many directories are made in advance; as many as containers that may start at the same moment.
_SPARES = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Content:
    """What is in a snapshot.

    Attributes:
        usage: What it takes, as du(1) counts: blocks of 512 bytes, each inode once.
        files: Its plain files, or the first of them if they are many.
        directories: Its directories, each before those in it, but for empty ones that a closure covers: those have to be there, and
            no more, which the entries of the directory that they are in say.
    """

    usage: model.Usage
    files: Sequence[str]
    directories: Sequence[str]


def content(directory: str, mount_points: str = "") -> Content:
    """Look at a tree; ``mount_points`` is the directory in it whose empty directories a closure covers."""
    found = _look(directory, mount_points, sys.maxsize)
    assert found is not None
    return found


def empty_usage(directory: str) -> model.Usage | None:
    """What an empty directory takes of the disk; None for another one."""
    found = _look(directory, "", 1)
    return None if found is None else found.usage


def _look(directory: str, mount_points: str, limit: int) -> Content | None:
    status = os.lstat(directory)
    size = status.st_blocks * 512
    seen = {(status.st_dev, status.st_ino)}
    pending, plain, directories = [directory], list[str](), list[str]()
    while pending:
        base, empty = pending.pop(), True
        # A container may delete what is being counted.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(base) as entries:
            for entry in entries:
                empty = False
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if (status.st_dev, status.st_ino) in seen:
                    continue
                if len(seen) == limit:
                    return None
                seen.add((status.st_dev, status.st_ino))
                size += status.st_blocks * 512
                if stat.S_ISDIR(status.st_mode):
                    pending.append(entry.path)
                elif stat.S_ISREG(status.st_mode) and len(plain) <= _FEW_FILES:
                    plain.append(entry.path)
        if not empty or os.path.dirname(base) != mount_points:
            directories.append(base)
    return Content(model.Usage(size, len(seen)), plain, directories)


def sync_layer(directory: str, mount_points: str = "") -> model.Usage:
    """Write a layer's content to the disk, which is trusted from now on because it is there: the pause image's, for one.

    Only for a layer of few files that aren't large. What an ordinary image has takes seconds, for which all of containerd would
    wait: its own snapshotters don't write that out either. Nor are 500 mount points synced each by itself, which takes a tenth of a
    second.

    Args:
        directory: The layer.
        mount_points: As in ``content``.

    Returns:
        What the layer takes of the disk.
    """
    found = content(directory, mount_points)
    if found.usage.size > _FEW_BYTES or len(found.files) > _FEW_FILES:
        return found.usage
    for path in found.files:
        # The content is foreign: a link in it would lead elsewhere on the host.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    # Each directory: not every file system writes what was made below one with it. At last its own name, and that of what it is in.
    snapshot = os.path.dirname(directory)
    for path in (*reversed(found.directories), snapshot, os.path.dirname(snapshot)):
        files.sync_directory(path)
    return found.usage


def numbers(directory: str) -> set[int]:
    """The snapshots that have a directory in one; what has another name there is somebody else's."""
    return {int(name) for name in os.listdir(directory) if name.isascii() and name.isdecimal()}


def has_content(directory: str) -> bool:
    """Whether somebody wrote into a snapshot."""
    try:
        with os.scandir(os.path.join(directory, "fs")) as entries:
            return any(True for _ in entries)
    except FileNotFoundError:
        return False


def lost_content(number: int) -> errors.FailedPreconditionError:
    """The error for a layer whose directory is not there."""
    return errors.FailedPreconditionError(
        f"layer {number} has lost its content, as after a power cut",
        hint="remove the images that have it and pull them again",
    )


def _never() -> bool:
    return False


def remove_trees(
    paths: Iterable[str], removed: Callable[[], None] = lambda: None, stopped: Callable[[], bool] = _never
) -> None:
    """Delete the directories of snapshots; ``removed`` is called after each, and ``stopped`` asked before each entry.

    One in which something is mounted stays, as does what can't be deleted: the log says so, and the next sweep tries again.
    """
    mounted = [entry.path for entry in mounts.table()]
    for path in paths:
        real = os.path.realpath(path)
        inside = [each for each in mounted if each == real or each.startswith(f"{real}/")]
        if inside:
            with contextlib.suppress(errors.NixletError):
                mappedroots.unmount(path)
            inside = [entry.path for entry in mounts.below(path)]
        if inside:
            _log.warning("the directory %s of a removed snapshot stays, since %s is still mounted", path, inside[-1])
            continue
        try:
            if not _remove_tree(path, stopped):
                return
        except FileNotFoundError:
            pass
        except OSError as error:
            _log.warning("the directory %s of a removed snapshot stays: %s", path, error)
            continue
        removed()


def _remove_tree(directory: str, stopped: Callable[[], bool]) -> bool:
    """As ``shutil.rmtree``, which can't be stopped; whether it came to the end."""
    # Most are empty.
    with contextlib.suppress(OSError):
        for name in ("fs", "work", ""):
            os.rmdir(os.path.join(directory, name))
        return True
    for _, directories, names, parent in os.fwalk(directory, topdown=False):
        for name in (*names, *directories):
            if stopped():
                return False
            try:
                os.unlink(name, dir_fd=parent)
            except IsADirectoryError:
                os.rmdir(name, dir_fd=parent)
    os.rmdir(directory)
    return True


class Spares:
    """Empty directories for snapshots, made in advance: making three takes a file system as long as a durable commit."""

    def __init__(self, directory: str) -> None:
        """Keep them in a directory, on the file system of the snapshots; what is there already is left over and goes.

        Raises:
            NixletError: The directory can't be made, as in ``files.refused``.
        """
        shutil.rmtree(directory, ignore_errors=True)
        files.make_directory(directory, mode=0o700)
        self._directory = directory
        self._ready: collections.deque[str] = collections.deque()
        self._names = itertools.count(1)
        self._refilling = False

    def take(self) -> str:
        """A directory with an empty ``fs`` and ``work``, for the caller to move away or to delete."""
        # Others may take the last one in another thread.
        with contextlib.suppress(IndexError):
            return self._ready.popleft()
        return self._make()

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
        try:
            files.new_directory(path, 0o700)
            files.new_directory(os.path.join(path, "fs"), 0o755)
            files.new_directory(os.path.join(path, "work"), 0o711)
        except OSError:
            shutil.rmtree(path, ignore_errors=True)
            raise
        return path
