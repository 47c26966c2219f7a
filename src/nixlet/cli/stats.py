"""``nixlet stats``: what running containers use."""

from nixlet.cli import grammar, options, sizes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


@grammar.verb(
    options.STATE_DIR,
    options.OUTPUT,
    grammar.Flag("--no-stream", text="Look once."),
    grammar.Argument("containers", several=True, required=False, completes="containers"),
)
def stats(containers: tuple[str, ...], state_dir: str, output: str, *, no_stream: bool) -> None:
    """Show what CONTAINERS use, or all that run: CPU, memory, processes; again each second until Ctrl-C."""
    import sys

    from nixlet.cli import link, streams, table

    parameters = {"containers": containers}
    with link.connected(state_dir) as node:
        for reply in (
            [node.call("ContainerStats", parameters)] if no_stream else node.stream("ContainerStats", parameters)
        ):
            if output == "json":
                options.print_json(reply["containers"])
            else:
                if not no_stream and sys.stdout.isatty():
                    sys.stdout.write("\x1b[2J\x1b[H")
                rows = [_row(usage) for usage in reply["containers"]]
                table.echo(("CONTAINER ID", "NAME", "CPU %", "MEM USAGE / LIMIT", "PIDS"), rows)
            if streams.reader_is_gone():
                return


def _row(usage: "dict[str, Any]") -> tuple[str, ...]:
    limit = sizes.binary(usage["memory_limit_bytes"]) if usage["memory_limit_bytes"] else "-"
    memory = f"{sizes.binary(usage['memory_bytes'])} / {limit}"
    return usage["id"][:12], usage["name"], f"{usage['cpu_percent']:.2f}%", memory, str(usage["pids"])
