"""Opening archives in a node: in threads that end with their callers and wait for nobody, and not too many being expanded at a time."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

from nixlet.host import uncut
from nixlet.images import archive, archivefile, expand
from nixlet.telemetry import progress

T = TypeVar("T")

#: How many compressed archives are expanded at a time. What they expand to stays as long as it is used, which may be for hours
#: while store paths are fetched: that must not keep others from being expanded, and room on the disk is seen to there.
_AT_A_TIME = 2


class Opener:
    """Opens archives.

    Args:
        scratch_dir: Where compressed ones are expanded, into files without a name.
    """

    def __init__(self, scratch_dir: str) -> None:
        self._scratch_dir = scratch_dir
        self._expansions = asyncio.Semaphore(_AT_A_TIME)

    @contextlib.asynccontextmanager
    async def opened(
        self,
        fd: int,
        label: str,
        read: Callable[[archive.Archive], T],
        sink: progress.ProgressSink = progress.ignore,
        *,
        piped: bool = False,
    ) -> AsyncIterator[tuple[archive.Archive, T]]:
        """An archive for the time of the context, with what was read from it.

        Args:
            fd: The archive, open for reading; stays the caller's.
            label: What errors call it.
            read: Looks at the archive; runs in a thread.
            sink: Gets the progress.
            piped: Whether it may be a pipe, which is copied first, as fast as it comes.

        Raises:
            NixletError: As ``archive.open_archive`` and ``read``.
        """
        stop = threading.Event()
        with contextlib.ExitStack() as stack:
            file = fd
            if piped:
                file = await archivefile.received(stack, fd, label, self._scratch_dir)

            def open_and_read() -> tuple[archive.Archive, T]:
                opening = archive.open_archive(file, label=label, scratch_dir=self._scratch_dir, stop=stop)
                source = stack.enter_context(opening)
                return source, read(source)

            async with contextlib.AsyncExitStack() as held:
                if await asyncio.to_thread(expand.is_compressed, file):
                    if self._expansions.locked():
                        sink(progress.Progress("waiting", 0, 0, "", "for other archives that are expanded"))
                    await held.enter_async_context(self._expansions)
                opened = await uncut.to_its_end(asyncio.to_thread(open_and_read), stop.set)
            yield opened
