"""Varlink's messages: JSON objects, each ended by a NUL (https://varlink.org/Method-Call).

Descriptors travel beside a message's bytes (SCM_RIGHTS), as in systemd's implementation; a parameter names one by its index among those
that came with the message. What is sent with descriptors has bytes of one message only. The command line reads this module: it imports
nothing that takes time, which is why it writes JSON by itself.
"""

import os

from nixlet import errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

#: No message may be larger (bytes): the node reads a manifest of this size, and a list of ten thousand containers fits.
MAX_MESSAGE = 16 << 20

#: No message may bring more descriptors; a verb hands its three standard streams over.
MAX_DESCRIPTORS = 8

#: What a text of JSON has other signs for (RFC 8259, section 7).
_ESCAPES = {code: f"\\u{code:04x}" for code in range(0x20)} | {ord('"'): '\\"', ord("\\"): "\\\\"}

#: How errors of nixlet's own are called on the wire, whatever the interface.
FAILED = "org.nixlet.Failed"

#: The errors that every Varlink service has.
METHOD_NOT_FOUND = "org.varlink.service.MethodNotFound"
INTERFACE_NOT_FOUND = "org.varlink.service.InterfaceNotFound"
INVALID_PARAMETER = "org.varlink.service.InvalidParameter"
EXPECTED_MORE = "org.varlink.service.ExpectedMore"


def encoded(message: "Mapping[str, Any]") -> bytes:
    """A message as it stands on the wire.

    Raises:
        InvalidArgumentError: It is too large, or has a text that is not UTF-8.
    """
    try:
        data = _json(message).encode() + b"\0"
    except UnicodeEncodeError as error:
        raise errors.InvalidArgumentError(
            f"{os.fsencode(error.object[error.start : error.end])!r} is not UTF-8"
        ) from error
    if len(data) > MAX_MESSAGE:
        raise errors.InvalidArgumentError(f"a message of {len(data)} bytes is larger than the maximum of {MAX_MESSAGE}")
    return data


def _json(value: object) -> str:
    """What a client sends, as JSON: texts, whole numbers, truths and null, and tuples, lists and dictionaries of such."""
    if isinstance(value, str):
        return f'"{value.translate(_ESCAPES)}"'
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_json, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{_json(key)}:{_json(each)}' for key, each in value.items())}}}"
    raise TypeError(f"a {type(value).__name__} can't be sent")


class Splitter:
    """Cuts what comes in into messages."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    @property
    def empty(self) -> bool:
        """Whether no message has begun that has not ended."""
        return not self._size

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that end in ``data``, without their NULs.

        Raises:
            InvalidArgumentError: One is too large.
        """
        *complete, rest = data.split(b"\0")
        if complete:
            complete[0] = b"".join((*self._parts, complete[0]))
            self._parts, self._size = [], 0
        if rest:
            self._parts.append(rest)
            self._size += len(rest)
        if self._size > MAX_MESSAGE or any(len(each) > MAX_MESSAGE for each in complete):
            raise errors.InvalidArgumentError(f"a message is larger than the maximum of {MAX_MESSAGE} bytes")
        return complete


def error_of(name: str, parameters: "Mapping[str, Any]", peer: str) -> errors.NixletError:
    """The error that a reply tells.

    Args:
        name: The reply's ``error``.
        parameters: Its parameters.
        peer: What the other side is called, for errors that it doesn't explain.
    """
    if name == FAILED:
        # What is null is what is not there.
        there = {key: value for key, value in parameters.items() if value is not None}
        message, hint = str(there.get("message", "")), str(there.get("hint", ""))
        found = getattr(errors, str(there.get("kind", "")), None)
        if found is errors.CommandFailedError:
            code, output = int(there.get("returncode", 1)), str(there.get("output", ""))
            return errors.CommandFailedError(message, returncode=code, output=output, hint=hint)
        if not isinstance(found, type) or not issubclass(found, errors.NixletError):
            found = errors.NixletError
        error: errors.NixletError = found(message, hint=hint)
        error.said_by = str(there.get("said_by", ""))
        return error
    shown = ", ".join(f"{key} {value}" for key, value in parameters.items())
    if name in {METHOD_NOT_FOUND, INTERFACE_NOT_FOUND, INVALID_PARAMETER, EXPECTED_MORE}:
        said = ": ".join(filter(None, (name.rpartition(".")[2], shown)))
        return errors.UnimplementedError(
            f"{peer} does not understand this command line's request ({said})",
            hint="they are of different versions (nixlet version): start the node again with this one",
        )
    return errors.NixletError(" ".join(filter(None, (f"{peer} answered {name}", shown))))


def parameters_of(error: errors.NixletError) -> "dict[str, Any]":
    """What tells a client of an error: the parameters of ``FAILED``."""
    told: dict[str, Any] = {"kind": type(error).__name__, "message": error.message}
    if error.hint:
        told["hint"] = error.hint
    if error.said_by:
        told["said_by"] = error.said_by
    if isinstance(error, errors.CommandFailedError):
        told |= {"returncode": error.returncode, "output": error.output}
    return told
