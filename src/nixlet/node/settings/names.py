"""What people and clients find a node by: its settings' names and its default directories. It imports nothing."""

DEFAULT_DATA_DIR = "/var/lib/nixlet"
DEFAULT_STATE_DIR = "/run/nixlet"
DEFAULT_FILE = "/etc/nixlet/config.yaml"

#: Names another configuration file than the default one.
FILE_VARIABLE = "NIXLET_CONFIG_FILE"


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
