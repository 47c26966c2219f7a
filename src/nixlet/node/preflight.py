"""What a host must have before a node can start; each check is a function that says what is wrong in one sentence."""

import contextlib
import os
import stat
import struct
from collections.abc import Iterator, Sequence

from nixlet import errors
from nixlet.containerd import cni
from nixlet.host import files, mounts, process
from nixlet.rpc import server as rpc_server

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


def file_system(path: str) -> str:
    """The type of the file system that a directory is on, as the mount table has it; of nested mounts, the innermost."""
    real = os.path.realpath(path)
    found = ""
    longest = -1
    for entry in mounts.table():
        inside = real == entry.path or real.startswith(entry.path.rstrip("/") + "/")
        # Later entries lie on earlier ones of the same place.
        if inside and len(entry.path) >= longest:
            found, longest = entry.fstype, len(entry.path)
    return found


def existing(path: str) -> str:
    """A directory, or the nearest above it that is there."""
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path


@contextlib.contextmanager
def present(directory: str) -> Iterator[None]:
    """Have a directory for the time of the context: what was not there before is removed again, if it is empty then.

    Raises:
        FailedPreconditionError: It can't be made.
    """
    made = []
    step = directory
    while not os.path.isdir(step) and step != os.path.dirname(step):
        made.append(step)
        step = os.path.dirname(step)
    try:
        files.make_directory(directory, mode=0o711)
        yield
    finally:
        for each in made:
            with contextlib.suppress(OSError):
                os.rmdir(each)


def lock_holder(path: str) -> int | None:
    """The process that holds a lock of ``files.exclusive_lock``, found without touching it (proc_locks(5)); None: nobody.

    Where the process is not to be seen from here, the kernel has another number for it, such as 0.
    """
    try:
        found = os.stat(path)
        with open(path, encoding="ascii", errors="replace") as file:
            named = file.read(32).strip()
    except FileNotFoundError:
        return None
    device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    with open("/proc/locks", encoding="ascii") as lines:
        for line in lines:
            _, kind, _, _, pid, file_id, *_ = line.split()
            # btrfs has other device numbers there than stat(2) tells.
            same = file_id == device or (file_id.endswith(f":{found.st_ino}") and pid == named)
            # The kind of those that wait for a lock is "->".
            if kind == "FLOCK" and same:
                return int(pid)
    return None


def check_free_socket(path: str) -> None:
    """Check that nobody serves a socket that is to be ours.

    Raises:
        FailedPreconditionError: Somebody does, or something else has its name.
    """
    if rpc_server.is_served(path):
        raise errors.FailedPreconditionError(
            f"another process ({rpc_server.peer_of(path)}) serves the socket {path}",
            hint="stop that process, or choose another --state-dir",
        )
    if os.path.exists(path) and not stat.S_ISSOCK(os.stat(path).st_mode):
        raise errors.FailedPreconditionError(
            f"{path} exists and is no socket", hint="remove it, or choose another --state-dir"
        )
