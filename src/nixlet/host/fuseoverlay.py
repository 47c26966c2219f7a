"""Overlays that a program shows in place of the kernel: fuse-overlayfs(1).

containerd has them made by mount.fuse3(8), and their program then goes on by itself. Here one is made to be looked at: its program
stays our child, so that neither it nor its mount can outlive us.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator

from nixlet import errors
from nixlet.host import mounts, process, words

PROGRAM = "fuse-overlayfs"

#: Seconds for it to mount.
_TIMEOUT = 20.0

#: Seconds between two looks whether it has.
_INTERVAL = 0.01

#: Gives a program a mount namespace of its own (unshare(1)).
_APART = ("unshare", "--mount", "--propagation", "private")


@contextlib.asynccontextmanager
async def shown(target: str, options: str, *, apart: bool = False) -> AsyncIterator[str]:
    """An overlay for the time of the context; gives the path by which it is to be seen.

    Args:
        target: The directory to mount it on.
        options: As mount(8) takes them.
        apart: Nobody sees it at its place: it is in a mount namespace of its own, with which it ends.

    Raises:
        UnavailableError: The program is not installed.
        CommandFailedError: It shows nothing; the sentence says why.
    """
    # The mount table has no links in its paths.
    target = os.path.realpath(target)
    argv = [*(_APART if apart else ()), PROGRAM, "-f", "-o", options, target]
    async with process.start(argv, stdout=process.PIPE, stderr=process.STDOUT) as child:
        await _mounted(child, target)
        try:
            yield f"/proc/{child.pid}/root{target}"
        finally:
            if not apart:
                # While it answers: what has ended leaves a mount that only refuses.
                mounts.unmount(target)


async def _mounted(child: process.Child, target: str) -> None:
    deadline = asyncio.get_running_loop().time() + _TIMEOUT
    while child.returncode is None:
        # (it may end just now)
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            table = mounts.table(f"/proc/{child.pid}/mountinfo")
            if any(entry.path == target and entry.fstype.startswith("fuse") for entry in table):
                return
        if asyncio.get_running_loop().time() > deadline:
            raise errors.CommandFailedError(f"{PROGRAM} did not mount within {_TIMEOUT:g} s", returncode=0)
        await asyncio.sleep(_INTERVAL)
    assert child.stdout is not None
    output = await child.stdout.read(1 << 16)
    raise words.failure(child.argv, child.returncode, output, name=PROGRAM)
