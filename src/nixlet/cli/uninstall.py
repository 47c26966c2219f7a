"""``nixlet uninstall``: take a node away."""

from typing import TYPE_CHECKING, Any

from nixlet.cli import grammar, settings

if TYPE_CHECKING:
    from nixlet.node.lifecycle import uninstall as uninstalling


@grammar.verb(
    *settings.OPTIONS,
    grammar.Value(
        "--snapshotter-root",
        metavar="DIR",
        text="Take the snapshotter away that stood alone with this directory (nixlet snapshotter), and no node.",
    ),
    grammar.Flag("--yes", text="Do it; without, only say what would be done."),
)
def uninstall(*, yes: bool, snapshotter_root: str | None, **given: Any) -> None:  # noqa: ANN401 (what the options give)
    """Remove all that a node made on this host: pods, images, mounts, network, state, data, GC roots.

    The node must be stopped. It knows itself what it made: --data-dir says which one is meant, and other settings are needed only
    where a program has moved since. The Nix store, /etc/nixlet, the programs, and what others put into its directories stay.
    """
    import asyncio
    import os

    from nixlet.node.lifecycle import uninstall as uninstalling
    from nixlet.telemetry import logs

    configuration = settings.load(given)
    data_dir = os.path.abspath(configuration.settings.data_dir)
    said = {
        name: getattr(configuration.settings, name)
        for name, origin in configuration.origins.items()
        if origin.source == "flag" and name != "data_dir"
    }
    if not yes:
        root = snapshotter_root and os.path.abspath(snapshotter_root)
        _show("Would be removed:", uninstalling.plan_snapshotter(root) if root else uninstalling.plan(data_dir, said))
        print("Nothing was removed yet; to do it, add --yes.")
        return
    logs.configure(debug=configuration.settings.debug)
    if snapshotter_root:
        done = asyncio.run(uninstalling.uninstall_snapshotter(os.path.abspath(snapshotter_root)))
    else:
        done = asyncio.run(uninstalling.uninstall(data_dir, said))
    _show("Removed:", done)


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
