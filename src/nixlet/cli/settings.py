"""The options that set a node's settings, for every verb that makes up a node or looks at how one would be."""

import os
from typing import TYPE_CHECKING, Any, NamedTuple

from nixlet.cli import grammar
from nixlet.node.settings import config, names

if TYPE_CHECKING:
    from nixlet.node.settings import configfile

_DEFAULTS = config.Settings()


class _Said(NamedTuple):
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


_SAID = {
    "data_dir": _Said("DIR", "What survives a reboot.", "-d"),
    "state_dir": _Said("DIR", "Sockets and running state."),
    "snapshotter": _Said("NAME", "containerd's snapshotter: nix, overlayfs, native, or another that it has."),
    "container_runtime_endpoint": _Said(
        "SOCKET", "Use the containerd at this socket, and start none.", default="our own containerd"
    ),
    "image_service_endpoint": _Said(
        "SOCKET", "Use the CRI image service at this socket instead of ours.", default="our own"
    ),
    "default_runtime": _Said("NAME", "containerd's runtime for pods that name none.", default="runc"),
    "pause_image": _Said("IMAGE", "The image that holds a pod's namespaces.", default="one made from --pause"),
    "private_registry": _Said("FILE", "How registries are reached (registries.yaml)."),
    "disable_default_registry_endpoint": _Said("BOOL", "Reach registries that have mirrors through those alone."),
    "system_default_registry": _Said("HOST", "The registry that the node's own images come from."),
    "airgap_extra_registry": _Said(
        "HOST", "Name preloaded images after this registry as well; may be given several times."
    ),
    "resolv_conf": _Said(
        "FILE", "Where pods look names up (resolv.conf).", default="the host's, unless that leads to this host alone"
    ),
    "selinux": _Said("BOOL", "Let containerd label containers for SELinux."),
    "nonroot_devices": _Said("BOOL", "Let a container's user own the devices that it gets."),
    "containerd": _Said("PROGRAM", "The containerd program."),
    "containerd_restart": _Said("WHEN", "on-failure: start containerd again when it dies; never: go down with it."),
    "runc": _Said("PROGRAM", "The OCI runtime program."),
    "pause": _Said("PROGRAM", "The static program that holds a pod's namespaces."),
    "cni_bin_dirs": _Said("DIR", "Where the CNI plugins are; may be given several times."),
    "pod_cidr": _Said("NETWORK", "The addresses that pods get."),
    "bridge": _Said("NAME", "The bridge that pods are attached to."),
    "archive_dirs": _Said(
        "DIR",
        "Where nix:0 references may name archives outside the store; may be given several times.",
        default="DATA_DIR/agent/images, /tmp",
    ),
    "strategy": _Said("NAME", "How containers get to see closures: auto, view or bind."),
    "unsigned_paths": _Said("RULE", "Whether images may name store paths that nobody vouches for: allow or deny."),
    "container_log_max_size": _Said("SIZE", "How large a container's log may get before it is put aside."),
    "container_log_max_files": _Said("COUNT", "How many files a container's log may have."),
    "health_address": _Said(
        "HOST:PORT",
        "Where health and metrics are served, for this host alone; none: nowhere.",
        default="STATE_DIR/health.sock",
    ),
    "log": _Said("FILE", "Write the log to a file.", "-l", default="standard error"),
    "debug": _Said("BOOL", "Log more."),
}


def _option(name: str, said: _Said) -> grammar.Option:
    value = getattr(_DEFAULTS, name)
    default = said.default or (", ".join(value) if isinstance(value, tuple) else value)
    ending = f"env var: {names.variable(name)}" + (f"; default: {default}" if default else "")
    # As k3s has it: --selinux and --selinux=true say the same, and --selinux=false undoes what a file says.
    truth = isinstance(value, bool)
    kind = grammar.Truth if truth else grammar.Values if isinstance(value, tuple) else grammar.Value
    return kind(
        names.flag(name),
        *([said.short] if said.short else []),
        name=name,
        metavar="" if truth else said.metavar,
        text=f"{said.text}  [{ending}]",
    )


#: ``--config`` and an option for every setting; the verb gets them as keyword arguments, for ``load``. None has a default of its own,
#: nor an environment variable: ``configfile.load`` knows both, and what is said elsewhere.
OPTIONS = (
    grammar.Value(
        "--config",
        "-c",
        metavar="FILE",
        text="Read settings from this file and from FILE.d/*.yaml: keys are the flags below without dashes.  "
        f"[env var: {names.FILE_VARIABLE}; default: {names.DEFAULT_FILE}]",
    ),
    *(_option(name, said) for name, said in _SAID.items()),
    *(grammar.Value(f"--{key}", hidden=True) for key in ("server", "token", "token-file")),
)


def what_holds(name: str, settings: config.Settings) -> str:
    """What a setting means for a node with these settings, for a person: also where nobody said anything."""
    value = getattr(settings, name)
    if isinstance(value, bool):
        return "true" if value else "false"
    text = (", ".join(value) if isinstance(value, tuple | list) else str(value)) or _SAID[name].default or "none"
    return text.replace("DATA_DIR", settings.data_dir).replace("STATE_DIR", settings.state_dir)


def load(given: dict[str, Any]) -> "configfile.Configuration":
    """The configuration that the command line, the environment and the files make together.

    Args:
        given: What ``OPTIONS`` gave the verb; other options are not looked at.

    Raises:
        NixletError: As ``configfile.load`` does.
    """
    from nixlet.node.settings import configfile

    return configfile.load(given, os.environ, file=given["config"])
