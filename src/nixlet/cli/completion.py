"""``nixlet completion``: completion for shells, and what there is to complete."""

import os

import click

from nixlet.node import config

_VARIABLE = "_NIXLET_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion for SHELL, for its start-up file.

    bash: eval "$(nixlet completion bash)"; zsh: the same with zsh; fish: nixlet completion fish | source
    """
    from click import shell_completion

    made = shell_completion.get_completion_class(shell)
    assert made is not None
    root = context.find_root()
    click.echo(made(root.command, {}, root.info_name or "nixlet", _VARIABLE).source())


def containers(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """The names of the containers that are there, as far as they can be told at once."""
    import asyncio

    from nixlet import errors
    from nixlet.cli import node

    # Neither defaults nor the environment are looked at while a line is completed.
    state_dir = context.params.get("state_dir") or os.environ.get("NIXLET_STATE_DIR") or config.DEFAULT_STATE_DIR

    async def names() -> list[str]:
        async with asyncio.timeout(1), node.connected(state_dir) as connection:
            return [each.metadata.name for each in await connection.runtime.containers()]

    try:
        return sorted({name for name in asyncio.run(names()) if name.startswith(incomplete)})
    except (errors.NixletError, TimeoutError):
        return []
