"""``nixlet uninstall``: take a node away."""

from typing import TYPE_CHECKING, Any

from nixlet.cli import grammar, settings

if TYPE_CHECKING:
    from nixlet.node.lifecycle import uninstall as uninstalling
    from nixlet.node.settings import configfile


@grammar.verb(
    *settings.OPTIONS,
    grammar.Value(
        "--snapshotter-root",
        metavar="DIR",
        text="Take the snapshotter away that stood alone with this directory (nixlet snapshotter), and no node.",
    ),
    grammar.Value(
        "--unit",
        metavar="FILE",
        text="Take the settings as this systemd unit starts the node, and as flags besides say.",
    ),
    grammar.Flag("--pods-only", text="Only end the node's pods: images, data and state stay."),
    grammar.Flag("--ignore-missing", text="A node that isn't there, or never started, is no error."),
    grammar.Flag("--yes", text="Do it; without, only say what would be done."),
)
def uninstall(
    *,
    yes: bool,
    snapshotter_root: str | None,
    unit: str | None,
    pods_only: bool,
    ignore_missing: bool,
    **given: Any,  # noqa: ANN401 (what the options give)
) -> None:
    """Remove all that a node made on this host: pods, images, mounts, network, state, data, GC roots.

    The node must be stopped. It knows itself what it made: --data-dir says which one is meant, and other settings are needed only
    where a program has moved since. The Nix store, /etc/nixlet, the programs, and what others put into its directories stay.
    """
    import asyncio
    import os

    from nixlet import errors
    from nixlet.node.lifecycle import namespaces
    from nixlet.node.lifecycle import uninstall as uninstalling
    from nixlet.telemetry import logs

    configuration = settings.load(given) if unit is None else _as_started(unit, given)
    data_dir = os.path.abspath(configuration.settings.data_dir)
    said = {
        name: getattr(configuration.settings, name)
        for name, origin in configuration.origins.items()
        # What the unit says is what the node was started with, which it knows itself.
        if origin.source == "flag" and name != "data_dir" and given[name] not in {None, ()}
    }
    root = snapshotter_root and os.path.abspath(snapshotter_root)
    try:
        planned = uninstalling.plan_snapshotter(root) if root else uninstalling.plan(data_dir, said)
    except errors.NotFoundError as error:
        if not ignore_missing:
            raise
        print(f"Nothing is to be done: {error}.")
        return
    if yes and planned.settings is not None and planned.settings.rootless:
        # What containers made belongs to users that only root of the node's namespace is above.
        namespaces.become_inside(planned.settings, configuration.files)
    if pods_only:
        if yes:
            logs.configure(debug=configuration.settings.debug)
            asyncio.run(uninstalling.end_pods(data_dir, said))
        print(f"{'Ended' if yes else 'Would be ended'}: all pods of the node at {data_dir}.")
    elif not yes:
        _show("Would be removed:", planned)
    else:
        logs.configure(debug=configuration.settings.debug)
        work = uninstalling.uninstall_snapshotter(root) if root else uninstalling.uninstall(data_dir, said)
        _show("Removed:", asyncio.run(work))
    if not yes:
        print("Nothing was done yet; to do it, add --yes.")


def _as_started(unit: str, given: dict[str, Any]) -> "configfile.Configuration":
    """The configuration of a node as a unit starts it; flags of our own win."""
    import os

    from nixlet import errors
    from nixlet.cli import clickadapter, parser, unitfile, verbs
    from nixlet.node.settings import configfile

    start = unitfile.read(unit)
    # What the node found there is needed to take it away.
    os.environ["PATH"] = start.environment.get("PATH", os.environ.get("PATH", os.defpath))
    # With that one the parser leaves everything to click, which looks at the variables of our own process.
    variables = {name: value for name, value in start.environment.items() if name != verbs.DEBUG_VARIABLE}
    parsed = parser.parse(start.arguments, variables) or clickadapter.parse(start.arguments)
    if "data_dir" not in parsed.values:
        raise errors.UsageError(f"{unit} starts no node", hint="name the unit of a node: nixlet server or nixlet agent")
    said = parsed.values | {name: value for name, value in given.items() if value not in {None, ()}}
    return configfile.load(said, start.environment, file=said["config"])


def _show(title: str, plan: "uninstalling.Plan") -> None:
    """Say what goes or went, and what stays; only afterwards, since whoever reads it may have gone."""
    print(title)
    # Those of somebody else's containerd are theirs.
    own = plan.settings is not None and not plan.settings.container_runtime_endpoint
    pods = ["all pods and images of this node"] if own else []
    for line in (*pods, *(f"the bridge {bridge}" for bridge in plan.bridges), *plan.trees):
        print(f"  {line}")
    print("Kept:")
    for line in plan.kept:
        print(f"  {line}")
