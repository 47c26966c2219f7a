"""Containers' logs, in the form that the CRI prescribes: ``<time> stdout|stderr P|F <text>``, P for a line that goes on."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from typing import IO, NamedTuple

#: Seconds between two looks at a log that is being followed.
_INTERVAL = 0.01

_CHUNK = 1 << 16


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


async def follow(path: str, ended: Callable[[], bool]) -> AsyncIterator[Record]:
    """The records of a log, and those that come until ``ended`` says that no more will.

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
