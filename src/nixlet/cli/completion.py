"""``nixlet completion``: completion for shells, and what there is to complete."""

from nixlet.cli import grammar

#: Seconds that a person may wait for a completion.
_PATIENCE = 1.0


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
        state_dir: What the command line and the environment say of that.
        incomplete: What they begin with.
    """
    from nixlet import errors
    from nixlet.cli import link, options

    try:
        with link.connected(state_dir or options.configured("state_dir")) as node:
            node.send("ListContainers", {"all": True})
            reply, _ = node.receive(_PATIENCE)
    except (errors.NixletError, TimeoutError):
        return []
    # A pod that has no container has no name to be completed.
    return sorted(
        {each["name"] for each in reply["containers"] if each["name"] and each["name"].startswith(incomplete)}
    )
