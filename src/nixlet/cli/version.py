"""``nixlet version``: who we are, and which node runs."""

import sys

import nixlet
from nixlet import errors
from nixlet.cli import grammar, options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


@grammar.verb(
    options.STATE_DIR,
    options.OUTPUT,
)
def version(state_dir: str, output: str) -> None:
    """Print the versions of nixlet and of the node that runs."""
    running, why_not = None, f"no node runs at {state_dir}"
    try:
        running = _running(state_dir)
    except errors.PermissionDeniedError as error:
        why_not = str(error)
    except errors.UnavailableError:
        pass
    # platform would have to be waited for.
    python = sys.version.partition(" ")[0]
    if output == "json":
        options.print_json({"version": nixlet.__version__, "python": python, "node": running})
        return
    print(f"nixlet {nixlet.__version__} (Python {python})")
    if running is None:
        print(why_not)
    else:
        print(
            f"node {running['version']} at {running['state_dir']}, process {running['pid']}, "
            f"containerd {running['containerd']}, snapshotter {running['snapshotter']} ({running['strategy']})"
        )


def _running(state_dir: str) -> "dict[str, Any] | None":
    from nixlet.cli import link

    with link.connected(state_dir) as node:
        status = node.call("GetStatus")
    # A node that has no children yet is still starting.
    if not status["children"]:
        return None
    return {
        "version": status["version"],
        "pid": status["pid"],
        "snapshotter": status["snapshotter"],
        "strategy": status["strategy"],
        "containerd": {child["name"]: child["version"] for child in status["children"]}.get("containerd", ""),
        "containerd_config_version": status["containerd_config_version"],
        "data_dir": status["data_dir"],
        "state_dir": status["state_dir"],
    }
