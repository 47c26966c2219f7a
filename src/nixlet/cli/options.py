"""Options that several verbs have, and what else they share."""

import os

from nixlet.cli import grammar
from nixlet.node import names

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

    from nixlet.containers import logs


#: The directories that verbs find a node by.
_DIRECTORIES = {"data_dir": names.DEFAULT_DATA_DIR, "state_dir": names.DEFAULT_STATE_DIR}


def configured(name: str) -> str:
    """A directory of the node's, as its configuration file has it: verbs find the node that was started with that file.

    Args:
        name: "data_dir" or "state_dir".

    Raises:
        UsageError: The file can't be used.
    """
    named = os.environ.get(names.FILE_VARIABLE)
    path = named or names.DEFAULT_FILE
    # Most machines have no such file, and reading one takes longer than what many verbs do.
    there = [each for each in (path, f"{path}.d") if os.path.exists(each)]
    if not all(os.access(each, os.R_OK) for each in there) or (not there and not named):
        return _DIRECTORIES[name]
    from nixlet.node import configfile

    value: str = getattr(configfile.load({}, os.environ).settings, name)
    return value


def _directory(name: str, text: str) -> grammar.Option:
    return grammar.Value(
        names.flag(name),
        default=lambda: configured(name),
        default_text=f"as the node's configuration file has it, or {_DIRECTORIES[name]}",
        variable=names.variable(name),
        text=text,
    )


#: Which node, by what survives a reboot.
DATA_DIR = _directory("data_dir", "What survives a reboot.")

#: Which running node.
STATE_DIR = _directory("state_dir", "Sockets and running state.")

#: For people or for programs.
OUTPUT = grammar.Value("--output", "-o", choices=("table", "json"), default="table", text="The form of the answer.")


def asynchronous(function: "Callable[..., Coroutine[Any, Any, int | None]]") -> "Callable[..., int | None]":
    """Let a verb be a coroutine."""

    def run(**given: object) -> int | None:
        import asyncio

        return asyncio.run(function(**given))

    run.__doc__ = function.__doc__
    return run


def print_json(value: object) -> None:
    """Print an answer for a program."""
    import json

    print(json.dumps(value, indent=2))


def write_record(record: "logs.Record", prefix: bytes = b"") -> None:
    """Hand a piece of a container's output on, to the stream that it was written to.

    Raises:
        Exit: Nobody reads it any more.
    """
    from nixlet.cli import terminal

    terminal.write(record.stream, prefix + record.text)
