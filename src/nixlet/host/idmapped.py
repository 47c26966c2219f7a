"""Id-mapped mounts: a directory as it looks where its owners have other numbers (mount_setattr(2), MOUNT_ATTR_IDMAP; Linux 5.12)."""

import ctypes
import errno
import os
import struct

from nixlet import errors

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_OPEN_TREE_CLONE = 1
_MOUNT_ATTR_IDMAP = 0x00100000

#: The numbers of system calls, which are the same on all machines for new ones. C libraries have had functions for them since 2022.
_OPEN_TREE = 428
_MOUNT_SETATTR = 442


def clone(directory: str, namespace: int | None) -> int:
    """A mount of a directory, without those in it, at no place, whose owners are mapped as a user namespace does.

    Args:
        directory: The directory.
        namespace: A descriptor of the user namespace; None for owners as they are.

    Returns:
        A descriptor of the mount, which is there as long as somebody has it open or uses it; for the caller to close.

    Raises:
        FailedPreconditionError: The kernel refused, or the directory's file system can't do that.
    """
    fd: int = _call(directory, _OPEN_TREE, _AT_FDCWD, os.fsencode(directory), _OPEN_TREE_CLONE | os.O_CLOEXEC)
    if namespace is None:
        return fd
    try:
        # struct mount_attr: what is set, what is cleared, the propagation, the user namespace
        attributes = struct.pack("=4Q", _MOUNT_ATTR_IDMAP, 0, 0, namespace)
        _call(directory, _MOUNT_SETATTR, fd, b"", _AT_EMPTY_PATH, attributes, ctypes.c_size_t(len(attributes)))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _call(directory: str, number: int, *arguments: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    result: int = libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        code = ctypes.get_errno()
        if code in {errno.EINVAL, errno.ENOSYS}:
            why = "its file system, or this kernel, has no id-mapped mounts"
        else:
            why = os.strerror(code)
        error = errors.FailedPreconditionError(
            f"{directory} can't be shown in a user namespace: {why} ({errno.errorcode.get(code, code)})",
            hint="run the pod without a user namespace of its own (hostUsers: true)",
        )
        raise error from OSError(code, os.strerror(code))
    return result
