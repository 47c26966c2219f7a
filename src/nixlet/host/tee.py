"""tee(2) through ctypes: what waits in a pipe is copied into another one, and stays. Python has no function for it."""

import ctypes
import functools
import os


def tee(source: int, target: int, size: int) -> int:
    """Copy what waits in a pipe into another one, without waiting and without taking it.

    Args:
        source: The pipe that is copied from.
        target: The other one.
        size: Bytes at most.

    Returns:
        How many bytes were copied; 0: the source is empty, and nobody writes to it any more.

    Raises:
        BlockingIOError: The source is empty, or the target is full.
        OSError: As tee(2).
    """
    copied: int = _libc().tee(source, target, size, os.SPLICE_F_NONBLOCK)
    if copied < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return copied


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.tee.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_size_t, ctypes.c_uint)
    libc.tee.restype = ctypes.c_ssize_t
    return libc
