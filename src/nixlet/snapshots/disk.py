"""What snapshots take of the disk, and freeing it. All functions here block: call them in a thread."""

import os
import shutil
import stat

from nixlet import errors
from nixlet.host import mounts
from nixlet.snapshots import model


def usage(directory: str) -> model.Usage:
    """What a tree takes, as du(1) counts: blocks of 512 bytes, each inode once."""
    size = 0
    seen: set[tuple[int, int]] = set()
    pending = [directory]
    status = os.lstat(directory)
    seen.add((status.st_dev, status.st_ino))
    size += status.st_blocks * 512
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
                size += status.st_blocks * 512
                if stat.S_ISDIR(status.st_mode):
                    pending.append(entry.path)
    return model.Usage(size, len(seen))


def remove_tree(path: str) -> None:
    """Delete a snapshot's directory, unless something is mounted in it."""
    mounted = mounts.below(path)
    if mounted:
        raise errors.FailedPreconditionError(f"{path} is not removed: {mounted[-1].path} is still mounted")
    shutil.rmtree(path, ignore_errors=True)
