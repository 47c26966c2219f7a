"""How errors are told: a sentence (what, and why), and a hint (what to do about it), whoever they come from."""

import difflib
import os
import re

import click

from nixlet import errors
from nixlet.host import files

#: How much an option that is meant has in common with what was written.
_ALIKE = 0.7

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
    click.secho("error: ", fg="red", bold=True, nl=False, err=True)
    click.echo(sentence(error), err=True)
    if isinstance(error, errors.CommandFailedError) and "\n" in error.output:
        for line in error.output.splitlines()[-10:]:
            click.echo(f"  | {line}", err=True)
    click.secho("hint: ", fg="yellow", nl=False, err=True)
    click.echo(hint(error), err=True)


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


def usage_error(error: click.ClickException) -> errors.NixletError:
    """click's error in our form; its exit status stays."""
    if not isinstance(error, click.UsageError):
        return errors.NixletError(_plain(error.format_message()))
    said, advice = _plain(error.format_message()), ""
    if isinstance(error, click.NoSuchOption):
        # What has little in common with a word was not meant by it.
        near = difflib.get_close_matches(error.option_name, error.possibilities or (), cutoff=_ALIKE)
        said, advice = f"there is no option {error.option_name}", f"did you mean {' or '.join(near)}? " if near else ""
    if error.ctx is not None:
        usage = " ".join(error.ctx.get_usage().split())
        advice += f"{usage[0].lower()}{usage[1:]}; {error.ctx.command_path} --help says more"
    elif not advice:
        # click doesn't always say which verb it was.
        advice = "nixlet VERB --help says more"
    return errors.UsageError(said, hint=advice)


def _plain(text: str) -> str:
    """A sentence of click's as ours begin and end."""
    text = re.sub(r"\s+", " ", text).strip().removesuffix(".")
    return text[:1].lower() + text[1:]
