"""``nixlet run``: a container by itself, as a pod of one."""

import os

from nixlet.cli import grammar, options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nixlet.cli.node import Node
    from nixlet.containers import model


_LIMITS = "limits stand in a manifest (resources): nixlet kube play"

#: What nerdctl and docker have, and this has not.
_FOREIGN = {
    "--restart": "nothing restarts containers by itself; a unit of systemd can: ExecStart=nixlet run --rm …, Restart=always",
    "--gpus": "devices come with a runtime that is installed (--runtime nvidia; nixlet doctor lists them), or with --privileged",
    "--device": "devices come with a runtime that is installed (nixlet doctor lists them), or with --privileged",
    "--mount": "write it as --volume HOST:PLACE[:ro]",
    "--memory": _LIMITS,
    "-m": _LIMITS,
    "--cpus": _LIMITS,
}


@grammar.verb(
    options.STATE_DIR,
    grammar.Flag("--rm", name="remove", text="Remove the container when it has ended; with -d, the node does."),
    grammar.Flag("--detach", "-d", text="Print the container's ID and leave it running."),
    grammar.Flag("--interactive", "-i", text="Hand our standard input on; with -d, keep its own open."),
    grammar.Flag("--tty", "-t", text="Give it a terminal."),
    grammar.Value("--name", default_text="a random one", text="The container's name."),
    grammar.Values("--env", "-e", metavar="NAME[=VALUE]", text="A variable; without VALUE, our own one."),
    grammar.Values("--env-file", metavar="FILE", text="Variables, one a line."),
    grammar.Values("--volume", "-v", metavar="HOST:PLACE[:ro]", text="A directory or file of the host."),
    grammar.Values(
        "--publish",
        "-p",
        metavar="[ADDRESS:]HOST:PORT[/udp]",
        text="Offer a port, or a range of them, at one of the host's.",
    ),
    grammar.Value(
        "--network",
        choices=("bridge", "host", "none"),
        default="bridge",
        text="Its network: that of pods, the host's, or only loopback.",
    ),
    grammar.Value("--hostname", "-h", metavar="NAME", default="", default_text="its own name", text="Its host's name."),
    grammar.Values("--add-host", metavar="NAME:ADDRESS", text="A line of its /etc/hosts."),
    grammar.Value("--runtime", metavar="NAME", default="", default_text="the node's", text="Its runtime, as in crun."),
    grammar.Value("--workdir", "-w", metavar="DIR", text="Its working directory."),
    grammar.Value("--user", "-u", metavar="USER[:GID]", text="Its user, by name or number, and group."),
    grammar.Value("--entrypoint", metavar="PROGRAM", text="Takes the place of the image's entrypoint."),
    grammar.Flag("--privileged", text="It may do what root on the host may."),
    grammar.Values("--cap-add", metavar="CAPABILITY", text="Give it a capability, or ALL."),
    grammar.Values("--cap-drop", metavar="CAPABILITY", text="Take a capability, or ALL, from it."),
    grammar.Values(
        "--security-opt",
        metavar="OPTION",
        default_text="system calls are filtered by the runtime's profile",
        text="seccomp=unconfined, seccomp=FILE, apparmor=PROFILE, no-new-privileges.",
    ),
    grammar.Flag("--read-only", text="Its root file system can't be written to."),
    grammar.Value("--pull", choices=("always", "missing", "never"), default="missing"),
    grammar.Argument("image"),
    grammar.Argument("command", several=True, required=False),
    interspersed=False,
    foreign=_FOREIGN,
)
@options.asynchronous
async def run(
    state_dir: str,
    image: str,
    command: tuple[str, ...],
    name: str | None,
    env: tuple[str, ...],
    env_file: tuple[str, ...],
    volume: tuple[str, ...],
    publish: tuple[str, ...],
    network: str,
    hostname: str,
    add_host: tuple[str, ...],
    runtime: str,
    workdir: str | None,
    user: str | None,
    entrypoint: str | None,
    pull: str,
    cap_add: tuple[str, ...],
    cap_drop: tuple[str, ...],
    security_opt: tuple[str, ...],
    *,
    privileged: bool,
    read_only: bool,
    interactive: bool,
    tty: bool,
    remove: bool,
    detach: bool,
) -> int:
    """Run a container from IMAGE; its exit status is ours.

    IMAGE is a reference (nix:0/nix/store/…, or a registry's) or the path of an archive. COMMAND takes the place of the
    image's own arguments.
    """
    import dataclasses

    from nixlet import errors
    from nixlet.cli import node, terminal, variables
    from nixlet.containers import arguments, model
    from nixlet.pods import criconfig

    if publish and network != "bridge":
        raise errors.UsageError(f"--publish needs the network of pods, not --network {network}")
    if hostname and network == "host":
        raise errors.UsageError("--hostname can't be with --network host: the host has its name")
    if tty and not detach:
        terminal.check(stdin=interactive)
    # Options end at IMAGE; a "--" behind it only says so once more.
    command = command[1:] if command[:1] == ("--",) else command
    words = tuple(model.escaped(word) for word in command)
    program: tuple[str, ...] = () if entrypoint is None else (model.escaped(entrypoint),)
    args = words
    if entrypoint == "":
        # The image's own is to be forgotten: COMMAND is all there is.
        if not words:
            raise errors.UsageError('--entrypoint "" needs a command')
        program, args = words[:1], words[1:]
    own_name = model.checked_name(name or f"run-{os.urandom(4).hex()}", "--name")
    pairs = variables.environment(env, env_file, os.environ)
    volumes, mounts = arguments.volumes(volume, os.getcwd())
    rights = arguments.user(user) if user else model.Security()
    security = dataclasses.replace(
        arguments.security(security_opt, os.getcwd(), add=cap_add, drop=cap_drop, privileged=privileged),
        run_as_user=rights.run_as_user,
        run_as_group=rights.run_as_group,
        run_as_name=rights.run_as_name,
        read_only_root=read_only,
    )
    policies = {"always": "Always", "missing": "IfNotPresent", "never": "Never"}
    container = model.Container(
        name=own_name,
        image=node.image_reference(image),
        pull_policy=policies[pull],
        command=program,
        args=args,
        env=tuple((key, model.escaped(value)) for key, value in pairs),
        working_dir=workdir or "",
        ports=arguments.ports(publish),
        mounts=mounts,
        security=security,
        stdin=interactive,
        # With nobody attached from the start, whoever comes and goes must not end it.
        stdin_once=interactive and not detach,
        tty=tty,
    )
    pod = model.Pod(
        own_name,
        containers=(container,),
        volumes=volumes,
        restart_policy="Never",
        hostname=arguments.hostname(hostname) if hostname else "",
        host_aliases=arguments.host_aliases(add_host),
        runtime=runtime,
        host_network=network == "host",
        no_network=network == "none",
        grace_seconds=criconfig.DEFAULT_GRACE,
        remove_when_ended=remove,
    )
    async with node.connected(state_dir) as connection:
        return await _run(connection, pod, detach=detach)


async def _run(connection: "Node", pod: "model.Pod", *, detach: bool) -> int:
    import asyncio
    import contextlib

    from nixlet import errors
    from nixlet.cli import terminal

    (container,) = pod.containers
    async with contextlib.AsyncExitStack() as stack:
        try:
            with terminal.ended_by_sigterm():
                played = await stack.enter_async_context(connection.played(pod, foreground=not detach))
        except errors.AlreadyExistsError as error:
            hint = f"remove it (nixlet rm {pod.name}) or choose another --name"
            raise errors.AlreadyExistsError(error.message, hint=hint) from error
        started = played.running.containers[0].id
        if detach:
            print(started)
            return 0
        signals = terminal.Signals(connection.tasks, started)
        try:
            with terminal.given_to(signals.resize, signals.deliver, tty=container.tty, stdin=container.stdin):
                code = await played.serve(terminal.written, terminal.Input() if container.stdin else None)
            return signals.exit_code(code)
        finally:
            if not played.ended:
                # Nobody reads what it prints, or somebody is in a hurry: it ends as a program would at the end of a pipe.
                end = connection.remove_pod if pod.remove_when_ended else connection.release_pod
                with contextlib.suppress(errors.NotFoundError):
                    await asyncio.shield(end(played.running.sandbox))
