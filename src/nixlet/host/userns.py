"""User namespaces (user_namespaces(7))."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from nixlet import errors
from nixlet.host import process

#: What the initial user namespace maps: every identity, to itself.
_INITIAL = ["0", "0", "4294967295"]


class Extent(NamedTuple):
    """So many users or groups with successive numbers, and the numbers that they have outside of a namespace."""

    inside: int
    outside: int
    size: int


def is_inside(uid_map: str = "/proc/self/uid_map") -> bool:
    """Whether we live in a user namespace other than the machine's first."""
    try:
        with open(uid_map, encoding="ascii") as file:
            return file.readline().split() != _INITIAL
    except FileNotFoundError:
        return False  # a kernel without user namespaces


@contextlib.asynccontextmanager
async def made(uids: Sequence[Extent], gids: Sequence[Extent]) -> AsyncIterator[int]:
    """A new user namespace in which nobody lives; a descriptor of it, which is closed at the end of the context.

    Raises:
        FailedPreconditionError: The kernel makes none, or none that maps these.
        UnavailableError: The program for it is not there, or can't be started.
    """
    # It lives there until it is told to end; what it has read it gives back as soon as it is there.
    argv = ["unshare", "--user", "--", "cat"]
    async with process.start(
        argv, stdin=process.PIPE, stdout=process.PIPE, stderr=process.PIPE, ends_with_input=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdin.write(b"\n")
        if not await child.stdout.read(1):
            why = (await child.stderr.read()).decode(errors="replace").strip()
            raise errors.FailedPreconditionError(
                f"a user namespace can't be made: {why}",
                hint="see sysctl user.max_user_namespaces, and whether user namespaces are allowed here",
            )
        try:
            fd = await asyncio.to_thread(_map, child.pid, uids, gids)
        except OSError as error:
            raise errors.FailedPreconditionError(
                f"the kernel refuses a user namespace with these owners: {error.strerror}"
            ) from error
    try:
        yield fd
    finally:
        os.close(fd)


def _map(pid: int, uids: Sequence[Extent], gids: Sequence[Extent]) -> int:
    """Map the owners of a process's user namespace; a descriptor of that."""
    for which, extents in (("uid", uids), ("gid", gids)):
        # All at once: the kernel takes one write.
        with open(f"/proc/{pid}/{which}_map", "w", encoding="ascii") as file:
            file.write("".join(f"{each.inside} {each.outside} {each.size}\n" for each in extents))
    return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
