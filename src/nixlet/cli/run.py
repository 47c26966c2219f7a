"""``nixlet run``: a container by itself, as a pod of one."""

import os
from typing import TYPE_CHECKING

import click

from nixlet.cli import options

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


@click.command(
    cls=options.Verb,
    foreign=_FOREIGN,
    # -h is the host's name, as elsewhere.
    context_settings={"allow_interspersed_args": False, "help_option_names": ["--help"]},
)
@options.state_dir
@click.option("--rm", "remove", is_flag=True, help="Remove the container when it has ended; with -d, the node does.")
@click.option("--detach", "-d", is_flag=True, help="Print the container's ID and leave it running.")
@click.option("--interactive", "-i", is_flag=True, help="Hand our standard input on; with -d, keep its own open.")
@click.option("--tty", "-t", is_flag=True, help="Give it a terminal.")
@click.option("--name", help="The container's name.  [default: a random one]")
@click.option("--env", "-e", multiple=True, metavar="NAME[=VALUE]", help="A variable; without VALUE, our own one.")
@click.option("--env-file", multiple=True, metavar="FILE", help="Variables, one a line.")
@click.option("--volume", "-v", multiple=True, metavar="HOST:PLACE[:ro]", help="A directory or file of the host.")
@click.option(
    "--publish",
    "-p",
    multiple=True,
    metavar="[ADDRESS:]HOST:PORT[/udp]",
    help="Offer a port, or a range of them, at one of the host's.",
)
@click.option(
    "--network",
    type=click.Choice(["bridge", "host", "none"]),
    default="bridge",
    show_default=True,
    help="Its network: that of pods, the host's, or only loopback.",
)
@click.option("--hostname", "-h", metavar="NAME", default="", help="Its host's name.  [default: its own name]")
@click.option("--add-host", multiple=True, metavar="NAME:ADDRESS", help="A line of its /etc/hosts.")
@click.option("--runtime", metavar="NAME", default="", help="Its runtime, as in crun.  [default: the node's]")
@click.option("--workdir", "-w", metavar="DIR", help="Its working directory.")
@click.option("--user", "-u", metavar="USER[:GID]", help="Its user, by name or number, and group.")
@click.option("--entrypoint", metavar="PROGRAM", help="Takes the place of the image's entrypoint.")
@click.option("--privileged", is_flag=True, help="It may do what root on the host may.")
@click.option("--cap-add", multiple=True, metavar="CAPABILITY", help="Give it a capability, or ALL.")
@click.option("--cap-drop", multiple=True, metavar="CAPABILITY", help="Take a capability, or ALL, from it.")
@click.option(
    "--security-opt",
    multiple=True,
    metavar="OPTION",
    help="seccomp=unconfined, seccomp=FILE, apparmor=PROFILE, no-new-privileges.  "
    "[default: system calls are filtered by the runtime's profile]",
)
@click.option("--read-only", is_flag=True, help="Its root file system can't be written to.")
@click.option("--pull", type=click.Choice(["always", "missing", "never"]), default="missing", show_default=True)
@click.argument("image")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
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
    from nixlet.cli import node, terminal
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
    variables = arguments.environment(env, env_file, os.environ)
    volumes, mounts = arguments.volumes(volume)
    rights = arguments.user(user) if user else model.Security()
    security = dataclasses.replace(
        arguments.security(security_opt, add=cap_add, drop=cap_drop, privileged=privileged),
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
        env=tuple((key, model.escaped(value)) for key, value in variables),
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
            click.echo(started)
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
