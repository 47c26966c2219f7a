"""Log files of limited size: when one is full it is put aside under a number, and the oldest goes.

``containerd.log`` is the current file, ``containerd.log.1`` the one before it, ``containerd.log.2`` the one before that. Nobody
else may write to them: a file that another process holds open would be written to on and on after it was put aside.
"""

import contextlib
import itertools
import os
import stat
from typing import Self

from nixlet.host import files

#: A file's size (bytes) and the number of older ones that are kept; k3s keeps as much of its containerd.
LIMIT = 50 << 20
BACKUPS = 3

#: How many times its size a file may have for the sake of a line that doesn't end.
_STRETCH = 4


class RotatingFile:
    """A file that is appended to, for the time of a ``with`` block or until ``close``."""

    def __init__(self, path: str, *, limit: int = LIMIT, backups: int = BACKUPS) -> None:
        """Open or go on with the file at ``path``.

        Args:
            path: The file; its directory must be there.
            limit: Bytes that it may have; a line is not cut for it before it has four times as many.
            backups: How many older files are kept.

        Raises:
            OSError: It can't be opened.
        """
        self.path = path
        self._limit = limit
        self._backups = backups
        self._take(self._open(path))

    @staticmethod
    def _open(path: str) -> int:
        # O_APPEND: what a process that is just ending still writes doesn't overwrite our lines.
        return files.open_for_appending(path, 0o640)

    def _take(self, fd: int) -> None:
        self._fd = fd
        status = os.fstat(fd)
        # A terminal, a pipe or /dev/null must never be put aside.
        self._rotates = stat.S_ISREG(status.st_mode)
        self._size = status.st_size
        self._line_ended = True

    def write(self, data: bytes) -> None:
        """Append bytes, in a new file where the old one is full.

        A disk that is full or broken loses lines, and nothing else: whoever logs must not end or wait because of its log.
        """
        if self._rotates and self._size + len(data) > self._limit and self._size:
            end = 0 if self._line_ended else data.find(b"\n") + 1
            if end or self._line_ended or self._size > _STRETCH * self._limit:
                self._append(data[:end])
                self._rotate()
                data = data[end:]
        self._append(data)

    def _append(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            while data:
                written = os.write(self._fd, data)
                self._size += written
                self._line_ended = data[written - 1] == ord("\n")
                data = data[written:]

    def _rotate(self) -> None:
        # The new one first: where none can be had, as where too many files are open, the old one grows on, and no older one goes.
        following = f"{self.path}.new"
        try:
            fd = self._open(following)
        except OSError:
            return
        # Only as far as there is no room: what was put aside and then got no successor moves no further with each next try.
        older = (f"{self.path}.{number}" for number in range(1, self._backups))
        last = 1 + sum(1 for _ in itertools.takewhile(os.path.lexists, older)) if self._backups else 0
        try:
            for number in range(last, 0, -1):
                source = self.path if number == 1 else f"{self.path}.{number - 1}"
                with contextlib.suppress(FileNotFoundError):
                    os.replace(source, f"{self.path}.{number}")
            os.replace(following, self.path)
        except OSError:
            # What can't be put aside just grows on.
            os.close(fd)
            with contextlib.suppress(OSError):
                os.unlink(following)
            return
        os.close(self._fd)
        self._take(fd)

    def close(self) -> None:
        """Close it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
