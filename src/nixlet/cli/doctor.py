"""``nixlet doctor``: whether this host has what a node needs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from nixlet.cli import options, settings

if TYPE_CHECKING:
    from nixlet.node import findings

#: Exit statuses: a check failed; none failed, but some could not be made.
_FAILED = 1
_COULD_NOT_LOOK = 3

_COLOURS = {"ok": "green", "warning": "yellow", "missing": "red", "unknown": "magenta"}


@click.command()
@settings.node_settings
@options.output
@click.option("--json", "as_json", is_flag=True, help="The same as --output json.")
def doctor(*, as_json: bool, **given: Any) -> int:  # noqa: ANN401 (what the options give)
    """Look whether this host has all that a node of these settings needs, and say what to do where it hasn't.

    The node may be running. The exit status is 0 when a node can work here, be it with warnings, 1 when something is missing, and
    3 when nothing is, but some could not be looked at, as by others than root.
    """
    import asyncio
    import dataclasses

    from nixlet.node import checks, config

    chosen = settings.load(given).settings
    found = asyncio.run(checks.examine(chosen, config.Layout(chosen.data_dir, chosen.state_dir)))
    if as_json or given["output"] == "json":
        options.print_json([dataclasses.asdict(line) for line in found])
    else:
        _print(found)
    statuses = {line.status for line in found}
    return _FAILED if "missing" in statuses else _COULD_NOT_LOOK if "unknown" in statuses else 0


#: k3s's name for it.
check_config = doctor


def _print(found: "Sequence[findings.Line]") -> None:
    group = ""
    for line in found:
        if line.group != group:
            click.echo(("\n" if group else "") + f"{line.group}:")
            group = line.group
        click.echo(f"- {line.name}: {click.style(line.status, fg=_COLOURS[line.status])} ({line.evidence})")
        if line.remedy and line.status != "ok":
            click.echo(f"    {line.remedy}")
    counts = {status: sum(line.status == status for line in found) for status in _COLOURS}
    click.echo("\n" + ", ".join(f"{count} {status}" for status, count in counts.items() if count))
