"""``nixlet rootless``: what an ordinary user's node needs besides, and that node as a service of the user's systemd."""

import dataclasses
import os
from typing import Any

from nixlet.cli import grammar, options, settings


@grammar.verb(*settings.OPTIONS, options.OUTPUT)
@options.asynchronous
async def check(*, output: str, **given: Any) -> int:  # noqa: ANN401 (what the options give)
    """Check whether we could have a node of our own here (nixlet server --rootless): the same as nixlet doctor --rootless.

    Each line is something that was looked at; what is missing has the command that brings it.
    The exit status is 0 when a node can run, 1 when something is missing, 3 when that could not be told.
    """
    from nixlet.cli import doctor

    wanted = settings.load(given).settings
    return await doctor.examine(dataclasses.replace(wanted, rootless=True), as_json=output == "json")


def _check_user() -> None:
    from nixlet import errors

    if os.geteuid() == 0:
        raise errors.UsageError(
            "this is for ordinary users: root's node is a service of the machine's", hint="see install.sh"
        )


@grammar.verb(grammar.Flag("--no-start", text="Only write the unit."))
@options.asynchronous
async def setup(*, no_start: bool) -> None:
    """Have our own node as a service of our systemd: write its unit, start it, and have it started with our sessions.

    What nixlet rootless check finds missing has to be there. The service takes its settings from the configuration file.
    """
    from nixlet.node.lifecycle import userunit

    _check_user()
    print(await userunit.set_up(os.environ, start=not no_start))


@grammar.verb()
@options.asynchronous
async def uninstall() -> None:
    """Stop that service and remove its unit; nixlet uninstall takes away what the node made."""
    from nixlet.node.lifecycle import userunit

    _check_user()
    where = await userunit.take_away(os.environ)
    print(f"Removed: {where}" if where else "Nothing is to be done: there is no unit of nixlet's.")


rootless = grammar.Group(
    "What an ordinary user's own node needs, and that node as a service.",
    {"check": check, "setup": setup, "uninstall": uninstall},
)
