"""What programs say, for people to read: cut, without what would steer a terminal, and without passwords."""

import os
import re
import shlex
import signal
from collections.abc import Sequence

from nixlet import errors

#: How much an error shows of a program's output, of its last line, and of its command.
_SHOWN_OUTPUT = 2000
_SHOWN_LINE = 300
_SHOWN_COMMAND = 600

#: What colours a terminal or sets its title (ECMA-48, 5.4 and 5.6): of no use to a reader, also without its first character.
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?)")

#: A password in a URL (RFC 3986, 3.2.1), which may itself hold an "@" where its writer didn't escape it; or among its parameters.
_PASSWORDS = re.compile(r"(?<=://)([^\s:/@]*:)\S{0,2000}(?=@)|(?i:\b(password=)[^&\s'\"]*)")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        # One of the real-time signals, most of which have no names.
        return f"signal {number}"


def shown(text: str, limit: int = _SHOWN_LINE) -> str:
    """Words of a program for a person to read: one line, without what would steer a terminal, cut at ``limit`` characters."""
    # More than is shown need not be looked at, however long a line is.
    words = "".join(char if char.isprintable() else " " for char in _ESCAPES.sub("", text[: 4 * limit]))
    words = _without_passwords(" ".join(words.split()))
    return words if len(words) <= limit else f"{words[:limit]} …"


def shown_output(text: str) -> str:
    """The end of what a program printed, likewise, in its own lines."""
    lines = _ESCAPES.sub("", _without_passwords(text.strip()[-4 * _SHOWN_OUTPUT :])[-_SHOWN_OUTPUT:]).splitlines()
    return "\n".join("".join(char for char in line.expandtabs() if char.isprintable()) for line in lines)


def _without_passwords(text: str) -> str:
    """Words without the passwords that stand in addresses: errors are read, logged and sent around by many."""
    return _PASSWORDS.sub(lambda found: f"{found[1] or found[2]}…", text)


def shown_command(argv: Sequence[str]) -> str:
    """A hint that says what was started."""
    return f"the command was: {shown(shlex.join(argv), _SHOWN_COMMAND)}"


def failure(argv: Sequence[str], returncode: int, output: bytes, *, name: str = "") -> errors.CommandFailedError:
    """The error for a program that ended badly, in words: killed by a signal, not found, or its exit status.

    It shows the end of what the program printed and the beginning of its command, both without control characters.

    Args:
        argv: What was started.
        returncode: How it ended.
        output: What it printed.
        name: What people call it; empty: as its file.
    """
    program = name or os.path.basename(argv[0])
    text = shown_output(output.decode(errors="replace"))
    if returncode < 0:
        what = f"{program} was ended by {_signal_name(-returncode)}"
    else:
        what = f"{program} ended with status {returncode}"
    return errors.CommandFailedError(
        f"{what}: {last_line(text)}", returncode=returncode, output=text, hint=shown_command(argv)
    )


def last_line(output: str) -> str:
    """The last line of what a program printed, or that it printed nothing, to stand in a sentence."""
    lines = [line for line in output.splitlines() if line.strip()]
    return shown(lines[-1]) if lines else "it printed nothing"
