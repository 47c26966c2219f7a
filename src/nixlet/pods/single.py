"""A container by itself, as a pod of one: what people write behind ``nixlet run``, read and checked."""

import dataclasses
import os
from typing import Literal

import msgspec

from nixlet import errors
from nixlet.containers import arguments, model
from nixlet.pods import criconfig

_POLICIES = {"always": "Always", "missing": "IfNotPresent", "never": "Never"}


class Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is asked for; texts are as people write them, unless it says something else.

    Attributes:
        directory: Where relative paths begin: of the host's volumes, of profiles, of an archive; None: there are none.
        image: The image's reference, or an archive's path.
        name: The container's name; None: a random one.
        command: Takes the place of the image's own arguments.
        entrypoint: Takes the place of the image's entrypoint; empty: it has none; None: its own.
        env: Variables, ``NAME=VALUE``.
        volumes: Directories and files of the host.
        ports: Ports of the host.
        network: That of pods, the host's, or only loopback.
        hostname: Its host's name; empty: its own name.
        add_hosts: Lines of its /etc/hosts.
        runtime: As the node's containerd calls it; empty: its default one.
        workdir: Its working directory; empty: the image's.
        user: Whose rights it has; empty: as the image says.
        privileged: It may do what root on the host may.
        cap_add: Capabilities that it gets.
        cap_drop: Capabilities that it loses.
        security_opts: Profiles, and the like.
        read_only: Its root file system can't be written to.
        pull: When its image is pulled.
        interactive: It has a standard input.
        tty: It has a terminal.
        remove: It goes when it has ended.
    """

    image: str
    directory: str | None = None
    name: str | None = None
    command: tuple[str, ...] = ()
    entrypoint: str | None = None
    env: tuple[str, ...] = ()
    volumes: tuple[str, ...] = ()
    ports: tuple[str, ...] = ()
    network: Literal["bridge", "host", "none"] = "bridge"
    hostname: str = ""
    add_hosts: tuple[str, ...] = ()
    runtime: str = ""
    workdir: str = ""
    user: str = ""
    privileged: bool = False
    cap_add: tuple[str, ...] = ()
    cap_drop: tuple[str, ...] = ()
    security_opts: tuple[str, ...] = ()
    read_only: bool = False
    pull: Literal["always", "missing", "never"] = "missing"
    interactive: bool = False
    tty: bool = False
    remove: bool = False


def pod(wanted: Wanted, *, attached: bool) -> model.Pod:
    """The pod that is asked for.

    Args:
        wanted: What is asked for.
        attached: Somebody has it in front of them from the start.

    Raises:
        UsageError: Something of it is malformed, or can't be had together.
    """
    if wanted.directory is not None and not wanted.directory.startswith("/"):
        raise errors.UsageError(f"the directory {wanted.directory[:80]!r} is no absolute path")
    if wanted.ports and wanted.network != "bridge":
        raise errors.UsageError(f"--publish needs the network of pods, not --network {wanted.network}")
    if wanted.hostname and wanted.network == "host":
        raise errors.UsageError("--hostname can't be with --network host: the host has its name")
    name = model.checked_name(wanted.name or f"run-{os.urandom(4).hex()}", "--name")
    command, args = _words(wanted)
    volumes, mounts = arguments.volumes(wanted.volumes, wanted.directory)
    container = model.Container(
        name=name,
        image=arguments.image(wanted.image, wanted.directory),
        pull_policy=_POLICIES[wanted.pull],
        command=command,
        args=args,
        env=tuple((key, model.escaped(value)) for key, value in arguments.variables(wanted.env)),
        working_dir=wanted.workdir,
        ports=arguments.ports(wanted.ports),
        mounts=mounts,
        security=_security(wanted),
        stdin=wanted.interactive,
        # With nobody attached from the start, whoever comes and goes must not end it.
        stdin_once=wanted.interactive and attached,
        tty=wanted.tty,
    )
    return model.Pod(
        name,
        containers=(container,),
        volumes=volumes,
        restart_policy="Never",
        hostname=arguments.hostname(wanted.hostname) if wanted.hostname else "",
        host_aliases=arguments.host_aliases(wanted.add_hosts),
        runtime=wanted.runtime,
        host_network=wanted.network == "host",
        no_network=wanted.network == "none",
        grace_seconds=criconfig.DEFAULT_GRACE,
        remove_when_ended=wanted.remove,
    )


def _words(wanted: Wanted) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The program and its arguments, as far as they take the place of the image's."""
    words = tuple(map(model.escaped, wanted.command))
    if wanted.entrypoint is None:
        return (), words
    if wanted.entrypoint:
        return (model.escaped(wanted.entrypoint),), words
    # The image's own is to be forgotten: the command is all there is.
    if not words:
        raise errors.UsageError('--entrypoint "" needs a command')
    return words[:1], words[1:]


def _security(wanted: Wanted) -> model.Security:
    rights = arguments.user(wanted.user) if wanted.user else model.Security()
    security = arguments.security(
        wanted.security_opts,
        wanted.directory,
        add=wanted.cap_add,
        drop=wanted.cap_drop,
        privileged=wanted.privileged,
    )
    return dataclasses.replace(
        security,
        run_as_user=rights.run_as_user,
        run_as_group=rights.run_as_group,
        run_as_name=rights.run_as_name,
        read_only_root=wanted.read_only,
    )
