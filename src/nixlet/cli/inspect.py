"""``nixlet inspect``: all that is known of containers."""

from nixlet.cli import grammar, options


@grammar.verb(
    options.STATE_DIR,
    grammar.Argument("containers", several=True, completes="containers"),
)
def inspect(containers: tuple[str, ...], state_dir: str) -> None:
    """Print all that is known of CONTAINERS, as a JSON list."""
    from nixlet.cli import link

    with link.connected(state_dir) as node:
        options.print_json(node.call("InspectContainers", {"containers": containers})["containers"])
