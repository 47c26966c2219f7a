"""``nixlet rootless``: what an ordinary user's node needs besides."""

import dataclasses
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


rootless = grammar.Group("What an ordinary user's own node needs.", {"check": check})
