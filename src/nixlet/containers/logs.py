"""Containers' logs, in the form that the CRI prescribes: ``<time> stdout|stderr P|F <text>``, P for a line that goes on."""

import asyncio
import collections
import contextlib
import datetime
import glob
import os
import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import IO, NamedTuple

from nixlet import errors

#: Seconds between two looks at a log that is being followed.
_INTERVAL = 0.01

#: Seconds for the last words that go to a file that was put aside.
_SETTLING = 0.05

_CHUNK = 1 << 16

#: What a log's name gets when it is put aside: the time, so that names are in the order of time.
_ASIDE = re.compile(r"\.\d{8}-\d{6}\.\d{6}")

#: How long ago something was, as Go writes durations.
_DURATION = re.compile(
    r"(?=\d)(?:(?P<hours>\d+(?:\.\d+)?)h)?(?:(?P<minutes>\d+(?:\.\d+)?)m)?(?:(?P<seconds>\d+(?:\.\d+)?)s)?"
    r"(?:(?P<milliseconds>\d+(?:\.\d+)?)ms)?",
    re.ASCII,
)


class Record(NamedTuple):
    """A piece of a container's output.

    Attributes:
        time: When it was written, RFC 3339 with nanoseconds.
        stream: "stdout" or "stderr".
        text: The text, with a newline unless the line goes on.
    """

    time: str
    stream: str
    text: bytes


def parse_line(line: bytes) -> Record:
    """Read one line of a log; a malformed one is shown as it stands."""
    parts = line.rstrip(b"\n").split(b" ", 3)
    if len(parts) < 3 or parts[1] not in {b"stdout", b"stderr"}:
        return Record("", "stdout", line)
    text = parts[3] if len(parts) == 4 else b""
    partial = parts[2].split(b":")[0] == b"P"
    return Record(parts[0].decode(errors="replace"), parts[1].decode(), text if partial else text + b"\n")


def append(path: str, stream: str, data: bytes) -> None:
    """Write a piece of a container's output to its log, in place of the runtime, which doesn't any more.

    Raises:
        FileNotFoundError: The log is gone.
    """
    time = datetime.datetime.now(datetime.UTC).isoformat().replace("+00:00", "Z")
    *lines, rest = data.split(b"\n")
    records = [f"{time} {stream} F ".encode() + line for line in lines]
    if rest:
        records.append(f"{time} {stream} P ".encode() + rest)
    with open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW), "ab") as file:
        file.write(b"".join(record + b"\n" for record in records))


def parse_tail(text: str) -> int | None:
    """A number of lines, or None for "all".

    Raises:
        UsageError: It is neither.
    """
    if text == "all":
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise errors.UsageError(f"--tail {text[:40]!r} is neither a number of lines nor all")
    return int(text)


def parse_since(text: str, now: datetime.datetime) -> datetime.datetime:
    """A moment: RFC 3339 (local time where no zone stands), or how long ago it is: ``1h30m``, ``10m``, ``5s``, ``250ms``.

    Raises:
        UsageError: It is neither.
    """
    if parts := _DURATION.fullmatch(text):
        numbers = {unit: float(number) for unit, number in parts.groupdict(default="0").items()}
        try:
            return now - datetime.timedelta(**numbers)
        except OverflowError as error:
            raise errors.UsageError(f"--since {text[:40]!r} is too long ago") from error
    try:
        return datetime.datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError) as error:
        raise errors.UsageError(
            f"--since {text[:40]!r} is neither a moment (RFC 3339) nor a duration such as 10m"
        ) from error


def written_at(record: Record) -> datetime.datetime:
    """When a record was written; the latest moment there is for one that doesn't say."""
    try:
        return datetime.datetime.fromisoformat(record.time).astimezone(datetime.UTC)
    except ValueError:
        return datetime.datetime.max.replace(tzinfo=datetime.UTC)


def parts(path: str) -> list[str]:
    """A log's files from the oldest to the one that is written: those that were put aside are named by the time of that."""
    aside = [each for each in glob.glob(f"{glob.escape(path)}.*") if _ASIDE.fullmatch(each[len(path) :])]
    return [*sorted(aside), path]


def _opened(path: str) -> "collections.deque[IO[bytes]]":
    """A log's files, opened, from the oldest to the one that is written: their names are others' soon.

    Whatever takes the log's name after the opening comes after these.
    """
    newest = None
    with contextlib.suppress(FileNotFoundError):
        newest = open(path, "rb")  # noqa: SIM115 (whoever called closes it)
    files: collections.deque[IO[bytes]] = collections.deque()
    # Those that were put aside are looked for now, so that the newest may be among them, and others that are newer still.
    for name in parts(path)[:-1]:
        with contextlib.suppress(FileNotFoundError):
            file = open(name, "rb")  # noqa: SIM115 (as above)
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
        if following >= 0 and parse_line(line).text.endswith(b"\n"):
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
        text = b"".join(record.text for record in there(path, lines=count))
    return text.decode(errors="replace")


def there(path: str, *, lines: int | None = None) -> Iterator[Record]:
    """The records that a log has now; what is written while they are read is none of them.

    Args:
        path: The log.
        lines: Only so many of the last lines; None: all.
    """
    files = _opened(path)
    try:
        for file, size in zip(files, _skip_to_tail(files, lines), strict=True):
            rest, left = b"", size - file.tell()
            while chunk := file.read(max(0, min(left, _CHUNK))):
                left -= len(chunk)
                *whole, rest = (rest + chunk).split(b"\n")
                yield from map(parse_line, whole)
            if rest:
                yield parse_line(rest)
    finally:
        _close(files)


async def follow(path: str, ended: Callable[[], bool], *, lines: int | None = None) -> AsyncIterator[Record]:
    """The records of a log, and those that come until ``ended`` says that no more will.

    Rotation is followed: when the name stands for another file, the old one is read to its end first, and then those that
    came after it. A log that isn't there yet is waited for.

    Args:
        path: The log.
        ended: Whether no more will come.
        lines: Of what is there, only so many of the last lines; None: all.
    """
    files = _opened(path)
    rest = b""
    try:
        _skip_to_tail(files, lines)
        while True:
            # Asked before the reading: what was written before the end must not be missed.
            last = ended()
            if not files:
                files = _opened(path)
            file = files[0] if files else None
            replaced = file is not None and (len(files) > 1 or _replaced(file, path))
            if replaced and len(files) == 1:
                # Who wrote to it may have a last word.
                await asyncio.sleep(_SETTLING)
            while file is not None and (chunk := file.read(_CHUNK)):
                *whole, rest = (rest + chunk).split(b"\n")
                for line in whole:
                    yield parse_line(line)
            if (replaced or last) and rest:
                yield parse_line(rest)
                rest = b""
            if file is not None and len(files) == 1 and (replaced or (last and not os.path.exists(path))):
                files.extend(_following(file, path))
            if len(files) > 1:
                files.popleft().close()
                continue
            if last:
                break
            await asyncio.sleep(_INTERVAL)
    finally:
        _close(files)


def _replaced(file: IO[bytes], path: str) -> bool:
    try:
        return not _is_at(file, path) or os.stat(path).st_size < file.tell()
    except FileNotFoundError:
        return False


def _is_at(file: IO[bytes], path: str) -> bool:
    return os.path.samestat(os.fstat(file.fileno()), os.stat(path))


def _following(file: IO[bytes], path: str) -> Iterator[IO[bytes]]:
    """The file of a log that comes after one of its files, opened; none where there is none yet."""
    while True:
        name = _next(file, path)
        try:
            following = open(name, "rb")  # noqa: SIM115 (whoever called closes it)
        except FileNotFoundError:
            if name == path == _next(file, path):
                return
            continue
        # Was it put aside before it was opened, then another had its name already.
        with contextlib.suppress(FileNotFoundError):
            if _is_at(following, _next(file, path)):
                yield following
                return
        following.close()


def _next(file: IO[bytes], path: str) -> str:
    """What the file of a log that comes after one of its files is called."""
    files = parts(path)
    for number, each in enumerate(files[:-1]):
        with contextlib.suppress(FileNotFoundError):
            if _is_at(file, each):
                return files[number + 1]
    # It is deleted, and so may be others: those that are left are newer.
    return path if os.fstat(file.fileno()).st_nlink else files[0]


def aside(path: str, now: datetime.datetime) -> str:
    """What a log is called when it is put aside."""
    return f"{path}.{now:%Y%m%d-%H%M%S.%f}"


def log_of(path: str) -> str:
    """What the log was called that was put aside as this file; empty for other files."""
    match = _ASIDE.search(path)
    return path[: match.start()] if match and match.end() == len(path) else ""
