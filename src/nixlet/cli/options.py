"""Options that several verbs have, and what else they share."""

import os

from nixlet.cli import grammar
from nixlet.encoding import utf8
from nixlet.node.settings import names

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any


def configured(name: str) -> str:
    """A directory of the node's, as its configuration file has it: verbs find the node that was started with that file.

    Args:
        name: "data_dir", "state_dir" or "kubernetes_bin_dir".

    Raises:
        UsageError: The file can't be used.
    """
    named = os.environ.get(names.FILE_VARIABLE)
    own = names.defaults(os.environ)
    path = named or own["file"]
    found = _files(path)
    # Not everybody who asks a node may read its configuration.
    if (named and not found) or (all(os.access(each, os.R_OK) for each in found) and any(map(_may_say, found))):
        from nixlet.node.settings import configfile

        value: str = getattr(configfile.load({}, os.environ).settings, name)
        return value
    return own.get(name, "")


def _files(path: str) -> list[str]:
    """A configuration file and what stands in the directory of its drop-ins, as far as that is there."""
    try:
        drop_ins = [os.path.join(f"{path}.d", name) for name in os.listdir(f"{path}.d")]
    except OSError:
        drop_ins = []
    return [each for each in (path,) if os.path.exists(each)] + [each for each in drop_ins if os.path.isfile(each)]


def _may_say(path: str) -> bool:
    """Whether a file may say where the node's directories are. To read YAML takes longer than what most verbs do."""
    if not os.path.isfile(path):
        # To wait for a pipe is not for us, nor to refuse it.
        return path != os.devnull
    with open(path, "rb") as file:
        text = file.read()
    # Of an example nothing but comments is left.
    said = b"\n".join(line for line in text.splitlines() if not line.lstrip().startswith(b"#"))
    # By an escape, or in another encoding, a key may be written otherwise.
    return b"dir" in said or b"\\" in said or not text.isascii()


def _directory(name: str, default: str, text: str) -> grammar.Option:
    return grammar.Value(
        names.flag(name),
        default=lambda: configured(name),
        default_text=f"as the node's configuration file has it, or {default}",
        variable=names.variable(name),
        text=text,
    )


#: Which node, by what survives a reboot.
DATA_DIR = _directory(
    "data_dir", f"{names.DEFAULT_DATA_DIR}; an ordinary user's own: ~/.local/share/nixlet", "What survives a reboot."
)

#: Where programs are that a node's cluster is made of.
KUBERNETES_BIN_DIR = grammar.Value(
    names.flag("kubernetes_bin_dir"),
    default=lambda: configured("kubernetes_bin_dir"),
    default_text="as the node's configuration file has it, or PATH",
    variable=names.variable("kubernetes_bin_dir"),
    text="Where Kubernetes' programs are.",
)

#: Which running node.
STATE_DIR = _directory(
    "state_dir",
    f"{names.DEFAULT_STATE_DIR}; an ordinary user's own: $XDG_RUNTIME_DIR/nixlet",
    "Sockets and running state.",
)

#: For people or for programs.
OUTPUT = grammar.Value("--output", "-o", choices=("table", "json"), default="table", text="The form of the answer.")


def working_directory() -> str | None:
    """Where relative paths begin that a person writes; None: nowhere that could be said, since it was removed or is not UTF-8."""
    try:
        found = os.getcwd()
    except FileNotFoundError:
        return None
    return found if utf8.is_valid(found) else None


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
