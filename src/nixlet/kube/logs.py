"""Containers' logs, in the form that the CRI prescribes: ``<time> stdout|stderr P|F <text>``, P for a line that goes on."""

import asyncio
import collections
import contextlib
import datetime
import os
import re
from collections.abc import AsyncIterator, Callable
from typing import IO, NamedTuple

from nixlet import errors

#: Seconds between two looks at a log that is being followed.
_INTERVAL = 0.01

_CHUNK = 1 << 16

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


def tail_offset(path: str, lines: int) -> int:
    """Where the last lines of a log begin, in bytes; a line that was written in pieces is one."""
    starts: collections.deque[int] = collections.deque(maxlen=lines)
    offset, begins = 0, True
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        for line in file:
            if begins:
                starts.append(offset)
            offset += len(line)
            begins = parse_line(line).text.endswith(b"\n")
    return starts[0] if starts else offset


def last_lines(path: str, count: int) -> str:
    """The last lines of a log, as text; empty where there is none."""
    text = b""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        file.seek(tail_offset(path, count))
        text = b"".join(parse_line(line).text for line in file)
    return text.decode(errors="replace")


async def follow(path: str, ended: Callable[[], bool], *, start: int = 0) -> AsyncIterator[Record]:
    """The records of a log, and those that come until ``ended`` says that no more will; the first ``start`` bytes are left out.

    Rotation is followed: when the name stands for another file, the old one is read to its end first. A log that isn't there
    yet is waited for.
    """
    file: IO[bytes] | None = None
    rest = b""
    try:
        while True:
            # Asked before the reading: what was written before the end must not be missed.
            last = ended()
            replaced = file is not None and _replaced(file, path)
            if file is None:
                with contextlib.suppress(FileNotFoundError):
                    file = open(path, "rb")  # noqa: ASYNC230, SIM115 (a local log; closed below)
                    file.seek(start)
                    start = 0
            while file is not None and (chunk := file.read(_CHUNK)):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    yield parse_line(line)
            if (replaced or last) and rest:
                yield parse_line(rest)
                rest = b""
            if file is not None and replaced:
                file.close()
                file = None
                continue
            if last:
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
