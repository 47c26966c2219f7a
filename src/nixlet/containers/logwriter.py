"""Writing a container's log, in the form that ``logrecords`` reads: in the node's hands, whoever listens beside it."""

import collections
import contextlib
import datetime
import os

from nixlet.host import files

#: As containerd makes them.
_MODE = 0o640

#: How much of a log's end is looked at at once (bytes).
_BLOCK = 1 << 16


class LogWriter:
    """Writes one container's log.

    The file is opened anew for each piece: who puts a log aside needs to tell nobody.

    Attributes:
        path: The log; empty: there is none, and what is written goes nowhere.
    """

    def __init__(self, path: str = "") -> None:
        self.path = path
        self._missing: collections.Counter[str] = collections.Counter()
        self._unfinished: set[str] = set()

    def write(self, stream: str, data: bytes) -> None:
        """Write a piece of output, after what is to be told of gaps.

        A log that is gone for good (its container was removed) is written no more.

        Raises:
            OSError: It can't be written. How much is missing will stand in the log where it is.
        """
        told, whole = records(stream, data), 0
        try:
            if self._missing:
                self.tell_gaps()
            whole, failure = self._put(told)
            if failure is not None:
                raise failure
        except OSError:
            if whole:
                self._unfinished.discard(stream)
                data = data[_size_of_text(told[:whole]) :]
            self._missing[stream] += len(data)
            raise
        (self._unfinished.discard if data.endswith(b"\n") else self._unfinished.add)(stream)

    @property
    def has_gaps(self) -> bool:
        """Whether something is missing that the log doesn't tell yet."""
        return bool(self._missing)

    def tell_gaps(self) -> None:
        """Write how much is missing, without waiting for more output: there may be none.

        Raises:
            OSError: It can't be written.
        """
        _, failure = self._put(b"".join(self._gap(stream, missing) for stream, missing in self._missing.items()))
        if failure is not None:
            raise failure
        self._unfinished -= self._missing.keys()
        self._missing.clear()

    def _gap(self, stream: str, missing: int) -> bytes:
        told = f"nixlet: {missing} bytes are missing here: the log could not be written\n".encode()
        return records(stream, b"\n" + told if stream in self._unfinished else told)

    def _put(self, data: bytes) -> tuple[int, OSError | None]:
        """Write records. How many bytes of whole ones are there, and what went wrong with the others.

        Raises:
            OSError: The log can't be opened.
        """
        if not self.path:
            return len(data), None
        try:
            fd = files.open_for_appending(self.path, _MODE)
        except (FileNotFoundError, NotADirectoryError):
            # Its directory goes with the container.
            return len(data), None
        try:
            _cut_back(fd)
            return _append(fd, data)
        finally:
            os.close(fd)


def _append(fd: int, data: bytes) -> tuple[int, OSError | None]:
    before, written = os.fstat(fd).st_size, 0
    view = memoryview(data)
    try:
        while written < len(data):
            written += os.write(fd, view[written:])
    except OSError as error:
        # Half a record is none. Whole ones stay: whoever follows the log may have shown them.
        whole = data.rfind(b"\n", 0, written) + 1
        with contextlib.suppress(OSError):
            os.ftruncate(fd, before + whole)
        return whole, error
    return written, None


def _size_of_text(whole: bytes) -> int:
    """How much of a piece of output stands in whole records of finished lines, all of one ``records``."""
    before_text = len(b" ".join(whole.split(b" ", 3)[:3])) + 1
    return len(whole) - whole.count(b"\n") * before_text


def begin(path: str) -> None:
    """Make a log that isn't there yet.

    Raises:
        OSError: It can't be made.
    """
    os.close(files.open_for_appending(path, _MODE))


def _cut_back(fd: int) -> None:
    """Take the beginning of a record away that a writer left who was killed in it: its piece is still in the pipe, and is written again."""
    size = end = os.fstat(fd).st_size
    if not size or os.pread(fd, 1, size - 1) == b"\n":
        return
    while end:
        begin = max(0, end - _BLOCK)
        newline = os.pread(fd, end - begin, begin).rfind(b"\n")
        if newline >= 0:
            end = begin + newline + 1
            break
        end = begin
    os.ftruncate(fd, end)


def records(stream: str, data: bytes) -> bytes:
    """A piece of output as it stands in a log; a line that isn't finished is marked as one that goes on."""
    now = datetime.datetime.now(datetime.UTC).isoformat().replace("+00:00", "Z")
    full, partial = (f"{now} {stream} {tag} ".encode() for tag in "FP")
    whole, newline, rest = data.rpartition(b"\n")
    lines = full + whole.replace(b"\n", b"\n" + full) + b"\n" if newline else b""
    return lines + (partial + rest + b"\n" if rest else b"")
