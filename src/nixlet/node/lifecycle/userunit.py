"""An ordinary user's node as a service of that user's systemd (systemd.service(5), systemd.exec(5)): written, started, taken away."""

import contextlib
import os
from collections.abc import Mapping

from nixlet import errors
from nixlet.host import files, process

#: The service.
NAME = "nixlet.service"

#: The first line of a unit that is ours to write over and to remove.
_MARK = "# Written by nixlet rootless setup; what is to be otherwise belongs into a drop-in (systemctl --user edit nixlet).\n"

#: Seconds for a manager to have read its units, and for a node to be started or stopped.
_QUICKLY, _PATIENTLY = 30.0, 300.0


def path(environment: Mapping[str, str]) -> str:
    """Where the unit is."""
    home = environment.get("HOME") or os.path.expanduser("~")
    return os.path.join(environment.get("XDG_CONFIG_HOME") or os.path.join(home, ".config"), "systemd/user", NAME)


def render(environment: Mapping[str, str]) -> str:
    """The text of the unit; it has today's PATH, since that of a service lacks what a person's has."""
    command = " ".join(_quoted(word) for word in process.python("nixlet", "server", "--rootless"))
    return f"""{_MARK}[Unit]
Description=nixlet, an ordinary user's container node
# A mistake that doesn't mend itself is not tried for ever.
StartLimitIntervalSec=300
StartLimitBurst=10

[Service]
Type=notify
# Who is ready is the node, which rootlesskit starts.
NotifyAccess=all
Environment={_quoted(f"PATH={environment.get('PATH', os.defpath)}")}
# Variables such as NIX_REMOTE; settings belong into %E/nixlet/config.yaml.
EnvironmentFile=-%E/nixlet/environment
ExecStart={command}
# rootlesskit hands SIGTERM on, and what is left behind it is killed.
KillMode=mixed
# Limits of containers hold, and containerd 2 runs none without.
Delegate=yes
Restart=always
RestartSec=2
RestartPreventExitStatus=2
TimeoutStartSec=infinity
WatchdogSec=60
TasksMax=infinity

[Install]
WantedBy=default.target
"""


def _quoted(word: str) -> str:
    """A word of a unit: with neither variables nor specifiers nor blanks that mean something."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"'


async def set_up(environment: Mapping[str, str], *, start: bool) -> str:
    """Write the unit and have it started now and with each session; where it stands.

    Args:
        environment: Ours.
        start: Whether it is started; else it is only written.

    Raises:
        FailedPreconditionError: There is a unit of that name that is somebody's own.
        CommandFailedError: systemd doesn't start it.
    """
    where = path(environment)
    _check_ours(where)
    files.make_directory(os.path.dirname(where))
    files.write_atomically(where, render(environment), mode=0o644)
    if start:
        await _systemctl("daemon-reload", timeout=_QUICKLY)
        await _systemctl("enable", "--now", NAME, timeout=_PATIENTLY)
    return where


async def take_away(environment: Mapping[str, str]) -> str:
    """Stop the service and remove its unit; where that stood, or an empty text where there was none.

    Raises:
        FailedPreconditionError: The unit of that name is somebody's own.
        CommandFailedError: systemd doesn't stop it.
    """
    where = path(environment)
    _check_ours(where)
    if not os.path.lexists(where):
        return ""
    await _systemctl("disable", "--now", NAME, timeout=_PATIENTLY)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(where)
    await _systemctl("daemon-reload", timeout=_QUICKLY)
    return where


def _check_ours(where: str) -> None:
    try:
        with open(where, encoding="utf-8", errors="replace") as file:
            ours = file.readline() == _MARK
    except FileNotFoundError:
        return
    except OSError as error:
        raise files.refused(f"the unit {where} can't be read", error) from error
    if not ours:
        raise errors.FailedPreconditionError(
            f"the unit {where} is not nixlet's, and stays as it is", hint="move it away, or keep your own"
        )


async def _systemctl(*arguments: str, timeout: float) -> None:
    (await process.run(["systemctl", "--user", *arguments], timeout=timeout)).check()
