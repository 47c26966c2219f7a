"""Mounts: mount(2) and umount2(2) through ctypes, and the mount table of /proc/self/mountinfo (proc_pid_mountinfo(5))."""

import contextlib
import ctypes
import ctypes.util
import errno
import functools
import os
import re
import shutil
from collections.abc import Iterator
from typing import NamedTuple

from nixlet import errors
from nixlet.host import userns

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18

_CLONE_NEWNS = 0x00020000

MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

#: The kernel copies at most one page of options and cuts what is longer without a word, which can mount the wrong layers.
MAX_OPTIONS = 4095

_REASONS = {
    errno.EPERM: "this needs root rights (CAP_SYS_ADMIN)",
    errno.EACCES: "access is denied",
    errno.ENOENT: "a path does not exist",
    errno.ENODEV: "the kernel has no such file system",
    errno.EBUSY: "it is in use",
    errno.ENOSPC: "this mount namespace has too many mounts (sysctl fs.mount-max)",
    errno.ELOOP: "the layers overlap, or a link loops",
    errno.EINVAL: "the kernel refuses the options, or the layers are stacked too deep",
    errno.ENOTDIR: "a path is not a directory",
}


#: Where a directory's entry has its kind: behind d_ino, d_off and d_reclen (readdir(3), on machines of 64 bits).
_D_TYPE = 18


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(ctypes.util.find_library("c") or "libc.so.6", use_errno=True)
    text = ctypes.c_char_p
    libc.mount.argtypes = (text, text, text, ctypes.c_ulong, text)
    libc.mount.restype = ctypes.c_int
    libc.umount2.argtypes = (text, ctypes.c_int)
    libc.umount2.restype = ctypes.c_int
    libc.unshare.argtypes = (ctypes.c_int,)
    libc.unshare.restype = ctypes.c_int
    return libc


def mount(source: str, target: str, fstype: str, flags: int = 0, options: str = "") -> None:
    """Mount a file system (mount(2)).

    Raises:
        FailedPreconditionError: The kernel refused; the sentence names the target and the reason.
    """
    if len(os.fsencode(options)) > MAX_OPTIONS:
        raise errors.FailedPreconditionError(
            f"can't mount {target}: the options are {len(options)} bytes long and the kernel takes {MAX_OPTIONS}"
        )
    result = _libc().mount(
        os.fsencode(source), os.fsencode(target), os.fsencode(fstype), flags, os.fsencode(options) if options else None
    )
    if result != 0:
        raise _refused(f"can't mount {fstype or 'a bind'} on {target}")


def bind_read_only(source: str, target: str) -> None:
    """Show a directory at another place, where nothing can be written or deleted through it.

    Raises:
        FailedPreconditionError: The kernel refused; nothing is mounted then.
    """
    mount(source, target, "", MS_BIND)
    try:
        mount("none", target, "", MS_REMOUNT | MS_BIND | MS_RDONLY | os.statvfs(target).f_flag & _KEPT_FLAGS)
    except BaseException:
        unmount(target)
        raise


def unmount(target: str, flags: int = UMOUNT_NOFOLLOW) -> None:
    """Unmount (umount2(2)); what is not mounted is no error.

    Raises:
        FailedPreconditionError: The kernel refused.
    """
    if _libc().umount2(os.fsencode(target), flags) != 0 and ctypes.get_errno() not in {errno.EINVAL, errno.ENOENT}:
        raise _refused(f"can't unmount {target}")


def unshare() -> None:
    """Go on in a mount namespace of our own, whose mounts nobody else sees (unshare(2)); for programs of one thread.

    Raises:
        FailedPreconditionError: The kernel refused.
    """
    if _libc().unshare(_CLONE_NEWNS) != 0:
        raise _refused("can't make a mount namespace")
    mount("none", "/", "", MS_REC | MS_PRIVATE)


#: A mount's own flags, which have the same numbers in mount(2) and statvfs(3): ro, nosuid, nodev, noexec, noatime, nodiratime.
_KEPT_FLAGS = 1 | 2 | 4 | 8 | 1024 | 2048


@contextlib.contextmanager
def powerless(directory: str) -> Iterator[None]:
    """Have neither set-user-ID programs nor devices count in a directory (MS_NOSUID, MS_NODEV), for the time of the context.

    What is bound from the directory meanwhile keeps that for its life. What an earlier owner left mounted there is taken over;
    somebody else's file system stays mounted below ours.

    Raises:
        FailedPreconditionError: The kernel refused.
    """
    directory = os.path.realpath(directory)
    wanted = MS_NOSUID | MS_NODEV
    top = [entry for entry in table() if entry.path == directory][-1:]
    taken_over = bool(top) and _is_bound_to_itself(top[0])
    flags = os.statvfs(directory).f_flag & _KEPT_FLAGS
    if flags & wanted == wanted and not taken_over:
        yield
        return
    with contextlib.ExitStack() as stack:
        if not taken_over:
            mount(directory, directory, "", MS_BIND)
        stack.callback(unmount, directory, MNT_DETACH | UMOUNT_NOFOLLOW)
        mount("none", directory, "", MS_REMOUNT | MS_BIND | flags | wanted)
        yield


def overlay_attributes() -> tuple[str, ...]:
    """The option by which overlays note opaque directories here: root of a user namespace has no trusted attributes (overlayfs.rst, "User xattr")."""
    return ("userxattr",) if userns.is_inside() else ()


def has_file_types(directory: str) -> bool:
    """Whether a directory's file system says with a name what it stands for (d_type), which overlayfs needs."""
    libc = _libc()
    libc.opendir.argtypes, libc.opendir.restype = (ctypes.c_char_p,), ctypes.c_void_p
    libc.readdir.argtypes, libc.readdir.restype = (ctypes.c_void_p,), ctypes.c_void_p
    libc.closedir.argtypes, libc.closedir.restype = (ctypes.c_void_p,), ctypes.c_int
    opened = libc.opendir(os.fsencode(directory))
    if not opened:
        raise _refused(f"can't read {directory}")
    try:
        # A directory has at least itself and its parent in it.
        entry = libc.readdir(opened)
        return bool(entry) and ctypes.string_at(entry, _D_TYPE + 1)[_D_TYPE] != 0
    finally:
        libc.closedir(opened)


def shares_namespace(pid: int) -> bool:
    """Whether a process sees the mounts that we see (mount_namespaces(7)).

    Raises:
        OSError: There is no such process, or it isn't ours to look at.
    """
    ours, theirs = os.stat("/proc/self/ns/mnt"), os.stat(f"/proc/{pid}/ns/mnt")
    return (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino)


def _refused(what: str) -> errors.FailedPreconditionError:
    number = ctypes.get_errno()
    reason = _REASONS.get(number, os.strerror(number))
    error = errors.FailedPreconditionError(f"{what}: {reason} ({errno.errorcode.get(number, number)})")
    error.__cause__ = OSError(number, os.strerror(number))
    return error


def are_shared(mountinfo: str = "/proc/self/mountinfo") -> bool:
    """Whether what is mounted on this machine is seen by other mount namespaces, too (mount_namespaces(7), "shared subtrees")."""
    with open(mountinfo, encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            left = line.partition(" - ")[0].split(" ")
            if left[4] == "/":
                return any(each.startswith("shared:") for each in left[6:])
    return False


class MountPoint(NamedTuple):
    """One line of the mount table."""

    mount_id: int
    parent_id: int
    device: str
    root: str
    path: str
    fstype: str
    source: str
    options: str


_OCTAL = re.compile(r"\\([0-7]{3})")


def _unescape(text: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text) if "\\" in text else text


def table(mountinfo: str = "/proc/self/mountinfo") -> Iterator[MountPoint]:
    """The mounts of a mount namespace, in the kernel's order (a mount after what it lies on)."""
    with open(mountinfo, encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            left, _, right = line.partition(" - ")
            mount_id, parent_id, device, root, path = left.split(" ")[:5]
            fstype, source, options = [*right.rstrip("\n").split(" "), "", ""][:3]
            yield MountPoint(
                int(mount_id),
                int(parent_id),
                device,
                _unescape(root),
                _unescape(path),
                fstype,
                _unescape(source),
                options,
            )


def _is_bound_to_itself(entry: MountPoint) -> bool:
    """Whether a mount shows what lies below it anyway."""
    below = next((each for each in table() if each.mount_id == entry.parent_id), None)
    if below is None or below.device != entry.device:
        return False
    inside = os.path.relpath(entry.path, below.path)
    return os.path.normpath(entry.root) == os.path.normpath(os.path.join(below.root, inside))


def unbind(directory: str) -> None:
    """Unmount what is mounted on a directory from itself; another file system there is somebody's.

    Raises:
        FailedPreconditionError: It is in use.
    """
    real = os.path.realpath(directory)
    for entry in reversed([entry for entry in table() if entry.path == real]):
        if not _is_bound_to_itself(entry):
            return
        unmount(real)


def below(directory: str) -> list[MountPoint]:
    """The mounts at or below a directory, deepest last; links on the way to it are followed, as the kernel did."""
    directory = os.path.realpath(directory)
    prefix = directory.rstrip("/") + "/"
    return [entry for entry in table() if entry.path == directory or entry.path.startswith(prefix)]


def remove_tree(directory: str, *, ignore_errors: bool = False) -> None:
    """Delete a directory with all that is in it, unless something is mounted there: that is somebody else's.

    Args:
        directory: The directory.
        ignore_errors: Delete what can be deleted, and be content with that.

    Raises:
        FailedPreconditionError: Something is mounted there; nothing was deleted.
        OSError: It can't be deleted, or there is none; not with ``ignore_errors``.
    """
    mounted = below(directory)
    if mounted:
        raise errors.FailedPreconditionError(
            f"{directory} is not removed: {mounted[-1].path} is still mounted",
            hint=f"look at it, and unmount it: umount {mounted[-1].path}",
        )
    shutil.rmtree(directory, ignore_errors=ignore_errors)


def covering(path: str) -> MountPoint:
    """The mount that a path lies on."""
    path = os.path.realpath(path)
    return [entry for entry in table() if path == entry.path or path.startswith(f"{entry.path.rstrip('/')}/")][-1]


def is_mount_point(path: str) -> bool:
    """Whether something is mounted on a directory: its device differs from its parent's (not so for bind mounts)."""
    try:
        return os.stat(path).st_dev != os.stat(os.path.dirname(path)).st_dev
    except FileNotFoundError:
        return False
