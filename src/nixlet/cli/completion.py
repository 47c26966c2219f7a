"""``nixlet completion``: completion for shells, and what there is to complete."""

import os

from nixlet.cli import grammar
from nixlet.node import names


@grammar.verb(grammar.Argument("shell", choices=("bash", "zsh", "fish")))
def completion(shell: str) -> None:
    """Print the completion for SHELL, for its start-up file.

    bash: eval "$(nixlet completion bash)"; zsh: the same with zsh; fish: nixlet completion fish | source
    """
    from nixlet.cli import clickadapter

    print(clickadapter.completion_script(shell))


def containers(state_dir: str | None, incomplete: str) -> list[str]:
    """The names of the containers that are there, as far as they can be told at once.

    Args:
        state_dir: What the command line says of that.
        incomplete: What they begin with.
    """
    import asyncio

    from nixlet import errors
    from nixlet.cli import node

    # Neither defaults nor the environment are looked at while a line is completed.
    found_at = state_dir or os.environ.get(names.variable("state_dir")) or names.DEFAULT_STATE_DIR

    async def found() -> list[str]:
        async with asyncio.timeout(1), node.connected(found_at) as connection:
            return [each.metadata.name for each in await connection.runtime.containers()]

    try:
        return sorted({name for name in asyncio.run(found()) if name.startswith(incomplete)})
    except (errors.NixletError, TimeoutError):
        return []
