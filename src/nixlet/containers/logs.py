"""The files of containers' logs: read from the end or the beginning, and followed when they grow and are put aside.

A log is a directory that is open and a name in it, so that who may not find the directory can be handed it. What is read are pieces of
whole lines, as ``logrecords`` takes them. The command line reads this module: it imports nothing that takes time.
"""

import collections
import contextlib
import datetime
import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import IO

from nixlet.containers import logrecords

#: Seconds between two looks at a log that is being followed.
_INTERVAL = 0.01

#: Seconds for the last words that go to a file that was put aside.
_SETTLING = 0.05

#: How much is read at once (bytes). More is slower: memory of that size is used again, larger pieces are given back each time.
_CHUNK = 1 << 16

#: What a log's name gets when it is put aside: the time, so that names are in the order of time.
_ASIDE = re.compile(r"\.\d{8}-\d{6}\.\d{6}")


class Log:
    """A container's log.

    Attributes:
        directory: The descriptor of the directory that its files are in; the caller's.
        name: What the file is called that is written.
    """

    def __init__(self, directory: int, name: str) -> None:
        self.directory = directory
        self.name = name

    def names(self) -> list[str]:
        """Its files from the oldest to the one that is written: those that were put aside are named by the time of that."""
        length = len(self.name)
        aside = [
            each for each in os.listdir(self.directory) if each.startswith(self.name) and _ASIDE.fullmatch(each, length)
        ]
        return [*sorted(aside), self.name]

    def open(self, name: str) -> IO[bytes]:
        """One of its files, for reading; the caller closes it."""
        return open(os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.directory), "rb", buffering=0)

    def stat(self, name: str) -> os.stat_result:
        """What the file system says of one of its files."""
        return os.stat(name, dir_fd=self.directory)


@contextlib.contextmanager
def at(path: str) -> Iterator[Log]:
    """The log that is written to a path.

    Raises:
        FileNotFoundError: Its directory isn't there.
    """
    directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield Log(directory, os.path.basename(path))
    finally:
        os.close(directory)


def _opened(log: Log) -> "collections.deque[IO[bytes]]":
    """A log's files, opened, from the oldest to the one that is written: their names are others' soon.

    Whatever takes the log's name after the opening comes after these.
    """
    newest = None
    with contextlib.suppress(FileNotFoundError):
        newest = log.open(log.name)
    files: collections.deque[IO[bytes]] = collections.deque()
    # Those that were put aside are looked for now, so that the newest may be among them, and others that are newer still.
    for name in log.names()[:-1]:
        with contextlib.suppress(FileNotFoundError):
            file = log.open(name)
            if newest is not None and os.path.sameopenfile(file.fileno(), newest.fileno()):
                file.close()
                break
            files.append(file)
    if newest is not None:
        files.append(newest)
    return files


def _close(files: Iterable[IO[bytes]]) -> None:
    for file in files:
        file.close()


def _skip_to_tail(files: "collections.deque[IO[bytes]]", lines: int | None) -> list[int]:
    """Leave out what comes before the last lines; None: nothing. A line that was written in pieces is one.

    Returns:
        The size of each of the files that are left, as it was when the lines were counted.
    """
    sizes = [os.fstat(file.fileno()).st_size for file in files]
    if lines is None:
        return sizes
    for number in reversed(range(len(files))):
        offset, found = _tail(files[number], sizes[number], lines)
        lines -= found
        if not lines:
            files[number].seek(offset)
            for _ in range(number):
                files.popleft().close()
            return sizes[number:]
    return sizes


def _tail(file: IO[bytes], size: int, lines: int) -> tuple[int, int]:
    """Where the last lines of a file begin, in bytes, and how many they are."""
    if not lines:
        return size, 0
    found, following = 0, -1
    for offset, line in _backwards(file, size):
        if following >= 0 and logrecords.parse_line(line).text.endswith(b"\n"):
            found += 1
            if found == lines:
                return following, found
        following = offset
    return 0, found + (following >= 0)


def _backwards(file: IO[bytes], size: int) -> Iterator[tuple[int, bytes]]:
    """The lines of a file from the last to the first, each with where it begins, in bytes."""
    end, rest = size, b""
    while end:
        begin = max(0, end - _CHUNK)
        data = os.pread(file.fileno(), end - begin, begin) + rest
        position = len(data)
        # A line's last byte is its own newline.
        while (newline := data.rfind(b"\n", 0, max(0, position - 1))) >= 0:
            yield begin + newline + 1, data[newline + 1 : position]
            position = newline + 1
        end, rest = begin, data[:position]
    if rest:
        yield 0, rest


def last_lines(path: str, count: int) -> str:
    """The last lines of a log, as text; empty where there is none."""
    text = b""
    with contextlib.suppress(OSError):
        text = b"".join(record.text for record in records(path, lines=count))
    return text.decode(errors="replace")


def records(path: str, *, lines: int | None = None) -> Iterator[logrecords.Record]:
    """What the log that is written to a path has now; ``lines`` is that of ``there``."""
    with at(path) as log:
        for block in there(log, lines=lines):
            yield from logrecords.parse(block)


class _Cut:
    """Cuts what is read of a file into whole lines."""

    def __init__(self) -> None:
        self._rest: list[bytes] = []

    def whole(self, data: bytes) -> bytes:
        """The lines that end in ``data``, with what began them."""
        end = data.rfind(b"\n") + 1
        if not end:
            self._rest.append(data)
            return b""
        found = b"".join((*self._rest, data[:end])) if self._rest else data[:end]
        self._rest = [data[end:]] if end < len(data) else []
        return found

    def rest(self) -> bytes:
        """What has begun and won't end."""
        found, self._rest = b"".join(self._rest), []
        return found


def there(log: Log, *, lines: int | None = None) -> Iterator[bytes]:
    """What a log has now, in pieces; what is written while it is read is not among it.

    Args:
        log: The log.
        lines: Only so many of the last lines; None: all.
    """
    files = _opened(log)
    try:
        for file, size in zip(files, _skip_to_tail(files, lines), strict=True):
            cut, left = _Cut(), size - file.tell()
            while data := file.read(max(0, min(left, _CHUNK))):
                left -= len(data)
                if whole := cut.whole(data):
                    yield whole
            if rest := cut.rest():
                yield rest
    finally:
        _close(files)


def follow(log: Log, ended: Callable[[], bool], *, lines: int | None = None) -> Generator[bytes | float, None, None]:
    """What a log has, and what comes until ``ended`` says that no more will: in pieces, and between them seconds to wait.

    Rotation is followed: when the name stands for another file, the old one is read to its end first, and then those that
    came after it. A log that isn't there yet is waited for.

    Args:
        log: The log.
        ended: Whether no more will come.
        lines: Of what is there, only so many of the last lines; None: all.
    """
    files = _opened(log)
    cut = _Cut()
    try:
        _skip_to_tail(files, lines)
        while True:
            # Asked before the reading: what was written before the end must not be missed.
            last = ended()
            if not files:
                files = _opened(log)
            file = files[0] if files else None
            replaced = file is not None and (len(files) > 1 or _replaced(file, log))
            if replaced and len(files) == 1:
                # Who wrote to it may have a last word.
                yield _SETTLING
            while file is not None and (data := file.read(_CHUNK)):
                if whole := cut.whole(data):
                    yield whole
            rest = cut.rest()
            if rest and (replaced or last):
                yield rest
            elif file is not None:
                # Who writes may take half a record away again, where a disk is full: it is read again when it is whole.
                file.seek(-len(rest), os.SEEK_CUR)
            if file is not None and len(files) == 1 and (replaced or (last and not _is_there(log))):
                files.extend(_following(file, log))
            if len(files) > 1:
                files.popleft().close()
                continue
            if last:
                break
            yield _INTERVAL
    finally:
        _close(files)


def _is_there(log: Log) -> bool:
    return os.access(log.name, os.F_OK, dir_fd=log.directory)


def _replaced(file: IO[bytes], log: Log) -> bool:
    try:
        return not _is_at(file, log, log.name) or log.stat(log.name).st_size < file.tell()
    except FileNotFoundError:
        return False


def _is_at(file: IO[bytes], log: Log, name: str) -> bool:
    return os.path.samestat(os.fstat(file.fileno()), log.stat(name))


def _following(file: IO[bytes], log: Log) -> Iterator[IO[bytes]]:
    """The file of a log that comes after one of its files, opened; none where there is none yet."""
    while True:
        name = _next(file, log)
        try:
            following = log.open(name)
        except FileNotFoundError:
            if name == log.name == _next(file, log):
                return
            continue
        # Was it put aside before it was opened, then another had its name already.
        with contextlib.suppress(FileNotFoundError):
            if _is_at(following, log, _next(file, log)):
                yield following
                return
        following.close()


def _next(file: IO[bytes], log: Log) -> str:
    """What the file of a log that comes after one of its files is called."""
    names = log.names()
    for number, each in enumerate(names[:-1]):
        with contextlib.suppress(FileNotFoundError):
            if _is_at(file, log, each):
                return names[number + 1]
    # It is deleted, and so may be others: those that are left are newer.
    return log.name if os.fstat(file.fileno()).st_nlink else names[0]


def aside(path: str, now: datetime.datetime) -> str:
    """What a log is called when it is put aside."""
    return f"{path}.{now:%Y%m%d-%H%M%S.%f}"


def log_of(path: str) -> str:
    """What the log was called that was put aside as this file; empty for other files."""
    match = _ASIDE.search(path)
    return path[: match.start()] if match and match.end() == len(path) else ""
