"""What a host must have before a node can start; each check is a function that says what is wrong in one sentence."""

import os
from collections.abc import Sequence

from nixlet import errors
from nixlet.containerd import cni
from nixlet.host import process

#: Bits of /proc/self/status's CapEff (capabilities(7)).
_CAP_SYS_ADMIN = 21
_CAP_SYS_RESOURCE = 24

_AS_ROOT = "run it as root: sudo nixlet server"
_AS_USER = f"{_AS_ROOT}; or have one of your own: nixlet server --rootless"

#: What containerd starts pods with.
_SHIM = "containerd-shim-runc-v2"


def effective_capabilities() -> int:
    """Our effective capabilities as a bit set."""
    with open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("CapEff:"):
                return int(line.split()[1], 16)
    return 0


def lacks_sys_resource() -> bool:
    """Whether lowering OOM scores is beyond us, so that containerd must not try (CAP_SYS_RESOURCE)."""
    return not effective_capabilities() >> _CAP_SYS_RESOURCE & 1


def check_root() -> None:
    """Check that we may mount.

    Raises:
        PermissionDeniedError: We may not.
    """
    if os.geteuid() != 0 or not effective_capabilities() >> _CAP_SYS_ADMIN & 1:
        raise errors.PermissionDeniedError(
            "a node needs root rights (CAP_SYS_ADMIN)", hint=_AS_ROOT if os.geteuid() == 0 else _AS_USER
        )


def find_program(name: str, *, package: str, setting: str) -> str:
    """The absolute path of a program that the node needs.

    Raises:
        UnavailableError: It is not installed; the hint names Debian's package and the setting that points elsewhere.
    """
    path = process.find_program(name)
    if path is None and os.sep in name and os.path.exists(name):
        raise errors.UnavailableError(
            f"{name} is not a program that can be run", hint=f"name the {package} program: {setting}"
        )
    if path is None:
        raise errors.UnavailableError(
            f"{name} is not installed", hint=f"install it (Debian: apt install {package}) or say where it is: {setting}"
        )
    return path


def find_cni_plugins(directories: Sequence[str]) -> str:
    """The first directory that has all the CNI plugins that the pod network needs.

    Raises:
        UnavailableError: None has.
    """
    for directory in directories:
        if all(os.access(os.path.join(directory, plugin), os.X_OK) for plugin in cni.PLUGINS):
            return directory
    raise errors.UnavailableError(
        f"the CNI plugins {', '.join(cni.PLUGINS)} are not in any of {', '.join(directories)}",
        hint="install them (Debian: apt install containernetworking-plugins) or say where they are: --cni-bin-dir",
    )


def check_nix(stdio_program: str, socket: str) -> None:
    """Check that some Nix can be asked for store paths.

    Raises:
        UnavailableError: There is neither a daemon nor the program that stands in for it.
    """
    if not os.path.exists(socket) and process.find_program(stdio_program) is None:
        raise errors.UnavailableError(
            f"Nix is not installed: there is no {stdio_program} on PATH, and no daemon serves {socket}",
            hint="install Nix (https://nixos.org/download; Debian: apt install nix-bin)",
        )


def find_shim(containerd: str) -> str:
    """The shim that a containerd starts pods with, beside it or on PATH: the two should be of one build.

    Raises:
        UnavailableError: There is none.
    """
    path = os.pathsep.join([os.path.dirname(containerd), os.environ.get("PATH", os.defpath)])
    found = process.find_program(_SHIM, path)
    if found is None:
        raise errors.UnavailableError(
            f"{_SHIM} is neither beside {containerd} nor on PATH, and containerd starts no pod without it",
            hint="install containerd whole (Debian: apt install containerd)",
        )
    return found
