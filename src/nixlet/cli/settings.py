"""The options that set a node's settings, for every verb that makes up a node or looks at how one would be."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from nixlet.node import config

if TYPE_CHECKING:
    from nixlet.node import configfile

F = TypeVar("F", bound=Callable[..., Any])

_DEFAULTS = config.Settings()


class _Option(NamedTuple):
    """An option beside its flag, which the setting's name gives.

    Attributes:
        metavar: What its value is called; "BOOL" may be left out.
        text: The help.
        short: The flag of one letter.
        default: What stands for an empty default in the help.
    """

    metavar: str
    text: str
    short: str = ""
    default: str = ""


_OPTIONS = {
    "data_dir": _Option("DIR", "What survives a reboot.", "-d"),
    "state_dir": _Option("DIR", "Sockets and running state."),
    "snapshotter": _Option("NAME", "containerd's snapshotter: nix, overlayfs, native, or another that it has."),
    "container_runtime_endpoint": _Option(
        "SOCKET", "Use the containerd at this socket, and start none.", default="our own containerd"
    ),
    "image_service_endpoint": _Option(
        "SOCKET", "Use the CRI image service at this socket instead of ours.", default="our own"
    ),
    "default_runtime": _Option("NAME", "containerd's runtime for pods that name none.", default="runc"),
    "pause_image": _Option("IMAGE", "The image that holds a pod's namespaces.", default="one made from --pause"),
    "private_registry": _Option("FILE", "How registries are reached (registries.yaml)."),
    "disable_default_registry_endpoint": _Option("BOOL", "Reach registries that have mirrors through those alone."),
    "system_default_registry": _Option("HOST", "The registry that the node's own images come from."),
    "airgap_extra_registry": _Option(
        "HOST", "Name preloaded images after this registry as well; may be given several times."
    ),
    "resolv_conf": _Option(
        "FILE", "Where pods look names up (resolv.conf).", default="the host's, unless that leads to this host alone"
    ),
    "selinux": _Option("BOOL", "Let containerd label containers for SELinux."),
    "nonroot_devices": _Option("BOOL", "Let a container's user own the devices that it gets."),
    "containerd": _Option("PROGRAM", "The containerd program."),
    "containerd_restart": _Option("WHEN", "on-failure: start containerd again when it dies; never: go down with it."),
    "runc": _Option("PROGRAM", "The OCI runtime program."),
    "pause": _Option("PROGRAM", "The static program that holds a pod's namespaces."),
    "cni_bin_dirs": _Option("DIR", "Where the CNI plugins are; may be given several times."),
    "pod_cidr": _Option("NETWORK", "The addresses that pods get."),
    "bridge": _Option("NAME", "The bridge that pods are attached to."),
    "archive_dirs": _Option(
        "DIR",
        "Where nix:0 references may name archives outside the store; may be given several times.",
        default="DATA_DIR/agent/images, /tmp",
    ),
    "strategy": _Option("NAME", "How containers get to see closures: auto, view or bind."),
    "unsigned_paths": _Option("RULE", "Whether images may name store paths that nobody vouches for: allow or deny."),
    "container_log_max_size": _Option("SIZE", "How large a container's log may get before it is put aside."),
    "container_log_max_files": _Option("COUNT", "How many files a container's log may have."),
    "health_address": _Option(
        "HOST:PORT",
        "Where health and metrics are served, for this host alone; none: nowhere.",
        default="STATE_DIR/health.sock",
    ),
    "log": _Option("FILE", "Write the log to a file.", "-l", default="standard error"),
    "debug": _Option("BOOL", "Log more."),
}


def node_settings(command: F) -> F:
    """Add ``--config`` and an option for every setting; the verb gets them as keyword arguments, for ``load``.

    None has a default of its own, nor an environment variable: ``configfile.load`` knows both, and what is said elsewhere.
    """
    for key in ("token-file", "token", "server"):
        command = click.option(f"--{key}", hidden=True)(command)
    for name, option in reversed(_OPTIONS.items()):
        command = _decorator(name, option)(command)
    return click.option(
        "--config",
        "-c",
        metavar="FILE",
        help="Read settings from this file and from FILE.d/*.yaml: keys are the flags below without dashes.  "
        "[env var: NIXLET_CONFIG_FILE; default: /etc/nixlet/config.yaml]",
    )(command)


def _decorator(name: str, option: _Option) -> Callable[[F], F]:
    value = getattr(_DEFAULTS, name)
    default = option.default or (", ".join(value) if isinstance(value, tuple) else value)
    ending = f"env var: {config.variable(name)}" + (f"; default: {default}" if default else "")
    declarations = [option.short] if option.short else []
    boolean = isinstance(value, bool)
    # As k3s has it: --selinux and --selinux=true say the same, and --selinux=false undoes what a file says.
    may_be_bare: dict[str, Any] = {"is_flag": False, "flag_value": "true"} if boolean else {}
    return click.option(
        config.flag(name),
        *declarations,
        name,
        metavar="" if boolean else option.metavar,
        multiple=isinstance(value, tuple),
        **may_be_bare,
        help=f"{option.text}  [{ending}]",
    )


def what_holds(name: str, settings: config.Settings) -> str:
    """What a setting means for a node with these settings, for a person: also where nobody said anything."""
    value = getattr(settings, name)
    if isinstance(value, bool):
        return "true" if value else "false"
    text = (", ".join(value) if isinstance(value, tuple | list) else str(value)) or _OPTIONS[name].default or "none"
    return text.replace("DATA_DIR", settings.data_dir).replace("STATE_DIR", settings.state_dir)


def load(given: dict[str, Any]) -> "configfile.Configuration":
    """The configuration that the command line, the environment and the files make together.

    Args:
        given: What ``node_settings`` gave the verb; other options are not looked at.

    Raises:
        NixletError: As ``configfile.load`` does.
    """
    from nixlet.node import configfile

    root = click.get_current_context().find_root()
    if given["debug"] not in {None, "false"} and isinstance(root.obj, dict):
        root.obj["debug"] = True
    # "nixlet --debug server" says it as well.
    if given["debug"] is None and root.get_parameter_source("debug") is click.core.ParameterSource.COMMANDLINE:
        given = given | {"debug": root.params["debug"]}
    return configfile.load(given, os.environ, file=given["config"])
