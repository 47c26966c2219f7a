"""Options that several verbs have."""

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nixlet import errors
from nixlet.node import config

if TYPE_CHECKING:
    from nixlet.containers import logs

F = TypeVar("F", bound=Callable[..., Any])


class Verb(click.Command):
    """A verb that other tools have as well, with options that this one lacks and that people will try."""

    def __init__(self, *args: Any, foreign: Mapping[str, str] | None = None, **kwargs: Any) -> None:  # noqa: ANN401 (click's)
        """A verb; ``foreign`` says, by option, what to do instead."""
        super().__init__(*args, **kwargs)
        self._foreign = foreign or {}

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the arguments, as click does."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            hint = self._foreign.get(error.option_name)
            if hint is None:
                raise
            raise errors.UsageError(f"{ctx.command_path} has no {error.option_name}", hint=hint) from error


def node_directories(command: F) -> F:
    """``--data-dir`` and ``--state-dir``: which node."""
    return state_dir(_directory("data_dir", "What survives a reboot.")(command))


def state_dir(command: F) -> F:
    """``--state-dir``: which running node."""
    return _directory("state_dir", "Sockets and running state.")(command)


def _directory(name: str, text: str) -> Callable[[F], F]:
    return click.option(
        config.flag(name),
        default=functools.partial(_configured, name),
        envvar=config.variable(name),
        show_default=f"as the node's configuration file has it, or {getattr(config.Settings(), name)}",
        show_envvar=True,
        help=text,
    )


def _configured(name: str) -> str:
    """A setting of the node's, as its configuration file has it: verbs find the node that was started with that file."""
    import os

    named = os.environ.get(config.FILE_VARIABLE)
    path = named or config.DEFAULT_FILE
    default: str = getattr(config.Settings(), name)
    # Most machines have no such file, and reading one takes longer than what many verbs do.
    there = [each for each in (path, f"{path}.d") if os.path.exists(each)]
    if not all(os.access(each, os.R_OK) for each in there) or (not there and not named):
        return default
    from nixlet.node import configfile

    value: str = getattr(configfile.load({}, os.environ).settings, name)
    return value


def output(command: F) -> F:
    """``--output``: for people or for programs."""
    decorate = click.option(
        "--output",
        "-o",
        type=click.Choice(["table", "json"]),
        default="table",
        show_default=True,
        help="The form of the answer.",
    )
    return decorate(command)


def asynchronous(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a verb be a coroutine."""

    @functools.wraps(function)
    def run(*args: object, **kwargs: object) -> object:
        import asyncio

        return asyncio.run(function(*args, **kwargs))

    return run


def print_json(value: object) -> None:
    """Print an answer for a program."""
    import json

    click.echo(json.dumps(value, indent=2))


def write_record(record: "logs.Record", prefix: bytes = b"") -> None:
    """Hand a piece of a container's output on, to the stream that it was written to.

    Raises:
        click.exceptions.Exit: Nobody reads it any more.
    """
    from nixlet.cli import terminal

    terminal.write(record.stream, prefix + record.text)
