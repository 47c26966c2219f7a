"""The encoding of the Nix worker protocol: little-endian 64-bit integers, strings padded to eight bytes, lists by count.

Nothing here does I/O. ``Reader`` parses from a buffer that the connection feeds: a parse that runs out of bytes raises
``NeedMore`` and is repeated when more have come, so that a reply of thousands of fields costs no suspension for each.
"""

import dataclasses
import struct
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

from nixlet import errors

T = TypeVar("T")

CLIENT_MAGIC = 0x6E697863
SERVER_MAGIC = 0x6478696F

#: What we offer: 1.35 brings the daemon's word on whether it trusts us. The smallest that has all we use is 1.27.
PROTOCOL = 1 << 8 | 35
MIN_PROTOCOL = 1 << 8 | 27

#: A string from a daemon may be this long (bytes): error messages with build logs.
MAX_STRING = 64 << 20
MAX_LIST = 1 << 22

STDERR_NEXT = 0x6F6C6D67
STDERR_READ = 0x64617461
STDERR_WRITE = 0x64617416
STDERR_LAST = 0x616C7473
STDERR_ERROR = 0x63787470
START_ACTIVITY = 0x53545254
STOP_ACTIVITY = 0x53544F50
RESULT = 0x52534C54

_INT = struct.Struct("<Q")


class BuildResult(NamedTuple):
    """How one path fared when it was to be realised; ``error`` is empty where it is there now."""

    path: str
    status: int
    error: str


@dataclasses.dataclass(slots=True)
class _Partial:
    """A list that is being received: its elements so far, how many there will be, and where the next one begins."""

    values: list[Any]
    count: int
    next: int


class NeedMore(Exception):
    """The buffer ends before the value does."""


class ProtocolError(errors.UnavailableError):
    """The peer doesn't speak the worker protocol, or not correctly."""


def integer(value: int) -> bytes:
    """An integer, a truth value or an enumerator."""
    return _INT.pack(value)


def string(value: str | bytes) -> bytes:
    """A string with its length before it and zeros behind it."""
    data = value.encode() if isinstance(value, str) else value
    return _INT.pack(len(data)) + data + bytes(-len(data) % 8)


def strings(values: Iterable[str]) -> bytes:
    """A list or set of strings."""
    encoded = [string(value) for value in values]
    return _INT.pack(len(encoded)) + b"".join(encoded)


class Reader:
    """Parses what has been received; strings longer than ``max_string`` bytes are taken for garbage."""

    def __init__(self, max_string: int = MAX_STRING) -> None:
        self._max_string = max_string
        self._data = bytearray()
        self._position = 0
        #: Lists of the value at hand, by where they begin, the outer before the inner ones: what is known of them so far.
        self._lists: dict[int, _Partial] = {}

    @property
    def pending(self) -> int:
        """How many bytes came that nobody has parsed."""
        return len(self._data) - self._position

    def feed(self, data: bytes) -> None:
        """Take up what came."""
        self._data += data

    def parse(self, parser: Callable[["Reader"], T]) -> T:
        """Run a parser; when it runs out of bytes nothing is consumed.

        Raises:
            NeedMore: The value isn't complete.
            ProtocolError: The bytes can't be such a value.
        """
        start = self._position
        try:
            value = parser(self)
        except NeedMore:
            self._position = start
            raise
        except BaseException:
            # A record that is raised as an error has been consumed like any other value.
            self._lists.clear()
            raise
        self._lists.clear()
        if self._position > 1 << 16 or self._position == len(self._data):
            del self._data[: self._position]
            self._position = 0
        return value

    def integer(self) -> int:
        """An integer."""
        end = self._position + 8
        if end > len(self._data):
            raise NeedMore
        (value,) = _INT.unpack_from(self._data, self._position)
        self._position = end
        return int(value)

    def bytes(self) -> bytes:
        """A string as bytes."""
        length = self.integer()
        if length > self._max_string:
            raise ProtocolError(f"the Nix daemon sent a string of {length} bytes, which can't be")
        padded = length + (-length % 8)
        if self._position + padded > len(self._data):
            raise NeedMore
        value = bytes(self._data[self._position : self._position + length])
        if any(self._data[self._position + length : self._position + padded]):
            raise ProtocolError("the Nix daemon sent a string with padding that is not zero")
        self._position += padded
        return value

    def string(self) -> str:
        """A string as text."""
        return self.bytes().decode(errors="replace")

    def count(self) -> int:
        """The number of elements that follow."""
        value = self.integer()
        if value > MAX_LIST:
            raise ProtocolError(f"the Nix daemon announced a list of {value} elements, which can't be")
        return value

    def sequence(self, element: Callable[["Reader"], T]) -> list[T]:
        """A list or set; when it is parsed again because more has come, it goes on with the element where it stopped."""
        start = self._position
        known = self._lists.get(start)
        if known is None:
            count = self.count()
            known = self._lists[start] = _Partial([], count, self._position)
        self._position = known.next
        while len(known.values) < known.count:
            known.values.append(element(self))
            known.next = self._position
            # What was known of lists in this element is needed no more.
            while next(reversed(self._lists)) != start:
                self._lists.popitem()
        return known.values

    def strings(self) -> list[str]:
        """A list or set of strings."""
        return self.sequence(Reader.string)

    def build_results(self) -> list[BuildResult]:
        """The reply to BuildPathsWithResults, as protocols 1.34 and 1.35 have it."""
        return self.sequence(Reader._build_result)

    def _build_result(self) -> BuildResult:
        path, status, error = self.string(), self.integer(), self.string()
        for _ in ("times built", "not deterministic", "start", "stop"):
            self.integer()
        # Outputs, which only derivations have.
        self.sequence(lambda reader: (reader.string(), reader.string()))
        return BuildResult(path, status, error)

    def fields(self) -> list[int | str]:
        """The fields of a log record: integers (0) and strings (1)."""
        return self.sequence(Reader._field)

    def _field(self) -> int | str:
        kind = self.integer()
        if kind == 0:
            return self.integer()
        if kind == 1:
            return self.string()
        raise ProtocolError(f"the Nix daemon sent a log field of unknown type {kind}")

    def error(self) -> str:
        """An error record; its message, without the traces."""
        self.string()  # always "Error"
        self.integer()  # level
        self.string()  # a name that is no longer used
        message = self.string()
        self.integer()  # no position
        self.sequence(lambda reader: (reader.integer(), reader.string()))  # traces
        return message
