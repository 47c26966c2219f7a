"""What is known of pods by files in their directories: whose they are, and which were begun and are not finished.

A record is made before anything of the pod is, and names the containerd that was asked for it: a node may use now one and now
another, and what one of them doesn't know may run at the other. The record gets another name when the pod has started, and its first one
again when the pod goes and nobody waits for that; it goes with the directory. A pod without a record is nobody's: that nothing is known of one is no reason to take it away.
"""

import contextlib
import os
from collections.abc import Iterator

from nixlet.host import files

#: The record's name in the pod's directory while the pod is begun, and afterwards; no container can have these.
_BEGUN = ".begun"
_FINISHED = ".containerd"


def begin(directory: str, containerd: str) -> None:
    """Make a pod's directory with the record; both are on the disk when this returns.

    Args:
        directory: The directory.
        containerd: The identity of the containerd that is asked for the pod.

    Raises:
        FailedPreconditionError: The file system refuses.
    """
    try:
        files.new_directories(directory)
        fd = files.new_file(os.path.join(directory, _BEGUN), 0o600)
        try:
            os.write(fd, containerd.encode())
            os.fsync(fd)
        finally:
            os.close(fd)
        files.sync_directory(directory)
        files.sync_directory(os.path.dirname(directory))
    except OSError as error:
        raise files.refused(f"{directory} can't be made", error) from error


def finish(directory: str) -> None:
    """Note that the pod is there.

    Raises:
        FailedPreconditionError: The file system refuses.
    """
    _rename(directory, _BEGUN, _FINISHED)


def leave(directory: str) -> None:
    """Note that the pod goes: it is unfinished again, so that a next node takes away what this one doesn't get to.

    Raises:
        FailedPreconditionError: The file system refuses, or the pod has no record.
    """
    _rename(directory, _FINISHED, _BEGUN)


def _rename(directory: str, before: str, after: str) -> None:
    try:
        os.rename(os.path.join(directory, before), os.path.join(directory, after))
        files.sync_directory(directory)
    except OSError as error:
        raise files.refused(f"the record in {directory} can't be changed", error) from error


def unfinished(pods_dir: str, containerd: str) -> Iterator[str]:
    """The directories of a containerd's pods that were begun and not finished."""
    return _recorded(pods_dir, containerd, _BEGUN)


def finished(pods_dir: str, containerd: str) -> Iterator[str]:
    """The directories of a containerd's pods that have started."""
    return _recorded(pods_dir, containerd, _FINISHED)


def _recorded(pods_dir: str, containerd: str, name: str) -> Iterator[str]:
    for entry in os.scandir(pods_dir):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            with open(os.path.join(entry.path, name), "rb") as file:
                known = file.read()
            if known == containerd.encode():
                yield entry.path


def uid_of(directory: str) -> str:
    """The UID of the pod that a directory belongs to."""
    return directory.rpartition("_")[2]
