"""How errors are told: a sentence (what, and why), and a hint (what to do about it), whoever they come from."""

import os
import sys

from nixlet import errors
from nixlet.cli import colours

#: What to do about an error whose own place had no advice: by its kind, the most particular first.
_ADVICE: tuple[tuple[type[errors.NixletError], str], ...] = (
    (errors.UsageError, "correct what is named there; nixlet VERB --help says what a verb takes"),
    (errors.NotFoundError, "nixlet ps -a lists containers, nixlet images images"),
    (errors.AlreadyExistsError, "choose another name, or remove what has it"),
    (errors.UnavailableError, "nixlet doctor looks at this machine, and the node's log says how it is"),
    (errors.UnsupportedError, "nixlet doctor says what this machine has"),
    (errors.DeadlineExceededError, "try it again; the node's log may say what it waits for"),
)

_OTHERWISE = "nixlet --debug VERB prints where it happened; the logs of the node and of its containerd say more"


def print_error(error: errors.NixletError) -> None:
    """Print an error for a person on standard error: the sentence, the end of a program's output, the hint."""
    lines = [f"{colours.coloured('error: ', colours.RED, colours.BOLD, stream=sys.stderr)}{sentence(error)}"]
    if isinstance(error, errors.CommandFailedError) and "\n" in error.output:
        lines += [f"  | {line}" for line in error.output.splitlines()[-10:]]
    lines.append(f"{colours.coloured('hint: ', colours.YELLOW, stream=sys.stderr)}{hint(error)}")
    sys.stderr.write("".join(f"{line}\n" for line in lines))


def sentence(error: errors.NixletError) -> str:
    """What failed and why. What another program answered as it stands is said to be its answer."""
    if error.said_by:
        return f"{error.said_by} answered: {error.message}"
    return error.message


def hint(error: errors.NixletError) -> str:
    """What to do about it."""
    return error.hint or next((advice for kind, advice in _ADVICE if isinstance(error, kind)), _OTHERWISE)


def unforeseen(error: Exception) -> errors.NixletError:
    """The error for what nobody foresaw: this host's state as far as that is the cause, otherwise a mistake of ours."""
    if isinstance(error, OSError):
        # A relative path means nothing then, wherever one is.
        if isinstance(error, FileNotFoundError) and error.filename is None and _working_directory_is_gone():
            return errors.FailedPreconditionError(
                "the working directory doesn't exist any more", hint="change to another one: cd"
            )
        from nixlet.host import files

        if told := files.exhausted(error):
            return told
    return errors.NixletError(
        f"internal error: {type(error).__name__}: {error}", hint="run it again with --debug and report what it prints"
    )


def _working_directory_is_gone() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False
