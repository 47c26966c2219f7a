"""What goes wrong between us and a server, in words: true to the cause, and never with a secret in it."""

import msgspec

from nixlet import errors
from nixlet.encoding import unreadable
from nixlet.kubeclient.endpoint import Endpoint

#: How much of a server's own words stands in an error (characters).
_MAX_WORDS = 400


class UnauthenticatedError(errors.PermissionDeniedError):
    """The server doesn't know who we are (401)."""


class ConflictError(errors.FailedPreconditionError):
    """The object has changed meanwhile, or another one owns a field (409)."""


class ExpiredError(errors.FailedPreconditionError):
    """The server has forgotten what was asked for: a version from which to watch, the rest of a list (410)."""


class StrangerError(errors.FailedPreconditionError):
    """The server's certificate isn't good: another authority's, another host's, or not valid now."""


class Status(msgspec.Struct, frozen=True):
    """A server's answer where something failed (apimachinery's ``metav1.Status``), as far as it is looked at."""

    message: str = ""
    reason: str = ""
    code: int = 0


#: Kinds of errors by the status of the answer, and what to do.
_KINDS: dict[int, tuple[type[errors.NixletError], str]] = {
    400: (errors.InvalidArgumentError, ""),
    403: (errors.PermissionDeniedError, "RBAC of the cluster says who may do what: kubectl auth can-i --list"),
    404: (errors.NotFoundError, ""),
    405: (errors.UnimplementedError, ""),
    409: (ConflictError, "somebody else was at it meanwhile: try it again"),
    410: (ExpiredError, ""),
    413: (errors.InvalidArgumentError, ""),
    415: (errors.UnimplementedError, ""),
    422: (errors.InvalidArgumentError, ""),
    429: (errors.UnavailableError, "it has too much to do: try it again in a while"),
}


def words(text: str) -> str:
    """Foreign words for a sentence: on one line, without control characters, cut where they are too many."""
    plain = " ".join("".join(each if each.isprintable() else " " for each in text[: 4 * _MAX_WORDS]).split())
    return plain if len(plain) <= _MAX_WORDS else f"{plain[:_MAX_WORDS]}…"


def of_answer(endpoint: Endpoint, code: int, body: bytes) -> errors.NixletError:
    """The error for an answer that isn't what was asked for.

    Args:
        endpoint: Who answered.
        code: The answer's status.
        body: What it holds: a ``Status``, or any words.
    """
    try:
        status = msgspec.json.decode(body, type=Status)
        said = words(status.message)
    except unreadable.JSON:
        status = Status()
        said = words(body.decode(errors="replace"))
    return of_status(endpoint, code, status.reason, said)


def of_status(endpoint: Endpoint, code: int, reason: str, said: str) -> errors.NixletError:
    """The error for a status, with the server's words as ``words`` gives them."""
    shown = endpoint.shown
    if code == 401:
        return UnauthenticatedError(
            f"{shown} doesn't know us: our certificate or token isn't valid there, or no more",
            hint="a certificate that has ended is renewed by the server's next start; tokens are listed by nixlet token list",
        )
    if code == 409 and reason == "AlreadyExists":
        return _said(errors.AlreadyExistsError, endpoint, said or "it exists already", "")
    if 300 <= code < 400:
        return errors.UnavailableError(f"{shown} sends us elsewhere ({code}), which no API server does")
    kind, hint = _KINDS.get(code, (errors.UnavailableError if code >= 500 else errors.FailedPreconditionError, ""))
    return _said(kind, endpoint, said or f"status {code}", hint)


def _said(kind: type[errors.NixletError], endpoint: Endpoint, said: str, hint: str) -> errors.NixletError:
    error = kind(said, hint=hint)
    error.said_by = endpoint.what
    return error


def no_object(endpoint: Endpoint) -> errors.NixletError:
    """The error for an answer that is no object of Kubernetes'."""
    return errors.UnavailableError(
        f"{endpoint.shown} answers with something that is no object of Kubernetes'",
        hint="see that the address and the port are the API server's",
    )


def too_large(endpoint: Endpoint, most: int) -> errors.NixletError:
    """The error for an answer that there is no room for (bytes)."""
    return errors.ResourceExhaustedError(f"{endpoint.shown} answers with more than {most >> 20} MiB")
