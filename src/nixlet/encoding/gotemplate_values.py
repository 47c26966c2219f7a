"""Values of Go's text/template and the functions on them: what does not fit a value's type is a mistake, not an empty text."""

import dataclasses
import difflib
import json
import operator
import os.path
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from nixlet.encoding import gotemplate

_FLAT = str | bool | int

_VERB = re.compile(r"%(.?)", re.DOTALL)

#: What Go's %q writes otherwise than by its number.
_QUOTED = {
    '"': '\\"',
    "\\": "\\\\",
    "\n": "\\n",
    "\r": "\\r",
    "\t": "\\t",
    "\a": "\\a",
    "\b": "\\b",
    "\f": "\\f",
    "\v": "\\v",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Struct:
    """A value with fields that are there or not, whatever they hold; a mapping has keys instead, and one that lacks is nothing."""

    fields: Mapping[str, Any]


class MistakeError(ValueError):
    """Something can't be done with the values at hand."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def field(value: object, name: str, before: Sequence[str]) -> Any:  # noqa: ANN401 (any value)
    """A field of a value; ``before`` are those that led to it, for the hint."""
    if isinstance(value, Struct):
        if name in value.fields:
            return value.fields[name]
        near = difflib.get_close_matches(name, value.fields, n=1)
        place = "".join(f".{each}" for each in before)
        hint = f"did you mean {place}.{near[0]}?" if near else f"there are {', '.join(value.fields)}"
        raise MistakeError(f"there is no field {name}", hint)
    if isinstance(value, Mapping):
        return value.get(name)
    raise MistakeError(f"there is no field {name} in {_kind(value)}")


def _kind(value: object) -> str:
    kinds: Sequence[tuple[type | tuple[type, ...], str]] = (
        (bool, "true or false"),
        (int, "a number"),
        (str, "a text"),
        ((list, tuple), "a list"),
        ((Mapping, Struct), "a group of values"),
    )
    return next((name for types, name in kinds if isinstance(value, types)), "nothing")


def is_true(value: object) -> bool:
    """Whether ``if`` takes a value for true."""
    return isinstance(value, Struct) or bool(value)


def items(value: object) -> Iterator[tuple[object, object]]:
    """What ``range`` goes over: keys in their order, or numbers, with the elements."""
    if isinstance(value, Mapping):
        yield from sorted(value.items())
    elif isinstance(value, list | tuple):
        yield from enumerate(value)
    elif value is not None:
        raise MistakeError(f"{_kind(value)} has no elements")


def printed(value: object) -> str:
    """A value as text."""
    if not isinstance(value, _FLAT):
        hint = ""
        if isinstance(value, Mapping | Struct):
            inner = value.fields if isinstance(value, Struct) else value
            hint = f"it has {', '.join(map(str, inner))}" if inner else "it is empty"
        raise MistakeError(f"this is {_kind(value)}, and no single value", hint)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _equal(first: object, *others: object) -> bool:
    if not others:
        raise MistakeError("a value to compare with is missing")
    for other in others:
        if not isinstance(first, _FLAT) or not isinstance(other, _FLAT) or _kind(first) != _kind(other):
            raise MistakeError(f"{_kind(first)} can't be compared with {_kind(other)}")
    return first in others


def _compared(wanted: Callable[[Any, Any], bool]) -> Callable[[object, object], bool]:
    def compared(first: object, second: object) -> bool:
        if _kind(first) != _kind(second) or isinstance(first, bool) or not isinstance(first, int | str):
            raise MistakeError(f"{_kind(first)} can't be compared with {_kind(second)}")
        return wanted(first, second)

    return compared


def _index(value: object, *keys: object) -> object:
    for key in keys:
        if isinstance(value, Mapping) and isinstance(key, str):
            value = value.get(key)
        elif isinstance(value, list | tuple) and isinstance(key, int) and 0 <= key < len(value):
            value = value[key]
        else:
            raise MistakeError(f"{_kind(value)} has no element {key}")
    return value


def _length(value: object) -> int:
    if not isinstance(value, str | list | tuple | Mapping):
        raise MistakeError(f"{_kind(value)} has no length")
    return len(value.encode()) if isinstance(value, str) else len(value)


def _formatted(form: object, *values: object) -> str:
    """Go's printf, with %s, %v, %d, %t, %q and %%."""
    if not isinstance(form, str):
        raise MistakeError("printf needs a text first")
    left = list(values)

    def verb(found: re.Match[str]) -> str:
        if found[1] == "%":
            return "%"
        if found[1] not in set("svdtq"):
            raise gotemplate.NotSupportedError
        if not left:
            raise MistakeError("printf has fewer values than verbs")
        value = left.pop(0)
        fits = {"s": str, "q": str, "d": int, "t": bool}.get(found[1], _FLAT)
        if not isinstance(value, fits) or (found[1] == "d" and isinstance(value, bool)):
            raise MistakeError(f"%{found[1]} is not for {_kind(value)}")
        return _quoted(str(value)) if found[1] == "q" else printed(value)

    text = _VERB.sub(verb, form)
    if left:
        raise MistakeError("printf has more values than verbs")
    return text


def _quoted(text: str) -> str:
    """Go's %q (strconv.Quote)."""

    def character(each: str) -> str:
        if each in _QUOTED:
            return _QUOTED[each]
        if each.isprintable():
            return each
        number = ord(each)
        return f"\\x{number:02x}" if number < 0x80 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"

    return f'"{"".join(map(character, text))}"'


def _json(value: object) -> str:
    plain = json.dumps(_plain(value), separators=(",", ":"), ensure_ascii=False)
    # As Go has it, for the sake of HTML.
    return plain.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plain(value: object) -> object:
    if isinstance(value, Struct):
        value = value.fields
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _same_path(value: object) -> str:
    """k3s's ``deschemify``: on Linux a socket is named by its path."""
    if not isinstance(value, str):
        raise MistakeError(f"{_kind(value)} is no path")
    return value


def _joined(*parts: object) -> str:
    """k3s's ``filepathjoin``."""
    texts = [_same_path(part) for part in parts]
    return os.path.normpath("/".join(filter(None, texts))) if any(texts) else ""


def _not(value: object) -> bool:
    return not is_true(value)


def _arguments(low: int, high: int, function: Callable[..., object]) -> Callable[..., object]:
    def checked(*values: object) -> object:
        if not low <= len(values) <= high:
            raise MistakeError(f"it takes {low if low == high else f'at least {low}'} of values, not {len(values)}")
        return function(*values)

    return checked


_MANY = 1000

#: Functions of Go's, and k3s's own; "and" and "or" are made where they are called.
FUNCTIONS: Mapping[str, Callable[..., object]] = {
    "deschemify": _arguments(1, 1, _same_path),
    "eq": _arguments(2, _MANY, _equal),
    "ge": _arguments(2, 2, _compared(operator.ge)),
    "gt": _arguments(2, 2, _compared(operator.gt)),
    "filepathjoin": _arguments(0, _MANY, _joined),
    "index": _arguments(1, _MANY, _index),
    "le": _arguments(2, 2, _compared(operator.le)),
    "len": _arguments(1, 1, _length),
    "lt": _arguments(2, 2, _compared(operator.lt)),
    "ne": _arguments(2, 2, lambda first, second: not _equal(first, second)),
    "not": _arguments(1, 1, _not),
    "printf": _arguments(1, _MANY, _formatted),
    "toJson": _arguments(1, 1, _json),
}
