"""containerd's filter language (package filters), for listing snapshots.

A filter is a list of selectors, joined by commas, that must all hold; of several filters one must hold. A selector is a field
(``name``, ``parent``, ``kind``, ``labels.<key>``), alone for "is there", or with ``==``, ``!=`` or ``~=`` (a regular expression) and a
value. Parts of a field and values may be quoted as Go strings; values also between slashes or bars.
"""

import json
import re
from collections.abc import Callable, Sequence

from nixlet import errors
from nixlet.snapshots import model
from nixlet.store import paths

Filter = Callable[[model.Info], bool]

_FIELD = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_QUOTED = re.compile(r'"(?:[^"\\\n]|\\.)*"')
_OPERATOR = re.compile(r"==|!=|~=")
_DELIMITED = re.compile(r"([/|])((?:(?!\1)[^\\\n]|\\.)*)\1")
_VALUE = re.compile(r"[^\s,]+")


def parse(filters: Sequence[str]) -> Filter:
    """What a list of filters asks for; an empty list asks for all.

    Raises:
        InvalidArgumentError: A filter is malformed.
    """
    parsed = [_Parser(text).filter() for text in filters]
    return lambda info: not parsed or any(each(info) for each in parsed)


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._position = 0

    def filter(self) -> Filter:
        if not self._text:
            return lambda _: True
        selectors = [self._selector()]
        while self._position < len(self._text):
            if not self._text.startswith(",", self._position):
                raise self._malformed("a comma should follow")
            self._position += 1
            selectors.append(self._selector())
        return lambda info: all(selector(info) for selector in selectors)

    def _malformed(self, why: str) -> errors.InvalidArgumentError:
        return errors.InvalidArgumentError(
            f"the filter {paths.shown(self._text)} is malformed at character {self._position + 1}: {why}"
        )

    def _take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        match = pattern.match(self._text, self._position)
        if match is not None:
            self._position = match.end()
        return match

    def _quoted(self) -> str | None:
        match = self._take(_QUOTED)
        if match is None:
            return None
        try:
            # The escapes that Go and JSON share; Go's others (\a, \x41, \101) don't occur in names.
            return str(json.loads(match[0]))
        except ValueError:
            raise self._malformed("the quoted text has an unknown escape") from None

    def _selector(self) -> Filter:
        path = [self._part()]
        while self._text.startswith(".", self._position):
            self._position += 1
            path.append(self._part())
        operator = self._take(_OPERATOR)
        if operator is None:
            return lambda info: _field(info, path)[1]
        value = self._value()
        match operator[0]:
            case "==":
                return lambda info: _field(info, path) == (value, True)
            case "!=":
                return lambda info: _field(info, path)[0] != value
            case _:
                try:
                    expression = re.compile(value)
                except re.error as error:
                    raise self._malformed(f"no regular expression: {error}") from error
                return lambda info: expression.search(_field(info, path)[0]) is not None

    def _part(self) -> str:
        quoted = self._quoted()
        if quoted is not None:
            return quoted
        plain = self._take(_FIELD)
        if plain is None:
            raise self._malformed("a field's name should stand there")
        return plain[0]

    def _value(self) -> str:
        quoted = self._quoted()
        if quoted is not None:
            return quoted
        delimited = self._take(_DELIMITED)
        if delimited is not None:
            return delimited[2].replace(f"\\{delimited[1]}", delimited[1])
        plain = self._take(_VALUE)
        if plain is None:
            raise self._malformed("a value should stand there")
        return plain[0]


def _field(info: model.Info, path: Sequence[str]) -> tuple[str, bool]:
    """A field's value, and whether it is there."""
    match path:
        case ["name"]:
            return info.name, True
        case ["parent"]:
            return info.parent, True
        case ["kind"]:
            return info.kind.name.lower(), True
        case ["labels", *key]:
            name = ".".join(key)
            return info.labels.get(name, ""), name in info.labels
        case _:
            return "", False
