"""The mapping between nixlet's errors and gRPC's status codes, in both directions."""

from grpclib.const import Status
from grpclib.exceptions import GRPCError

from nixlet import errors

_CODES: tuple[tuple[type[errors.NixletError], Status], ...] = (
    (errors.NotFoundError, Status.NOT_FOUND),
    (errors.AlreadyExistsError, Status.ALREADY_EXISTS),
    (errors.InvalidArgumentError, Status.INVALID_ARGUMENT),
    (errors.UsageError, Status.INVALID_ARGUMENT),
    (errors.FailedPreconditionError, Status.FAILED_PRECONDITION),
    (errors.UnsupportedError, Status.FAILED_PRECONDITION),
    (errors.ResourceExhaustedError, Status.RESOURCE_EXHAUSTED),
    (errors.PermissionDeniedError, Status.PERMISSION_DENIED),
    (errors.UnavailableError, Status.UNAVAILABLE),
    (errors.UnimplementedError, Status.UNIMPLEMENTED),
    (errors.CallCancelledError, Status.CANCELLED),
    (errors.DeadlineExceededError, Status.DEADLINE_EXCEEDED),
)


#: How Go says that a disk, or somebody's part of it, is full (ENOSPC, EDQUOT).
_NO_ROOM = ("no space left on device", "disk quota exceeded")

#: Between an error's sentence and its hint, since a status has room for one text. On one line: a kubelet's event is one.
_HINT = "; hint: "

#: Characters of each for those who show both in one line.
_MAX_SENTENCE = 560
_MAX_HINT = 340


def from_error(error: errors.NixletError) -> GRPCError:
    """The status that tells a peer of an error."""
    code = next((code for kind, code in _CODES if isinstance(error, kind)), Status.UNKNOWN)
    return GRPCError(code, text_of(error))


def shortened(error: errors.NixletError) -> GRPCError:
    """The same where it is shown in one line, as in a kubelet's events, which have room for some 1,000 characters."""
    message, hint = _cut(error.message, _MAX_SENTENCE), _cut(error.hint, _MAX_HINT)
    return GRPCError(from_error(error).status, f"{message}{_HINT}{hint}" if hint else message)


def _cut(text: str, limit: int) -> str:
    """A text on one line; of a long one the beginning, which names things, and the end, which has the cause."""
    text = " ".join(text.split())
    if len(text) <= limit:
        return text
    tail = limit // 3
    return f"{text[: limit - tail - 3]} … {text[-tail:]}"


def text_of(error: errors.NixletError) -> str:
    """An error's sentence and its hint as one text."""
    return f"{error.message}{_HINT}{error.hint}" if error.hint else error.message


def parted(text: str) -> tuple[str, str]:
    """The sentence and the hint of such a text."""
    message, _, hint = text.partition(_HINT)
    return message, hint


def to_error(error: GRPCError, peer: str) -> errors.NixletError:
    """The error that a peer's status means.

    The message is the peer's own: callers that know what they asked for say so around it. ``peer`` stands in when the peer
    gave no message.
    """
    kind = next((kind for kind, code in _CODES if code is error.status), errors.NixletError)
    message, hint = parted(error.message or f"{peer} answered {error.status.name}")
    # Programs in Go hand on what the system says without a code of its own.
    if kind is errors.NixletError and any(reason in message for reason in _NO_ROOM):
        kind, hint = errors.ResourceExhaustedError, hint or "make room on its file system"
    translated = kind(message, hint=hint)
    # containerd's words are for programmers; whoever prints them says whose they are.
    if error.message and not parted(error.message)[1] and peer.startswith("containerd "):
        translated.said_by = peer
    translated.__cause__ = error
    return translated
