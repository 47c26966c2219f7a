"""Files as a process with another root directory sees them: no link in there leads out of it, whatever its owner makes of it."""

import errno
import os
import stat
from collections import deque

#: As many links as the kernel follows (path_resolution(7)).
_MAX_LINKS = 40


def read(root: str, path: str, max_bytes: int) -> bytes:
    """The beginning of a regular file.

    Args:
        root: The root directory, as in ``/proc/7/root``.
        path: The file as seen from there; links are followed, absolute ones from ``root``.
        max_bytes: How much of it is read.

    Raises:
        OSError: It can't be opened or read, or is no regular file.
    """
    directories = [os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)]
    try:
        pending = deque(path.split("/"))
        links = 0
        while pending:
            part = pending.popleft()
            if part == "..":
                if len(directories) > 1:
                    os.close(directories.pop())
            elif part not in {"", "."}:
                # The kernel follows nothing here: not even /proc's links, which lead to places without a path.
                fd = os.open(part, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directories[-1])
                if not stat.S_ISLNK(os.fstat(fd).st_mode):
                    directories.append(fd)
                    continue
                try:
                    target = os.readlink("", dir_fd=fd)
                finally:
                    os.close(fd)
                links += 1
                if links > _MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
                if target.startswith("/"):
                    while len(directories) > 1:
                        os.close(directories.pop())
                pending.extendleft(reversed(target.split("/")))
        if not stat.S_ISREG(os.fstat(directories[-1]).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", path)
        with open(f"/proc/self/fd/{directories[-1]}", "rb") as file:
            return file.read(max_bytes)
    finally:
        for fd in directories:
            os.close(fd)
