"""The errors that every room raises, and the exit code that each kind means.

A message is one sentence for a person: what went wrong and why. ``hint`` says what to do about it. Rooms raise these with
the original error as cause; ``rpc.status`` maps the kinds to gRPC codes and back, once; ``cli`` prints ``error: …`` and
``hint: …`` and exits with ``exit_code``.
"""


class NixletError(Exception):
    """What nixlet could not do, for a person to read.

    Attributes:
        message: One sentence: what failed and why.
        hint: What to do about it, or an empty string.
        said_by: The other program whose words the message is; empty: it is ours.
    """

    exit_code: int = 125
    said_by: str = ""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message


class UsageError(NixletError):
    """The command line, a configuration file or a manifest is not well-formed (exit code 2)."""

    exit_code = 2


class InvalidArgumentError(NixletError):
    """A value that came from outside does not fit its grammar or its rules."""


class NotFoundError(NixletError):
    """What was asked for does not exist."""


class AlreadyExistsError(NixletError):
    """What should be made exists already."""


class FailedPreconditionError(NixletError):
    """The request is well-formed, but the state of things does not allow it."""


class ResourceExhaustedError(NixletError):
    """A disk is full, or another limit of this host is reached; trying again helps once there is room."""


class PermissionDeniedError(NixletError):
    """The caller, or nixlet itself, lacks the right to do it, or a policy refuses it."""


class UnavailableError(NixletError):
    """Another program (containerd, the Nix daemon) does not answer; trying again may help."""


class UnsupportedError(NixletError):
    """This host, kernel or version of another program can't do it."""


class UnimplementedError(NixletError):
    """The other side doesn't know the method that was called."""


class CallCancelledError(NixletError):
    """The other side gave the call up."""


class DeadlineExceededError(NixletError):
    """The call's deadline passed before an answer came."""


class CommandFailedError(NixletError):
    """A program that nixlet started ended with an error.

    Attributes:
        returncode: Its exit status, or minus the signal's number.
        output: The end of what it printed, for the person.
    """

    def __init__(self, message: str, *, returncode: int, output: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.returncode = returncode
        self.output = output


class NotExecutableError(NixletError):
    """The container's command was found but can't be run (exit code 126, as container tools have it)."""

    exit_code = 126


class CommandNotFoundError(NixletError):
    """The container's command does not exist in its image (exit code 127, as container tools have it)."""

    exit_code = 127
