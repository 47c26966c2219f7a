"""Clients that listen to a process: what it prints goes to their descriptors, and what they say is its input.

Two rules hold, by where the output is kept:

- What has no log (``exec``) is piped: a client that doesn't read holds the process up, as any reader of a pipe does, until it is gone.
- What has a log is handed out beside it. A client may be some pieces behind; then the container waits for it, as long as it takes a
  piece in a while. One that doesn't is waited for no more until it has caught up: what it has no room for is left out, counted, and
  told in the stream when it reads again. The log has all of it.

A client that is gone is passed over.
"""

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import Callable, Coroutine, Mapping

from nixlet import errors
from nixlet.containers import pipes
from nixlet.host import files

#: Pieces of output that a client may be behind before it is waited for.
_AHEAD = 16

#: Bytes that a client may be behind when the process has ended: more than all pipes on the way hold. What goes on printing nevertheless
#: must not fill our memory.
_LEFT = 8 << 20

#: Seconds that a client may take for a piece before it is waited for no more.
PATIENCE = 10.0


class _Output:
    """One stream's way to a client: from memory into a pipe of ours, from there to the client's descriptor."""

    def __init__(self, destination: pipes.Destination, patience: float) -> None:
        self.destination = destination
        self._patience = patience
        self._pieces: deque[bytes] = deque()
        self._bytes = 0
        self._more = asyncio.Event()
        self._room = asyncio.Event()
        self._finished = False
        self._hurried = False
        self._left_out = 0
        self._stalled = False

    def hurry(self) -> None:
        self._hurried = True
        self._room.set()

    async def give(self, data: bytes) -> None:
        if self._is_full() and not self._stalled and not self._hurried:
            self._room.clear()
            try:
                await asyncio.wait_for(self._room.wait(), self._patience)
            except TimeoutError:
                self._stalled = True
        if self._is_full():
            self._left_out += len(data)
            return
        self._tell_gap()
        self._append(data)
        self._more.set()

    def _append(self, data: bytes) -> None:
        self._pieces.append(data)
        self._bytes += len(data)

    def _is_full(self) -> bool:
        if self._hurried:
            return self._bytes >= _LEFT
        return len(self._pieces) >= _AHEAD

    def _tell_gap(self) -> None:
        if self._left_out:
            told = f"\nnixlet: {self._left_out} bytes are left out here: nobody read them for {self._patience:g} s\n"
            self._append(told.encode())
            self._left_out = 0

    async def fill(self, writer: int, close: Callable[[], None]) -> None:
        """Hand the pieces on into a pipe, until the last; then it is closed."""
        while not self._finished or self._pieces:
            while self._pieces:
                await pipes.write(writer, self._pieces[0])
                self._bytes -= len(self._pieces.popleft())
                self._room.set()
            self._stalled = False
            self._more.clear()
            if not self._finished:
                await self._more.wait()
        close()

    def finish(self) -> None:
        self._tell_gap()
        self._finished = True
        self._more.set()


class Client:
    """One client, with the descriptors that it handed over.

    Attributes:
        gone: Set when nothing can be given to it any more, for whatever reason.
        reader_gone: Nobody reads a descriptor that it handed over.
        failure: Why a descriptor can't be written to, if that is another reason.
    """

    def __init__(
        self,
        outputs: Mapping[str, int] | None = None,
        stdin: int | None = None,
        *,
        patience: float = PATIENCE,
    ) -> None:
        """Take its descriptors; they are duplicated.

        Args:
            outputs: Where it wants the streams, by their names ("stdout", "stderr"); others it does without.
            stdin: Where its input comes from.
            patience: Seconds that it may take for a piece of what has a log.

        Raises:
            InvalidArgumentError: A descriptor is of no use for that.
        """
        self.gone = asyncio.Event()
        self.reader_gone = False
        self.failure: errors.NixletError | None = None
        self._outputs: dict[str, _Output] = {}
        self._source: pipes.Source | None = None
        self._filled: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._feeding: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._leaving: list[Callable[[], None]] = []
        with contextlib.ExitStack() as stack:
            if stdin is not None:
                self._source = pipes.Source(stdin)
                stack.callback(self._source.close)
            for name, fd in (outputs or {}).items():
                destination = pipes.Destination(fd)
                stack.callback(destination.close)
                self._outputs[name] = _Output(destination, patience)
            self._fds = stack.pop_all()

    @property
    def has_input(self) -> bool:
        """Whether it has input to give."""
        return self._source is not None

    @property
    def busy(self) -> bool:
        """Whether output is on its way to it that is in no pipe any more."""
        return any(output.destination.busy for output in self._outputs.values())

    def when_gone(self, tell: Callable[[], None]) -> None:
        """Have a function called as soon as it is gone, which it may be."""
        if self.gone.is_set():
            tell()
        else:
            self._leaving.append(tell)

    def leave(self) -> None:
        """It is gone, or has all that it wants: nothing more is given to it, and its descriptors are closed."""
        if self._closing is None:
            self.gone.set()
            while self._leaving:
                self._leaving.pop()()
            self.hurry()
            for task in self._tasks:
                task.cancel()
            self._closing = asyncio.create_task(self._close(), name="close a client")

    async def _close(self) -> None:
        # A descriptor that is waited for must not be closed: its number may be another's when the wait is given up.
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._fds.close()
        for output in self._outputs.values():
            await output.destination.closed()
        if self._source is not None:
            await self._source.closed()

    def hurry(self) -> None:
        """Wait for it no more: the process has ended, and what is left of its output is small."""
        for output in self._outputs.values():
            output.hurry()

    def fail(self, what: str, error: OSError) -> None:
        """It can't be served, which is its own trouble and nobody else's: it is told so, and is gone.

        Args:
            what: The sentence up to the reason ("/x can't be written").
            error: The reason.
        """
        self.failure = files.refused(what, error)
        self.leave()

    async def give(self, stream: str, data: bytes) -> None:
        """Hand it a piece of output that has been logged."""
        output = self._outputs.get(stream)
        if output is None or self.gone.is_set():
            return
        if stream not in self._filled:
            try:
                reader, writer = pipes.new_pipe()
            except OSError as error:
                self.fail("the output can't be handed on", error)
                return
            self._filled.add(stream)
            self._fds.callback(os.close, reader)
            writing = self._fds.enter_context(contextlib.ExitStack())
            writing.callback(os.close, writer)
            self._run(output.fill(writer, writing.close), f"fill {stream}")
            self._run(self._move(output.destination, reader), f"move {stream}")
        await output.give(data)

    async def pipe(self, stream: str, source: int) -> None:
        """Hand it all that a pipe gives, until its end, or until the client is gone."""
        output = self._outputs.get(stream)
        if output is not None and not self.gone.is_set():
            await _ended(self._run(self._move(output.destination, source), f"move {stream}"))

    async def feed(self, pipe: int) -> None:
        """Hand all of its input to a pipe, until its end, or until the client is gone or the pipe's reader is.

        Args:
            pipe: A descriptor that nobody else waits for, and that is closed when this is done, at the earliest.
        """
        if self._source is not None and not self.gone.is_set():
            self._feeding = self._run(self._feed(self._source, pipe), "input")
            await _ended(self._feeding)

    async def finish(self) -> None:
        """There is no more output: wait until it has taken all that there was, or is gone; then its descriptors are closed."""
        for output in self._outputs.values():
            output.finish()
        # What it says now is said to nobody.
        if moving := self._tasks - {self._feeding}:
            await asyncio.wait(moving)
        self.leave()
        assert self._closing is not None
        await asyncio.shield(self._closing)

    async def _move(self, destination: pipes.Destination, source: int) -> None:
        try:
            await destination.move(source)
        except BrokenPipeError:
            self.reader_gone = True
            self.leave()
        except OSError as error:
            self.fail("the output can't be written", error)

    async def _feed(self, source: pipes.Source, pipe: int) -> None:
        with contextlib.suppress(OSError):
            await source.feed(pipe)

    def _run(self, work: Coroutine[None, None, None], name: str) -> "asyncio.Task[None]":
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _ended(task: "asyncio.Task[None]") -> None:
    """Wait for a client's work; whoever doesn't want to wait ends it."""
    try:
        await asyncio.wait({task})
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
