"""Errors become statuses and statuses errors, without a loss where both have a word for it."""

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from nixlet import errors
from nixlet.rpc import status

BOTH_WAYS = {
    errors.NotFoundError: Status.NOT_FOUND,
    errors.AlreadyExistsError: Status.ALREADY_EXISTS,
    errors.InvalidArgumentError: Status.INVALID_ARGUMENT,
    errors.FailedPreconditionError: Status.FAILED_PRECONDITION,
    errors.ResourceExhaustedError: Status.RESOURCE_EXHAUSTED,
    errors.PermissionDeniedError: Status.PERMISSION_DENIED,
    errors.UnavailableError: Status.UNAVAILABLE,
    errors.UnimplementedError: Status.UNIMPLEMENTED,
    errors.CallCancelledError: Status.CANCELLED,
    errors.DeadlineExceededError: Status.DEADLINE_EXCEEDED,
    errors.NixletError: Status.UNKNOWN,
}


@pytest.mark.parametrize(("kind", "code"), BOTH_WAYS.items())
@pytest.mark.parametrize("hint", ["", "do this: 100 %"])
def test_there_and_back(kind: type[errors.NixletError], code: Status, hint: str) -> None:
    sent = status.from_error(kind("it is so", hint=hint))
    assert sent.status is code
    received = status.to_error(sent, "the peer")
    assert (type(received), received.message, received.hint) == (kind, "it is so", hint)
    assert received.__cause__ is sent


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UnsupportedError("x"), Status.FAILED_PRECONDITION),
        (errors.UsageError("x"), Status.INVALID_ARGUMENT),
        (errors.CommandFailedError("x", returncode=1), Status.UNKNOWN),
    ],
)
def test_kinds_that_grpc_has_no_word_for(error: errors.NixletError, code: Status) -> None:
    assert status.from_error(error).status is code


@pytest.mark.parametrize("code", [Status.INTERNAL, Status.ABORTED, Status.DATA_LOSS])
def test_codes_that_we_have_no_word_for(code: Status) -> None:
    received = status.to_error(GRPCError(code, "too much"), "the peer")
    assert (type(received), received.message) == (errors.NixletError, "too much")


@pytest.mark.parametrize("reason", ["no space left on device", "disk quota exceeded"])
def test_a_full_disk_is_one_whatever_its_code(reason: str) -> None:
    received = status.to_error(GRPCError(Status.UNKNOWN, f"write /x/data: {reason}: unknown"), "containerd at /c")
    assert (type(received), received.said_by) == (errors.ResourceExhaustedError, "containerd at /c")
    assert received.hint == "make room on its file system"
    # A code says more.
    received = status.to_error(GRPCError(Status.UNAVAILABLE, reason), "containerd at /c")
    assert type(received) is errors.UnavailableError


def test_a_status_without_a_message_names_the_peer() -> None:
    received = status.to_error(GRPCError(Status.ABORTED), "containerd at /run/c.sock")
    assert received.message == "containerd at /run/c.sock answered ABORTED"


def test_a_long_error_where_there_is_room_for_one_line() -> None:
    """It begins with what it is about, and ends with the cause; the hint has room of its own."""
    error = errors.NotFoundError(
        "the path /nix/store/a\n" + "is not there " * 200 + "since nobody has it", hint="h" * 900
    )
    sent = status.shortened(error)
    assert sent.status is Status.NOT_FOUND
    message, hint = status.parted(sent.message or "")
    assert message.startswith("the path /nix/store/a is not there")
    assert message.endswith("since nobody has it")
    assert len(sent.message or "") < 1000
    assert "\n" not in (sent.message or "")
    assert set(hint) == {"h", " ", "…"}
    short = status.shortened(errors.NotFoundError("it is gone"))
    assert short.message == "it is gone"
