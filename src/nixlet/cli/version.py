"""``nixlet version``: who we are, and which node runs."""

import sys

import nixlet
from nixlet import errors
from nixlet.cli import grammar, options


@grammar.verb(
    options.STATE_DIR,
    options.OUTPUT,
)
@options.asynchronous
async def version(state_dir: str, output: str) -> None:
    """Print the versions of nixlet and of the node that runs."""
    from nixlet.cli import node

    running = None
    try:
        async with node.connected(state_dir) as connection:
            status = await connection.status()
        # A node that has no children yet is still starting.
        if status.children:
            running = {
                "version": status.version,
                "pid": status.pid,
                "snapshotter": status.snapshotter,
                "strategy": status.strategy,
                "containerd": {child.name: child.version for child in status.children}.get("containerd", ""),
                "containerd_config_version": status.containerd_config_version,
                "data_dir": status.data_dir,
                "state_dir": status.state_dir,
            }
    except errors.UnavailableError:
        pass
    # platform would have to be waited for.
    python = sys.version.partition(" ")[0]
    if output == "json":
        answer: dict[str, object] = {
            "version": nixlet.__version__,
            "python": python,
            "node": running,
        }
        options.print_json(answer)
        return
    print(f"nixlet {nixlet.__version__} (Python {python})")
    if running is None:
        print(f"no node runs at {state_dir}")
    else:
        print(
            f"node {running['version']} at {running['state_dir']}, process {running['pid']}, "
            f"containerd {running['containerd']}, snapshotter {running['snapshotter']} ({running['strategy']})"
        )
