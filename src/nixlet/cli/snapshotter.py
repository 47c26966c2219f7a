"""``nixlet snapshotter``: the snapshotter alone, for any containerd."""

from nixlet.cli import grammar


@grammar.verb(
    grammar.Value(
        "--config", default_text="/etc/nix-snapshotter/config.toml", text="A configuration file as nix-snapshotter's."
    ),
    grammar.Value("--root", text="The snapshotter's directory."),
    grammar.Value("--address", text="The socket to serve on."),
    grammar.Value(
        "--strategy",
        choices=("auto", "view", "bind"),
        default_text="the first that works",
        text="How containers get to see closures.",
    ),
    grammar.Value(
        "--unsigned-paths",
        choices=("allow", "deny"),
        default_text="allow",
        text="Whether images may name store paths that nobody vouches for.",
    ),
    grammar.Value("--log-level", choices=("trace", "debug", "info", "warn", "error", "fatal", "panic"), default="info"),
)
def snapshotter(config: str | None, log_level: str, **overrides: str | None) -> None:
    """Serve the nix snapshotter and the CRI image service to a containerd that is not nixlet's.

    Takes nix-snapshotter's configuration; options win over the file. It serves at once, whether that containerd is there
    yet or not, and SIGTERM and SIGINT leave all snapshots as they are.
    """
    import asyncio

    import uvloop

    from nixlet.node.lifecycle import standalone
    from nixlet.telemetry import logs

    settings = standalone.read_settings(config, overrides)
    logs.configure(debug=log_level in {"trace", "debug"})
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(standalone.run(settings))
