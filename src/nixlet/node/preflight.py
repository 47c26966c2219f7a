"""What a host must have before a node can start; each check is a function that says what is wrong in one sentence."""

import os
import struct
from collections.abc import Sequence

from nixlet import errors
from nixlet.containerd import cni
from nixlet.host import process

#: Bits of /proc/self/status's CapEff (capabilities(7)).
_CAP_SYS_ADMIN = 21
_CAP_SYS_RESOURCE = 24

#: What containerd starts pods with.
_SHIM = "containerd-shim-runc-v2"

#: By the class of an ELF file (elf(5)): where the offset of its program headers stands, the form of that, and where their size
#: and number stand.
_ELF_TABLE = {1: (28, "I", 42), 2: (32, "Q", 54)}
_PT_INTERP = 3
_STATIC_HINT = "name a static program (Debian: apt install catatonit): --pause"


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
            "a node needs root rights (CAP_SYS_ADMIN)", hint="run it as root: sudo nixlet server"
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


def check_static(program: str) -> None:
    """Check that a program needs no dynamic loader (elf(5), PT_INTERP), which an image that holds it alone has not.

    Raises:
        UnsupportedError: It needs one, or it is no program for Linux.
    """
    with open(program, "rb") as file:
        head = file.read(64)
        if head[:4] != b"\x7fELF" or len(head) < 64 or head[4] not in _ELF_TABLE:
            raise errors.UnsupportedError(
                f"{program} is no ELF program, and a pod's first process is nothing else", hint=_STATIC_HINT
            )
        order = "<" if head[5] == 1 else ">"
        offset_at, offset_form, counts_at = _ELF_TABLE[head[4]]
        (offset,) = struct.unpack_from(order + offset_form, head, offset_at)
        size, count = struct.unpack_from(order + "HH", head, counts_at)
        file.seek(offset)
        table = file.read(size * count)
    kinds = [struct.unpack_from(order + "I", table, at)[0] for at in range(0, len(table) - 3, size or 1)]
    if _PT_INTERP in kinds:
        raise errors.UnsupportedError(
            f"{program} is not static: in the pause image, which holds it alone, it would not start", hint=_STATIC_HINT
        )
