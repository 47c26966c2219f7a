"""``nixlet uninstall``: take a node away."""

from typing import Any

import click

from nixlet import errors
from nixlet.cli import settings


@click.command()
@settings.node_settings
@click.option("--yes", is_flag=True, help="Do it; without, only say what would be done.")
def uninstall(*, yes: bool, **given: Any) -> None:  # noqa: ANN401 (what the options give)
    """Remove all that a node made on this host: pods, images, mounts, network, state, data, GC roots.

    The node must be stopped. The Nix store, /etc/nixlet and the programs stay.
    """
    import asyncio

    from nixlet.node import uninstall as uninstalling
    from nixlet.telemetry import logs

    configuration = settings.load(given).settings
    plan = uninstalling.plan(configuration)
    click.echo("Removed:" if yes else "Would be removed:")
    for line in ("all pods and images of this node", f"the bridge {plan.bridge} and its rules", *plan.trees):
        click.echo(f"  {line}")
    click.echo("Kept:")
    for line in plan.kept:
        click.echo(f"  {line}")
    if not yes:
        raise errors.UsageError("nothing was removed", hint="to do it, add --yes")
    logs.configure(debug=configuration.debug)
    asyncio.run(uninstalling.uninstall(configuration))
