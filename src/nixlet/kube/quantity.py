"""Kubernetes' quantities: "500m", "1.5", "64Mi", "2e3" (package apimachinery/api/resource)."""

import fractions
import re

_QUANTITY = re.compile(r"([+-]?(?:\d+(?:\.\d*)?|\.\d+))(?:([numkMGTPE]|[KMGTPE]i)|[eE]([+-]?\d{1,3}))?", re.ASCII)

_DECIMAL = {"n": -9, "u": -6, "m": -3, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_BINARY = {"Ki": 1, "Mi": 2, "Gi": 3, "Ti": 4, "Pi": 5, "Ei": 6}

_MAX = 2**63 - 1

#: No figure that fits needs more characters.
_MAX_LENGTH = 64


#: Containers with less memory don't start: the runtime itself needs as much (docker's limit).
_LEAST_MEMORY = 6 << 20


def memory_limit(text: str) -> int:
    """A limit for a container's memory, in bytes; 0 is none.

    Raises:
        ValueError: As ``parse``; or no container can run in so little, as with the "m" of thousandths in place of "Mi".
    """
    limit = parse(text)
    if limit >= _LEAST_MEMORY or not limit:
        return limit
    number = text.removesuffix("m")
    meant = f": did you mean {number}Mi?" if number.isdigit() else ""
    raise ValueError(
        f"is {text!r}, and a container needs {_LEAST_MEMORY >> 20}Mi at least: that is {float(_exact(text)):g} bytes{meant}"
    )


def parse(text: str, scale: int = 1) -> int:
    """A quantity in units of 1/``scale``, rounded up.

    Raises:
        ValueError: It is no quantity, negative, or too large; the message completes "… is".
    """
    value = _exact(text) * scale
    if value < 0:
        raise ValueError(f"is {text[:40]!r}, which is negative")
    if value > _MAX:
        raise ValueError(f"is {text[:40]!r}, which is too large")
    return -(-value.numerator // value.denominator)


def _exact(text: str) -> fractions.Fraction:
    match = _QUANTITY.fullmatch(text) if len(text) <= _MAX_LENGTH else None
    if match is None:
        raise ValueError(f"is {text[:40]!r}, which is no quantity")
    number, suffix, exponent = match.groups()
    value = fractions.Fraction(number)
    if exponent:
        value *= fractions.Fraction(10) ** int(exponent)
    elif suffix in _BINARY:
        value *= 1024 ** _BINARY[suffix]
    elif suffix:
        value *= fractions.Fraction(10) ** _DECIMAL[suffix]
    return value
