"""``nixlet exec``: a further process in a running container."""

from nixlet.cli import grammar, options


@grammar.verb(
    options.STATE_DIR,
    grammar.Flag("--interactive", "-i", text="Hand our standard input on."),
    grammar.Flag("--tty", "-t", text="Give it a terminal."),
    grammar.Values("--env", "-e", metavar="NAME[=VALUE]", text="A variable for its environment."),
    grammar.Values("--env-file", metavar="FILE", text="Variables, one a line."),
    grammar.Value("--workdir", "-w", metavar="DIR", text="Its working directory."),
    grammar.Value("--user", "-u", metavar="USER[:GID]", text="Its user, by name or number, and group."),
    grammar.Argument("container", completes="containers"),
    grammar.Argument("command", several=True),
    interspersed=False,
)
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
    from nixlet.cli import containers, node, terminal, variables
    from nixlet.containers import arguments, processes
    from nixlet.rpc.gen import cri_pb2

    words = command[1:] if command[:1] == ("--",) else command
    if not words:
        raise errors.UsageError("there is no command to run")
    rights = None if user is None else arguments.user(user)
    wanted = processes.Command(words, variables.environment(env, env_file, os.environ), workdir or "", rights, tty=tty)
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
