"""What people and clients find a node by: its settings' names and its default directories. It imports nothing that takes time."""

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

DEFAULT_DATA_DIR = "/var/lib/nixlet"
DEFAULT_STATE_DIR = "/run/nixlet"
DEFAULT_PRIVATE_REGISTRY = "/etc/nixlet/registries.yaml"
DEFAULT_FILE = "/etc/nixlet/config.yaml"

#: Names another configuration file than the default one.
FILE_VARIABLE = "NIXLET_CONFIG_FILE"

#: Says to a process that it is in the namespaces of an ordinary user's node, whose root it seems to be.
INSIDE = "_NIXLET_ROOTLESS"


def defaults(environment: "Mapping[str, str]") -> dict[str, str]:
    """Where things are unless somebody says otherwise: ``data_dir``, ``state_dir``, ``private_registry``, and the ``file`` of settings.

    An ordinary user's are in their own directories (XDG Base Directory Specification).
    """
    if os.geteuid() == 0 and INSIDE not in environment:
        return {
            "data_dir": DEFAULT_DATA_DIR,
            "state_dir": DEFAULT_STATE_DIR,
            "private_registry": DEFAULT_PRIVATE_REGISTRY,
            "file": DEFAULT_FILE,
        }
    session = of_session(environment)
    home = session["HOME"]
    data = _absolute(environment.get("XDG_DATA_HOME", "")) or f"{home}/.local/share"
    configuration = _absolute(environment.get("XDG_CONFIG_HOME", "")) or f"{home}/.config"
    return {
        "data_dir": f"{data}/nixlet",
        "state_dir": f"{session['XDG_RUNTIME_DIR']}/nixlet",
        "private_registry": f"{configuration}/nixlet/registries.yaml",
        "file": f"{configuration}/nixlet/config.yaml",
    }


def of_session(environment: "Mapping[str, str]") -> dict[str, str]:
    """An ordinary user's ``HOME`` and ``XDG_RUNTIME_DIR``, also where nobody has set them."""
    return {
        "HOME": environment.get("HOME") or os.path.expanduser("~"),
        "XDG_RUNTIME_DIR": _absolute(environment.get("XDG_RUNTIME_DIR", "")) or f"/run/user/{os.geteuid()}",
    }


def _absolute(path: str) -> str:
    """A path of a variable; one that isn't absolute counts as none, says the specification."""
    return path if os.path.isabs(path) else ""


def key(name: str) -> str:
    """A setting's name as people write it, in config.yaml and, after two dashes, on the command line."""
    # What may be given several times is named in the singular there.
    return {"cni_bin_dirs": "cni-bin-dir", "archive_dirs": "archive-dir"}.get(name, name.replace("_", "-"))


def flag(name: str) -> str:
    """A setting's flag on the command line."""
    return f"--{key(name)}"


def variable(name: str) -> str:
    """A setting's environment variable."""
    # As k3s has it.
    if name == "server":
        return "NIXLET_URL"
    return f"NIXLET_{key(name).upper().replace('-', '_')}"
