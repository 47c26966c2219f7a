"""``nixlet run``: a container by itself, as a pod of one."""

import os

import click

from nixlet.cli import options


@click.command(context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False})
@options.state_dir
@click.option("--rm", "remove", is_flag=True, help="Remove the container when it has ended.")
@click.option("--detach", "-d", is_flag=True, help="Print the container's ID and leave it running.")
@click.option("--name", help="The container's name.  [default: a random one]")
@click.option("--env", "-e", multiple=True, help="NAME=VALUE for its environment.")
@click.option("--pull", type=click.Choice(["always", "missing", "never"]), default="missing", show_default=True)
@click.argument("image")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@options.asynchronous
async def run(
    image: str,
    command: tuple[str, ...],
    state_dir: str,
    name: str | None,
    env: tuple[str, ...],
    pull: str,
    *,
    remove: bool,
    detach: bool,
) -> int:
    """Run a container from IMAGE; its exit status is ours.

    IMAGE is a reference (nix:0/nix/store/…, or a registry's) or the path of an archive. COMMAND takes the place of the
    image's own arguments.
    """
    import asyncio

    from nixlet import errors
    from nixlet.cli import node
    from nixlet.kube import model

    # Options end at IMAGE; a "--" behind it only says so once more.
    command = command[1:] if command[:1] == ("--",) else command
    policies = {"always": "Always", "missing": "IfNotPresent", "never": "Never"}
    reference = node.image_reference(image)
    own_name = name or f"run-{os.urandom(4).hex()}"
    pairs = []
    for text in env:
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise errors.UsageError(f"--env {text!r} is not NAME=VALUE")
        pairs.append((key, value))
    container = model.Container(
        name=model.checked_name(own_name, "--name"),
        image=reference,
        pull_policy=policies[pull],
        args=tuple(model.escaped(word) for word in command),
        env=tuple((key, model.escaped(value)) for key, value in pairs),
    )
    pod = model.Pod(own_name, containers=(container,), restart_policy="Never")
    async with node.connected(state_dir) as connection:
        player = await connection.player()
        running = await player.play(pod)
        if detach:
            click.echo(running.containers[0].id)
            return 0
        try:
            async for record in player.output(running.containers[0]):
                options.write_record(record)
            code = (await player.wait(running.containers[0].id)).exit_code
        finally:
            sandboxes = await player.find(pod.name, pod.namespace)
            for sandbox in sandboxes:
                if remove:
                    await asyncio.shield(player.remove(sandbox))
                else:
                    # It stays for `nixlet logs` and `nixlet rm`, but is to hold no network and no process.
                    await asyncio.shield(connection.release_pod(sandbox.id))
    return code
