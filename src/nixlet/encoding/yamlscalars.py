"""What plain scalars of YAML stand for, as Kubernetes reads them (sigs.k8s.io/yaml, which is go-yaml 2): resolve.go there.

That is neither YAML 1.1 (``22:22`` and dates are text) nor 1.2 (``yes`` is a truth value, ``012`` is octal).
"""

import math
import re

_PREFIX = "tag:yaml.org,2002:"
STR, BOOL, INT, FLOAT, NULL, MERGE = (f"{_PREFIX}{name}" for name in ("str", "bool", "int", "float", "null", "merge"))

_TIMESTAMP = f"{_PREFIX}timestamp"


def _spelled(*words: str) -> frozenset[str]:
    return frozenset(form for word in words for form in (word, word.capitalize(), word.upper()))


TRUE, FALSE = _spelled("y", "yes", "true", "on"), _spelled("n", "no", "false", "off")
_NULL = _spelled("null") | {"", "~"}
_NOT_FINITE = frozenset(
    (".nan", ".NaN", ".NAN", *(f"{sign}.{word}" for sign in ("", "+", "-") for word in ("inf", "Inf", "INF")))
)

#: A digit, a sign or a point: what a number begins with.
_BEGIN = re.compile(r"[-+.0-9]")
_INTEGER = re.compile(r"([-+]?)(?:0[xX]([0-9a-fA-F]+)|0[bB]([01]+)|0[oO]?([0-7]+)|(0|[1-9][0-9]*))")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")

#: Integers of more bits are floating-point numbers, and those are written out without an exponent below this (encoding/json).
_INT_MIN, _INT_MAX = -(2**63), 2**64 - 1
_WRITTEN_OUT = 1e21

#: No number that fits needs more characters.
_MAX_LENGTH = 400


def integer(text: str) -> int | None:
    """A whole number as Go's ParseInt reads it with base 0, or None."""
    text = text.replace("_", "")
    match = _INTEGER.fullmatch(text) if len(text) <= _MAX_LENGTH else None
    if match is None:
        return None
    sign, hexadecimal, binary, octal, decimal = match.groups()
    value = int(hexadecimal or binary or octal or decimal, 16 if hexadecimal else 2 if binary else 8 if octal else 10)
    value = -value if sign == "-" else value
    return value if _INT_MIN <= value <= _INT_MAX else None


def whole(text: str) -> int | None:
    """A whole number, also one that is written as another: JSON, by whose way Kubernetes gets it, has one kind of numbers."""
    if (found := integer(text)) is not None:
        return found
    text = text.replace("_", "")
    if len(text) > _MAX_LENGTH or not _FLOAT.fullmatch(text):
        return None
    value = float(text)
    return int(value) if abs(value) < _WRITTEN_OUT and value.is_integer() else None


def tag(text: str) -> str:
    """The tag of a plain scalar without one."""
    if text in TRUE or text in FALSE:
        return BOOL
    if text in _NULL:
        return NULL
    if text == "<<":
        return MERGE
    if text in _NOT_FINITE:
        return FLOAT
    if not _BEGIN.match(text):
        return STR
    if integer(text) is not None:
        return INT
    plain = text.replace("_", "")
    return FLOAT if len(plain) <= _MAX_LENGTH and _FLOAT.fullmatch(plain) and math.isfinite(float(plain)) else STR


def explicit(written: str) -> str:
    """A tag that is written; a moment is text, as there is no JSON for it."""
    return STR if written == _TIMESTAMP else written
