"""``nixlet exec``: a further process in a running container."""

import click

from nixlet.cli import completion, options


@click.command("exec", context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False})
@options.state_dir
@click.option("--interactive", "-i", is_flag=True, help="Hand our standard input on.")
@click.option("--tty", "-t", is_flag=True, help="Give it a terminal.")
@click.option("--env", "-e", multiple=True, metavar="NAME[=VALUE]", help="A variable for its environment.")
@click.option("--env-file", multiple=True, metavar="FILE", help="Variables, one a line.")
@click.option("--workdir", "-w", metavar="DIR", help="Its working directory.")
@click.option("--user", "-u", metavar="USER[:GID]", help="Its user, by name or number, and group.")
@click.argument("container", shell_complete=completion.containers)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@options.asynchronous
async def exec(  # noqa: A001 (the verb's name)
    container: str,
    command: tuple[str, ...],
    state_dir: str,
    env: tuple[str, ...],
    env_file: tuple[str, ...],
    workdir: str | None,
    user: str | None,
    *,
    interactive: bool,
    tty: bool,
) -> int:
    """Run COMMAND in a running CONTAINER; its exit status is ours."""
    import os

    from nixlet import errors
    from nixlet.cli import containers, node, terminal
    from nixlet.containers import arguments, processes
    from nixlet.rpc.gen import cri_pb2

    words = command[1:] if command[:1] == ("--",) else command
    if not words:
        raise errors.UsageError("there is no command to run")
    rights = None if user is None else arguments.user(user)
    wanted = processes.Command(words, arguments.environment(env, env_file, os.environ), workdir or "", rights, tty=tty)
    if tty:
        terminal.check(stdin=interactive)
    async with node.connected(state_dir) as connection:
        found = await containers.find(connection, container)
        if found.state != cri_pb2.CONTAINER_RUNNING:
            raise errors.FailedPreconditionError(f"container {container} is not running")
        service = processes.Processes(connection.containerd, connection.tasks, connection.layout.state_dir)
        async with service.started(found.id, wanted, stdin=interactive) as process:
            with terminal.given_to(process.resize, process.send_signal, tty=tty, stdin=interactive):
                return await process.serve(terminal.written, terminal.Input() if interactive else None)
