"""Options that several verbs have."""

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nixlet.node import config

if TYPE_CHECKING:
    from nixlet.kube import logs

F = TypeVar("F", bound=Callable[..., Any])


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
    """Hand a piece of a container's output on, to the stream that it was written to."""
    stream = sys.stderr.buffer if record.stream == "stderr" else sys.stdout.buffer
    stream.write(prefix + record.text)
    stream.flush()
