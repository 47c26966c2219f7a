"""Containers' logs, in the form that the CRI prescribes: ``<time> stdout|stderr P|F <text>``, P for a line that goes on."""

import asyncio
import collections
import contextlib
import datetime
import glob
import os
import re
from collections.abc import AsyncIterator, Callable
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


def tail(path: str, lines: int) -> tuple[str, int]:
    """Where the last lines of a log begin: the file, and bytes in it. A line that was written in pieces is one."""
    files = parts(path)
    while len(files) > 1:
        starts = _starts(files[-1], lines)
        if len(starts) >= lines:
            return files[-1], tail_offset(files[-1], lines)
        lines -= len(starts)
        files.pop()
    return files[0], tail_offset(files[0], lines)


def tail_offset(path: str, lines: int) -> int:
    """Where the last lines of a file begin, in bytes."""
    starts = _starts(path, lines)
    try:
        return starts[0] if starts else os.path.getsize(path)
    except FileNotFoundError:
        return 0


def _starts(path: str, lines: int) -> "collections.deque[int]":
    """Where each of the last lines of a file begins."""
    starts: collections.deque[int] = collections.deque(maxlen=lines)
    offset, begins = 0, True
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        for line in file:
            if begins:
                starts.append(offset)
            offset += len(line)
            begins = parse_line(line).text.endswith(b"\n")
    return starts


def last_lines(path: str, count: int) -> str:
    """The last lines of a log, as text; empty where there is none."""
    text = b""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        file.seek(tail_offset(path, count))
        text = b"".join(parse_line(line).text for line in file)
    return text.decode(errors="replace")


async def follow(path: str, ended: Callable[[], bool], *, first: str = "", start: int = 0) -> AsyncIterator[Record]:
    """The records of a log, and those that come until ``ended`` says that no more will.

    Rotation is followed: when the name stands for another file, the old one is read to its end first, and then those that
    came after it. A log that isn't there yet is waited for.

    Args:
        path: The log.
        ended: Whether no more will come.
        first: The file to begin with, of ``parts``; empty: the one that is written.
        start: How many bytes of that are left out.
    """
    file: IO[bytes] | None = None
    following = first or path
    rest = b""
    try:
        while True:
            # Asked before the reading: what was written before the end must not be missed.
            last = ended()
            replaced = file is not None and _replaced(file, path)
            if file is None:
                with contextlib.suppress(FileNotFoundError):
                    file = open(following, "rb")  # noqa: ASYNC230, SIM115 (a local log; closed below)
                    file.seek(start)
                    start = 0
            if replaced:
                # Who wrote to it may have a last word.
                await asyncio.sleep(_SETTLING)
            while file is not None and (chunk := file.read(_CHUNK)):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    yield parse_line(line)
            if (replaced or last) and rest:
                yield parse_line(rest)
                rest = b""
            if file is not None and replaced:
                following = _next(file, path)
                file.close()
                file = None
                continue
            if last and (following == path or not os.path.exists(path)):
                break
            await asyncio.sleep(_INTERVAL)
    finally:
        if file is not None:
            file.close()


def _replaced(file: IO[bytes], path: str) -> bool:
    status = os.fstat(file.fileno())
    try:
        current = os.stat(path)
    except FileNotFoundError:
        return False
    return (current.st_dev, current.st_ino) != (status.st_dev, status.st_ino) or current.st_size < file.tell()


def _next(file: IO[bytes], path: str) -> str:
    """The file of a log that comes after one of its files."""
    status = os.fstat(file.fileno())
    files = parts(path)
    for number, each in enumerate(files[:-1]):
        with contextlib.suppress(FileNotFoundError):
            found = os.stat(each)
            if (found.st_dev, found.st_ino) == (status.st_dev, status.st_ino):
                return files[number + 1]
    # It is deleted, and so may be others: those that are left are newer.
    return path if status.st_nlink else files[0]


def aside(path: str, now: datetime.datetime) -> str:
    """What a log is called when it is put aside."""
    return f"{path}.{now:%Y%m%d-%H%M%S.%f}"
