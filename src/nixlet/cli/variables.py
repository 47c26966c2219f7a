"""The variables that people give a container, by ``-e`` and by files of them. Verbs ask the node after this: it imports nothing slow."""

from nixlet import errors
from nixlet.encoding import utf8

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

#: An environment file may be this large (bytes).
_MAX_FILE = 1 << 20

#: The mark that some editors put in front of UTF-8.
_MARK = b"\xef\xbb\xbf"


def variable(text: str, ours: "Mapping[str, str]", where: str = "--env") -> tuple[str, str] | None:
    """A variable: ``NAME=VALUE``, or ``NAME`` for our own value of it; None where we have none.

    Raises:
        UsageError: It has no name.
    """
    name, sign, value = text.partition("=")
    if not name or "\0" in text or any(letter.isspace() for letter in name):
        raise errors.UsageError(f"{where} {text[:80]!r} is not NAME=VALUE")
    if sign:
        return name, value
    if name not in ours:
        return None
    if not utf8.is_valid(ours[name]):
        raise errors.UsageError(f"{where} {name}: its value here is not UTF-8")
    return name, ours[name]


def environment(
    texts: "Iterable[str]", files: "Iterable[str]", ours: "Mapping[str, str]"
) -> tuple[tuple[str, str], ...]:
    """The variables of files, and those of the command line, which come later and win.

    Raises:
        UsageError: A variable has no name, or a file can't be read.
    """
    pairs: dict[str, str] = {}
    for path in files:
        for number, line in enumerate(_lines(path), 1):
            stripped = line.lstrip()
            if stripped and not stripped.startswith("#"):
                pairs |= _as_pair(variable(stripped, ours, f"{path}, line {number}:"))
    for text in texts:
        pairs |= _as_pair(variable(text, ours))
    return tuple(pairs.items())


def _as_pair(pair: tuple[str, str] | None) -> dict[str, str]:
    return {} if pair is None else dict([pair])


def _lines(path: str) -> list[str]:
    """The lines of a file, as docker reads it: of UTF-8, with or without a mark in front, each ended by LF or CR and LF."""
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_FILE + 1)
    except OSError as error:
        raise errors.UsageError(f"the environment file {path} can't be read: {error.strerror}") from error
    if len(data) > _MAX_FILE:
        raise errors.UsageError(f"the environment file {path} is larger than {_MAX_FILE} bytes")
    lines = data.removeprefix(_MARK).split(b"\n")
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(line.removesuffix(b"\r").decode())
        except UnicodeDecodeError as error:
            raise errors.UsageError(f"{path}, line {number}: this is not UTF-8", hint="convert the file") from error
    return found
