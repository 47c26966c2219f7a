"""A node as its systemd unit starts it: command line and variables (systemd.service(5), systemd.exec(5)).

Of a unit's syntax this reads what nixlet's own unit has, its installer writes, and people add to such files, also by ``systemctl edit``: drop-ins
beside the unit (systemd.unit(5), "Drop-ins").
"""

import glob
import os
import re
import shlex
from typing import NamedTuple

from nixlet import errors

#: A line of a unit, of those that count here.
_ASSIGNMENT = re.compile(r"^[ \t]*(ExecStart|Environment|EnvironmentFile)[ \t]*=[ \t]*(.*?)[ \t]*$", re.MULTILINE)

#: A line of a file of variables.
_VARIABLE = re.compile(r"\s*(\w+)=(.*)", re.ASCII)


class Start(NamedTuple):
    """How a unit starts its program.

    Attributes:
        arguments: The program's, without the program.
        environment: The variables that the unit gives it.
    """

    arguments: list[str]
    environment: dict[str, str]


def read(path: str) -> Start:
    """What a unit starts, and with which variables.

    Raises:
        UsageError: It can't be read, or starts nothing.
    """
    name = os.path.basename(path).removesuffix(".service")
    arguments: list[str] | None = None
    environment: dict[str, str] = {}
    from_files: dict[str, str] = {}
    for file in (path, *sorted(glob.glob(f"{glob.escape(path)}.d/*.conf"))):
        for key, value in _ASSIGNMENT.findall(_text(file).replace("\\\n", " ")):
            try:
                if key == "ExecStart":
                    words = [word.replace("%%", "%").replace("$$", "$") for word in shlex.split(value)]
                    arguments = words[1:] if words else None
                elif not value:
                    # An empty list takes back what was said before.
                    (environment if key == "Environment" else from_files).clear()
                elif key == "Environment":
                    environment |= dict(word.partition("=")[::2] for word in shlex.split(value))
                else:
                    from_files |= _variables(value.replace("%N", name).replace("%%", "%"))
            except ValueError as error:
                raise errors.UsageError(f"{file}: {key}={value[:80]} can't be read: {error}") from error
    if arguments is None:
        raise errors.UsageError(f"{path} starts nothing: it has no line ExecStart=", hint="name a unit of nixlet's")
    # A file's variable wins over the unit's own, wherever it stands.
    return Start(arguments, environment | from_files)


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError as error:
        raise errors.UsageError(f"{path} can't be read: {error.strerror}") from error


def _variables(place: str) -> dict[str, str]:
    """The variables of a file that a unit names; behind a dash, it need not be there."""
    path = place.removeprefix("-")
    if path != place and not os.path.exists(path):
        return {}
    found = {}
    for line in _text(path).splitlines():
        matched = _VARIABLE.fullmatch(line)
        if matched is not None:
            found[matched[1]] = _unquoted(matched[2].strip())
    return found


def _unquoted(value: str) -> str:
    if len(value) > 1 and value[0] == value[-1] == "'":
        return value[1:-1]
    if len(value) > 1 and value[0] == value[-1] == '"':
        return re.sub(r'\\(["\\`$])', r"\1", value[1:-1])
    return value
