"""The streams of a process: named pipes that a shim has opened, read and written byte for byte."""

import asyncio
import contextlib
import errno
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine

#: Takes a piece of output: the stream's name ("stdout", "stderr"), and the bytes. May block; is called in a thread.
Sink = Callable[[str, bytes], None]

_CHUNK = 1 << 16

#: Takes what a copy's reader was not there for any more: the stream's name, and the bytes.
Lost = Callable[[str, bytes], Awaitable[None]]

#: Seconds in which the output of a process that has ended must go on, or it is taken to be complete: what the process left
#: running may hold its pipes for ever.
_DRAIN = 0.5


class Streams:
    """One process's streams, as its client has them."""

    def __init__(self) -> None:
        self._fds = contextlib.ExitStack()
        self._output: dict[str, int] = {}
        self._copies: dict[str, contextlib.ExitStack] = {}
        self._copy_fds: dict[str, int] = {}
        self._lost: dict[str, Lost] = {}
        self._input = contextlib.ExitStack()
        self._input_fd = -1

    def close(self) -> None:
        """Close all that is open."""
        for stack in (self._fds, self._input, *self._copies.values()):
            stack.close()

    def open_output(self, name: str, path: str, *, copy: str = "", lost: Lost | None = None) -> None:
        """Open a pipe to read from, before anybody writes to it.

        Args:
            name: The stream's name.
            path: The pipe.
            copy: Another pipe, which somebody reads, that gets all that comes as well.
            lost: Gets what nobody reads there any more.
        """
        self._output[name] = fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._fds.callback(os.close, fd)
        if copy:
            self._copy_fds[name] = fd = os.open(copy, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            self._copies[name] = contextlib.ExitStack()
            self._copies[name].callback(os.close, fd)
        if lost:
            self._lost[name] = lost

    def open_input(self, path: str) -> None:
        """Open a pipe to write to. When nobody reads it (any more), what is written goes nowhere."""
        try:
            self._input_fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
        else:
            self._input.callback(os.close, self._input_fd)

    async def serve(
        self,
        ended: Coroutine[None, None, int],
        sink: Sink,
        stdin: AsyncIterator[bytes] | None,
        close_stdin: Callable[[], Awaitable[None]],
    ) -> int:
        """Hand output and input on until the process has ended; its exit status.

        Args:
            ended: Waits for the process's end.
            sink: Takes the output. What it raises ends this.
            stdin: The input; None: the process gets none, and no end of it either.
            close_stdin: Makes the shim forget its own end of the input, so that the process sees that ours is closed.
        """
        moved = asyncio.Event()
        waiting = asyncio.create_task(ended, name="process")
        readers = {asyncio.create_task(self._read(name, sink, moved), name=name) for name in self._output}
        feeding = set() if stdin is None else {asyncio.create_task(self._feed(stdin, close_stdin), name="stdin")}
        try:
            pending: set[asyncio.Task[int] | asyncio.Task[None]] = {waiting, *readers}
            while not waiting.done():
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for each in done:
                    # Whoever reads our own output may be gone.
                    each.result()
            while reading := {reader for reader in readers if not reader.done()}:
                moved.clear()
                done, _ = await asyncio.wait(reading, timeout=_DRAIN)
                if not done and not moved.is_set():
                    break
            for reader in readers:
                if reader.done():
                    reader.result()
            return waiting.result()
        finally:
            ours = [waiting, *readers, *feeding]
            for task in ours:
                task.cancel()
            await asyncio.gather(*ours, return_exceptions=True)

    async def _read(self, name: str, sink: Sink, moved: asyncio.Event) -> None:
        fd = self._output[name]
        try:
            while True:
                await _ready(fd, writing=False)
                with contextlib.suppress(BlockingIOError):
                    data = os.read(fd, _CHUNK)
                    if not data:
                        return
                    moved.set()
                    await self._copy(name, data)
                    # A stream of ours that nobody reads must not keep signals from being handed on.
                    await asyncio.to_thread(sink, name, data)
                    moved.set()
        finally:
            if name in self._copies:
                self._copies[name].close()

    async def _copy(self, name: str, data: bytes) -> None:
        if name in self._copy_fds:
            data = await _write(self._copy_fds[name], data)
            if data:
                del self._copy_fds[name]
        if data and name in self._lost:
            await self._lost[name](name, data)

    async def _feed(self, stdin: AsyncIterator[bytes], close_stdin: Callable[[], Awaitable[None]]) -> None:
        if self._input_fd < 0:
            return
        async for data in stdin:
            if await _write(self._input_fd, data):
                break
        self._input.close()
        await close_stdin()


async def _write(fd: int, data: bytes) -> bytes:
    """Write to a pipe; what is left over when nobody reads it any more."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            await _ready(fd, writing=True)
        except BrokenPipeError:
            break
    return bytes(view)


async def _ready(fd: int, *, writing: bool) -> None:
    """Wait until a pipe can be read or written."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    (loop.add_writer if writing else loop.add_reader)(fd, ready.set)
    try:
        await ready.wait()
    finally:
        (loop.remove_writer if writing else loop.remove_reader)(fd)
