"""The streams of a process: named pipes that a shim has opened, read and written byte for byte."""

import asyncio
import contextlib
import errno
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine

from nixlet import errors

#: Takes a piece of output: the stream's name ("stdout", "stderr"), and the bytes. The process waits while it does.
Sink = Callable[[str, bytes], Awaitable[None]]

_CHUNK = 1 << 16

#: Takes what a copy's reader was not there for any more: the stream's name, and the bytes.
Lost = Callable[[str, bytes], Awaitable[None]]

#: Seconds in which the output of a process that has ended must go on, or it is taken to be complete: what the process left
#: running may hold its pipes for ever.
_DRAIN = 0.5

_log = logging.getLogger("nixlet.pods")


class _Copy:
    """Another pipe that gets all of a stream; whoever reads it may go and come back, as containerd does."""

    def __init__(self, name: str, path: str, lost: Lost | None) -> None:
        self._name = name
        self.path = path
        self._lost = lost
        self._fd = -1
        self._told = False

    def open(self) -> None:
        """Open the pipe.

        Raises:
            OSError: Nobody reads it.
        """
        self._fd = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def close(self) -> None:
        """Close the pipe: its reader sees the end."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    async def give(self, data: bytes) -> None:
        """Write all of it, to the pipe or to where goes what is lost; what neither takes is gone: the process must go on."""
        for _ in range(2):
            if self._fd >= 0:
                data = await _write(self._fd, data)
            if not data:
                return
            self.close()
            with contextlib.suppress(OSError):
                self.open()
        if self._lost is not None:
            try:
                await self._lost(self._name, data)
            except (errors.NixletError, OSError) as error:
                if not self._told:
                    _log.warning("a part of what is written to %s is lost: %s", self.path, error)
                    self._told = True


class Streams:
    """One process's streams, as its client has them."""

    def __init__(self) -> None:
        self._fds = contextlib.ExitStack()
        self._output: dict[str, int] = {}
        self._copies: dict[str, _Copy] = {}
        self._giving = 0
        self._input = contextlib.ExitStack()
        self._input_fd = -1

    def close(self) -> None:
        """Close all that is open."""
        self._fds.close()
        self._input.close()
        for copy in self._copies.values():
            copy.close()

    def open_output(self, name: str, path: str, *, copy: str = "", lost: Lost | None = None) -> None:
        """Open a pipe to read from.

        Args:
            name: The stream's name.
            path: The pipe.
            copy: Another pipe, which somebody reads, that gets all that comes as well.
            lost: Gets what nobody reads there.

        Raises:
            OSError: It can't be opened, or nobody reads the copy, and there is no ``lost``.
        """
        self._output[name] = fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._fds.callback(os.close, fd)
        if copy:
            self._copies[name] = _Copy(name, copy, lost)
            try:
                self._copies[name].open()
            except OSError:
                # It is tried again with each piece.
                if lost is None:
                    raise

    @property
    def has_output(self) -> bool:
        """Whether a pipe to read from is open."""
        return bool(self._output)

    def copy_to(self, name: str, path: str) -> None:
        """Say what the pipe that gets a copy is called from now on."""
        self._copies[name].path = path

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
                # Whoever takes the output may be slow; the process has nothing to do with that.
                if not done and not moved.is_set() and not self._giving:
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
                    if name in self._copies:
                        await self._copies[name].give(data)
                    self._giving += 1
                    try:
                        await sink(name, data)
                    finally:
                        self._giving -= 1
                    moved.set()
        finally:
            if name in self._copies:
                self._copies[name].close()

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
