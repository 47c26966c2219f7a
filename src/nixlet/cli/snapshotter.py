"""``nixlet snapshotter``: the snapshotter alone, for any containerd."""

import click


@click.command()
@click.option(
    "--config", help="A configuration file as nix-snapshotter's.  [default: /etc/nix-snapshotter/config.toml]"
)
@click.option("--root", help="The snapshotter's directory.")
@click.option("--address", help="The socket to serve on.")
@click.option(
    "--strategy",
    type=click.Choice(["auto", "view", "bind"]),
    help="How containers get to see closures.  [default: the first that works]",
)
@click.option(
    "--unsigned-paths",
    type=click.Choice(["allow", "deny"]),
    help="Whether images may name store paths that nobody vouches for.  [default: allow]",
)
@click.option(
    "--log-level",
    type=click.Choice(["trace", "debug", "info", "warn", "error", "fatal", "panic"]),
    default="info",
    show_default=True,
)
def snapshotter(config: str | None, log_level: str, **overrides: str | None) -> None:
    """Serve the nix snapshotter and the CRI image service to a containerd that is not nixlet's.

    Takes nix-snapshotter's configuration; options win over the file. It serves at once, whether that containerd is there
    yet or not, and SIGTERM and SIGINT leave all snapshots as they are.
    """
    import asyncio

    import uvloop

    from nixlet.node import standalone
    from nixlet.telemetry import logs

    settings = standalone.read_settings(config, overrides)
    logs.configure(debug=log_level in {"trace", "debug"})
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(standalone.run(settings))
