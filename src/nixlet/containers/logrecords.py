"""What stands in containers' logs, in the form that the CRI prescribes: ``<time> stdout|stderr P|F <text>``, P for a line that goes on.

The command line reads this module: it imports nothing that takes time.
"""

import datetime
import re
from collections.abc import Iterator
from typing import NamedTuple

from nixlet import errors

#: How long ago something was, as Go writes durations.
_DURATION = (
    r"(?=\d)(?:(?P<hours>\d+(?:\.\d+)?)h)?(?:(?P<minutes>\d+(?:\.\d+)?)m)?(?:(?P<seconds>\d+(?:\.\d+)?)s)?"
    r"(?:(?P<milliseconds>\d+(?:\.\d+)?)ms)?"
)

#: Before the text of a whole line, with the newline before it: a single byte to look for is found fastest.
_BEFORE_TEXT = {stream: re.compile(rb"\n(\S+ )%s F " % stream.encode()) for stream in ("stdout", "stderr")}


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


def parse(block: bytes) -> Iterator[Record]:
    """The records of a piece of a log; only its last line may lack its newline."""
    lines = block.split(b"\n")
    if not lines[-1]:
        lines.pop()
    return map(parse_line, lines)


class Printer:
    """Makes what is printed of a log, piece by piece.

    Args:
        timestamps: Whether each line begins with when it was written.
        since: Leave out what was written before.
    """

    def __init__(self, *, timestamps: bool = False, since: datetime.datetime | None = None) -> None:
        self._timestamps = timestamps
        self._since = since
        self._begins = True

    def printed(self, block: bytes) -> Iterator[tuple[str, bytes]]:
        """The streams ("stdout", "stderr") that a piece of the log goes to, and what goes there, in the order of the log.

        Args:
            block: Lines of the log; only the last may lack its newline.
        """
        if self._since is None and self._begins:
            # Most logs are whole lines of one stream: no line needs a look of its own.
            stream = "stderr" if block.split(b" ", 2)[1:2] == [b"stderr"] else "stdout"
            text, count = _BEFORE_TEXT[stream].subn(rb"\n\1" if self._timestamps else b"\n", b"\n" + block)
            if count == block.count(b"\n") and block.endswith(b"\n"):
                yield stream, text[1:]
                return
        yield from self._line_by_line(block)

    def _line_by_line(self, block: bytes) -> Iterator[tuple[str, bytes]]:
        stream, pieces = "stdout", list[bytes]()
        for record in parse(block):
            if record.stream != stream:
                if pieces:
                    yield stream, b"".join(pieces)
                stream, pieces = record.stream, []
            if self._since is None or written_at(record) >= self._since:
                if self._timestamps and self._begins:
                    pieces.append(f"{record.time} ".encode())
                pieces.append(record.text)
            self._begins = record.text.endswith(b"\n")
        if pieces:
            yield stream, b"".join(pieces)


def parse_tail(text: str) -> int | None:
    """A number of lines; None for all of them: "all", or a number below 0, as other container tools have it.

    Raises:
        UsageError: It is neither.
    """
    if text == "all":
        return None
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) < 10):
        raise errors.UsageError(f"--tail {text[:40]!r} is neither a number of lines nor all")
    return None if text != digits and int(digits) else int(digits)


def parse_since(text: str, now: datetime.datetime) -> datetime.datetime:
    """A moment: RFC 3339 (local time where no zone stands), or how long ago it is: ``1h30m``, ``10m``, ``5s``, ``250ms``.

    Raises:
        UsageError: It is neither.
    """
    if parts := re.fullmatch(_DURATION, text, re.ASCII):
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
