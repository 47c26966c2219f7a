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
def exec(  # noqa: A001 (the verb's name)
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
    from nixlet.cli import ends, link, session, variables

    words = command[1:] if command[:1] == ("--",) else command
    if not words:
        raise errors.UsageError("there is no command to run")
    given = variables.environment(env, env_file, os.environ)
    if tty:
        session.check_terminal(stdin=interactive)
    columns, rows = session.size() if tty else (0, 0)
    with (
        link.connected(state_dir) as node,
        link.connected(state_dir) as control,
        ends.Ends(stdin=interactive, stderr=not tty) as ours,
        session.Signals() as signals,
    ):
        process = session.Session(node, control, ours)
        wanted = {
            "container": container,
            "command": words,
            "streams": ours.streams,
            "tty": tty,
            "interactive": interactive,
            "env": [f"{name}={value}" for name, value in given],
            "user": user or "",
            "workdir": workdir or "",
            "columns": columns,
            "rows": rows,
        }
        node.send("Exec", wanted, ours.descriptors, more=True)
        ours.handed_over()
        name = process.reply(signals)[0]["started"]["session"]
        return process.front(signals, name, tty=tty)
