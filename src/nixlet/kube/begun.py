"""Pods that were begun and are not finished, as files in their directories: what a next node has to undo.

A record is made before anything of the pod is, and goes when the pod has started, or when nothing of it is there any more. A pod
without a record is finished: that nothing is known of one is no reason to take it away.
"""

import os
from collections.abc import Iterator

from nixlet.host import files

#: The record's name in the pod's directory; no container can have it.
_NAME = ".begun"


def begin(directory: str) -> None:
    """Make a pod's directory with the record; both are on the disk when this returns.

    Raises:
        FailedPreconditionError: The file system refuses.
    """
    try:
        files.new_directories(directory)
        fd = files.new_file(os.path.join(directory, _NAME), 0o600)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        files.sync_directory(directory)
        files.sync_directory(os.path.dirname(directory))
    except OSError as error:
        raise files.refused(f"{directory} can't be made", error) from error


def finish(directory: str) -> None:
    """Take the record away: the pod is there.

    Raises:
        FailedPreconditionError: The file system refuses.
    """
    try:
        os.unlink(os.path.join(directory, _NAME))
        files.sync_directory(directory)
    except OSError as error:
        raise files.refused(f"the record in {directory} can't be removed", error) from error


def unfinished(pods_dir: str) -> Iterator[str]:
    """The directories of pods that were begun and not finished."""
    for entry in os.scandir(pods_dir):
        if os.path.exists(os.path.join(entry.path, _NAME)):
            yield entry.path


def uid_of(directory: str) -> str:
    """The UID of the pod that a directory belongs to."""
    return directory.rpartition("_")[2]
