"""Unnamed temporary files for what an archive expands to or a pipe has: they leave others, the node's database among them, some room."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from typing import IO

from nixlet import errors
from nixlet.host import files

#: What stays free of a file system: this part of it, but not more than this many bytes.
_RESERVED_PART, _RESERVED_BYTES = 20, 1024**3


class ScratchFile:
    """A temporary file that is written piece by piece; its end is that of ``opened``'s context."""

    def __init__(self, file: IO[bytes], what: str, hint: str) -> None:
        self._file = file
        self._what = what
        self._hint = hint

    def write(self, data: bytes) -> None:
        """Write what comes next.

        Raises:
            NixletError: The file system refuses, as in ``files.refused``, or others would have too little room.
        """
        try:
            _check_room(self._file.fileno(), len(data))
            files.write_whole(self._file.fileno(), data)
        except OSError as error:
            raise _refused(self._what, self._hint, error) from error

    def fileno(self) -> int:
        """The open file."""
        return self._file.fileno()


@contextlib.contextmanager
def opened(what: str, directory: str | None = None) -> Iterator[ScratchFile]:
    """An empty file for the time of the context.

    Args:
        what: The beginning of an error's sentence, which the place follows ("x can't be copied to").
        directory: Where it goes; the system's directory for temporary files by default.

    Raises:
        NixletError: The file system refuses, as in ``files.refused``; or the system has no such directory.
    """
    place, hint = directory, ""
    if place is None:
        try:
            place = tempfile.gettempdir()
        except OSError as error:
            raise errors.FailedPreconditionError(
                f"{what} a temporary file: there is no directory for such that can be written",
                hint="make room there, or name another directory: TMPDIR",
            ) from error
        hint = f"make room in {place}, or name another directory: TMPDIR"
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(tempfile.TemporaryFile(dir=place, buffering=0))
        except OSError as error:
            raise _refused(f"{what} {place}", hint, error) from error
        yield ScratchFile(file, f"{what} {place}", hint)


def _refused(what: str, hint: str, error: OSError) -> errors.NixletError:
    refused = files.refused(what, error)
    if hint and refused.hint:
        refused.hint = hint
    return refused


def _check_room(fd: int, length: int) -> None:
    """Leave others some room on the file system.

    Raises:
        OSError: There would be too little (ENOSPC).
    """
    system = os.fstatvfs(fd)
    reserve = min(system.f_blocks * system.f_frsize // _RESERVED_PART, _RESERVED_BYTES)
    # A file system that says 0 doesn't know its size.
    if system.f_blocks and system.f_bavail * system.f_frsize < length + reserve:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
