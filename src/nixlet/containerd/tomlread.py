"""TOML that people wrote, with the place of what is wrong in it (toml.io, version 1.0)."""

import codecs
import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from nixlet import errors

#: More is no configuration.
MAX_BYTES = 1 << 20

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_PLACE = re.compile(r"^(?P<what>.*) \(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)$", re.DOTALL)


def decoded(data: bytes, path: str) -> str:
    """A file's text.

    Raises:
        UsageError: It is not UTF-8.
    """
    # Editors put a mark there; TOML knows none.
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        lines = data[: error.start].split(b"\n")
        raise errors.UsageError(
            f"{path}, line {len(lines)}, column {len(lines[-1]) + 1}: this is not UTF-8, as TOML has to be"
        ) from error


def parsed(data: bytes, path: str) -> dict[str, Any]:
    """A file's content.

    Raises:
        UsageError: It is no TOML; the sentence names line and column.
    """
    text = decoded(data, path)
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        what, line, column = problem(error, text)
        raise errors.UsageError(f"{path}, line {line}, column {column}: this is no TOML: {what}") from error


def problem(error: tomllib.TOMLDecodeError, text: str) -> tuple[str, int, int]:
    """What is wrong with a text, its line and its column."""
    found = _PLACE.match(str(error))
    what = found["what"] if found else str(error)
    what = f"{what[:1].lower()}{what[1:]}"
    if found and found["line"]:
        return what, int(found["line"]), int(found["column"])
    # It ends where something more was expected.
    lines = text.rstrip("\n").split("\n")
    return what, len(lines), len(lines[-1]) + 1


def at(table: Mapping[str, Any], path: Sequence[str]) -> Any:  # noqa: ANN401 (any value of TOML)
    """The value of a key in a table's tables, or None."""
    found: Any = table
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def name(path: Sequence[str]) -> str:
    """How a key is written, with its tables."""
    return ".".join(part if _BARE.fullmatch(part) else f"'{part}'" for part in path)
