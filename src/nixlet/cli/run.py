"""``nixlet run``: a container by itself, as a pod of one."""

import os

from nixlet.cli import grammar, options

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
def run(
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
    from nixlet.cli import calls, ends, link, session, variables

    pairs = variables.environment(env, env_file, os.environ)
    if tty and not detach:
        session.check_terminal(stdin=interactive)
    columns, rows = session.size() if tty and not detach else (0, 0)
    with (
        link.connected(state_dir) as node,
        link.connected(state_dir) as control,
        ends.Ends(stdin=interactive and not detach, stdout=not detach, stderr=not detach and not tty) as ours,
        session.Signals() as signals,
        calls.Call(node, control, ours) as call,
    ):
        wanted = {
            "ticket": call.ticket,
            "directory": options.working_directory(),
            "image": image,
            "name": name,
            # Options end at IMAGE; a "--" behind it only says so once more.
            "command": command[1:] if command[:1] == ("--",) else command,
            "entrypoint": entrypoint,
            "env": [f"{key}={value}" for key, value in pairs],
            "volumes": volume,
            "ports": publish,
            "network": network,
            "hostname": hostname,
            "add_hosts": add_host,
            "runtime": runtime,
            "workdir": workdir,
            "user": user,
            "privileged": privileged,
            "cap_add": cap_add,
            "cap_drop": cap_drop,
            "security_opts": security_opt,
            "read_only": read_only,
            "pull": pull,
            "interactive": interactive,
            "tty": tty,
            "remove": remove,
            "streams": None if detach else ours.streams,
            "columns": columns,
            "rows": rows,
        }
        node.send("Run", wanted, ours.descriptors, more=True)
        ours.handed_over()
        started = next(call.replies(signals))["started"]
        if detach:
            print(started["id"])
            return 0
        return call.front(signals, started["session"], tty=tty)
