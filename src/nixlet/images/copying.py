"""Copying an image's blobs into containerd beside other work."""

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from nixlet import errors
from nixlet.containerd import imagestore
from nixlet.host import uncut
from nixlet.images import model

_CHUNK = 1 << 20

#: How many blobs are copied at a time, beside the layer that is unpacked.
_COPIES = 3


class Source(Protocol):
    """Where an image's blobs are read from, an archive for example."""

    @property
    def label(self) -> str:
        """What errors call it."""
        ...

    def open_blob(self, digest: str) -> io.BufferedIOBase:
        """Read a blob."""
        ...


#: A blob, and its labels.
Labelled = tuple[model.Descriptor, Mapping[str, str]]

#: Waits until the blob of a digest is copied; whether it had to.
Copied = Callable[[str], Awaitable[bool]]


@contextlib.asynccontextmanager
async def beside(containerd: imagestore.ImageStore, source: Source, blobs: Sequence[Labelled]) -> AsyncIterator[Copied]:
    """Copy blobs with their labels into containerd beside what is done in the context, which has to wait for each of them.

    A copy that fails ends the context at once: nothing can come of it any more, however long Nix takes.
    """
    # A blob can be there twice, as an empty layer is.
    distinct = {blob.digest: (blob, labels) for blob, labels in blobs}
    due = set(distinct)
    gate = asyncio.Semaphore(_COPIES)

    async def copy(digest: str) -> None:
        blob, labels = distinct[digest]
        async with gate:
            await containerd.write_content(digest, blob.size, lambda: _chunks(source, digest), labels)
        due.discard(digest)

    async def begin(digest: str) -> None:
        # containerd may be started again while nobody needs the blob yet: who does tries once more.
        with contextlib.suppress(errors.UnavailableError):
            await copy(digest)

    async def copied(digest: str) -> bool:
        waits = digest in due
        # Whoever waits may be cancelled, and a copy that ends for that must not look like one that failed.
        await asyncio.shield(tasks[digest])
        if digest in due:
            await copy(digest)
        return waits

    own: Exception | None = None
    try:
        async with asyncio.TaskGroup() as group:
            tasks = {digest: group.create_task(begin(digest), name=f"copy {digest}") for digest in distinct}
            try:
                yield copied
            except Exception as error:
                own = error
                raise
    except BaseExceptionGroup as failed:
        # In a group errors go before a cancel; here it is the other way round.
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise asyncio.CancelledError from None
        told = own or failed.exceptions[0]
        raise told from told.__cause__


async def _chunks(source: Source, digest: str) -> AsyncIterator[bytes]:
    with source.open_blob(digest) as blob:
        while chunk := await uncut.to_its_end(asyncio.to_thread(blob.read, _CHUNK)):
            yield chunk
