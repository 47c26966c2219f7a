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
    data = click.option(
        "--data-dir",
        default=config.DEFAULT_DATA_DIR,
        envvar="NIXLET_DATA_DIR",
        show_default=True,
        show_envvar=True,
        help="What survives a reboot.",
    )
    return state_dir(data(command))


def state_dir(command: F) -> F:
    """``--state-dir``: which running node."""
    decorate = click.option(
        "--state-dir",
        default=config.DEFAULT_STATE_DIR,
        envvar="NIXLET_STATE_DIR",
        show_default=True,
        show_envvar=True,
        help="Sockets and running state.",
    )
    return decorate(command)


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
