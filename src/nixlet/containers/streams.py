"""The streams of containers that the node starts: they belong to the node, from the first byte on, whoever listens.

CRI gives a container's output to containerd, which writes the log, and loses what it has in its hands when it is killed. Who wants to
see the output has to ask containerd once the container runs (Attach), and misses what came before. So for the moment in which
the shim opens the container's named pipes, ours are in their place; afterwards each name stands for what it stood for
before. The node reads the output, writes the log where CRI says that it is, and copies to any number of clients; their input
goes to the container. containerd's own pipes stay open and empty until the output has ended, so that CRI says a
container has ended when its log is complete.

The container writes to the node, so it must never depend on anybody who may go: clients that are gone or read nothing are passed
over (``clients``), and our pipes keep a name by which a next node finds them. What is printed until then waits in them.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Iterator
from concurrent import futures
from typing import Final, TypeVar

from nixlet.containers import clients, logwriter, pipes
from nixlet.host import files, uncut

#: What containerd's own pipe is called while ours has its name, and what ours is called afterwards.
_ASIDE = ".aside"
OURS: Final = ".nixlet"

_OUTPUTS = ("stdout", "stderr")

#: Seconds until output is read again that could not be read or handed on.
_RETRY = 0.5

#: How often it is tried, after the last output, to say in the log what is missing there.
_LAST_TRIES = 4

T = TypeVar("T")

_log = logging.getLogger("nixlet.pods")


class Streams:
    """One container's streams.

    Attributes:
        container: Its ID.
        ended: Its exit status, when its process has ended and all of its output is in its log; CRI may say so a little later.
            What fails is raised.
    """

    ended: "asyncio.Task[int]"

    def __init__(
        self,
        container: str,
        peeker: pipes.Peeker,
        threads: futures.Executor,
        close_stdin: Callable[[], Awaitable[None]],
    ) -> None:
        """A container that is started, or was.

        Args:
            container: Its ID.
            peeker: Reads its output.
            threads: Write logs.
            close_stdin: Makes the shim forget its own end of the input, so that the container sees that ours is closed.
        """
        self.container = container
        self._peeker = peeker
        self._threads = threads
        self._close_stdin = close_stdin
        self._stdin: int | None = None
        self._stdin_ends = False
        self._outputs: dict[str, int] = {}
        #: containerd's own pipes, which are held open.
        self._theirs: dict[str, int] = {}
        self._names: list[str] = []
        self._clients: set[clients.Client] = set()
        self._feeding: set[asyncio.Task[None]] = set()
        self._busy = 0
        self._log = logwriter.LogWriter()
        self._logging = asyncio.Lock()
        self._told = False
        self._hurried = False

    @property
    def log_path(self) -> str:
        """The log that is written; empty: none, or not yet."""
        return self._log.path

    def close(self) -> None:
        """Close what is open; a next node can go on."""
        for fd in (*self._outputs.values(), *self._theirs.values()):
            os.close(fd)
        self._outputs, self._theirs = {}, {}
        if self._stdin is not None:
            os.close(self._stdin)
            self._stdin = None

    def forget(self) -> None:
        """Take the names of our pipes away: the container has ended, and nobody goes on with them."""
        for name in self._names:
            with contextlib.suppress(OSError):
                os.unlink(name)

    @contextlib.contextmanager
    def interposed(self, directory: str, *, stdin_ends: bool) -> Iterator[None]:
        """Be in between for the time of the context, in which the container must be started.

        Args:
            directory: Where containerd has its pipes.
            stdin_ends: Its input ends with that of the first client that has any. A terminal's has no end: others may have it later.
        """
        self._stdin_ends = stdin_ends
        found = [each for each in ("stdin", *_OUTPUTS) if os.path.lexists(self._place(directory, each))]
        with contextlib.ExitStack() as stack:
            for stream in found:
                path = self._place(directory, stream)
                os.rename(path, path + _ASIDE)
                stack.callback(_put_back, path)
                self._names.append(path + OURS)
                files.new_pipe(path)
                if stream != "stdin":
                    self._outputs[stream] = pipes.open_reader(path)
                    self._hold(stream, path + _ASIDE)
            yield
            if "stdin" in found:
                self._stdin = pipes.open_writer(self._place(directory, "stdin"))

    def take_up(self, directory: str) -> None:
        """Be in between again, where an earlier node was: what waits in the pipes is kept from now on."""
        for stream in _OUTPUTS:
            path = self._place(directory, stream) + OURS
            if os.path.lexists(path):
                self._names.append(path)
                self._outputs[stream] = pipes.open_reader(path)

    def take_up_the_rest(self, directory: str) -> None:
        """Take up the input too, which other clients can give, and containerd's own pipes, now that there is a containerd."""
        path = self._place(directory, "stdin") + OURS
        with contextlib.suppress(FileNotFoundError):
            self._stdin = pipes.open_writer(path)
            self._names.append(path)
        for stream in _OUTPUTS:
            self._hold(stream, self._place(directory, stream))

    def _place(self, directory: str, stream: str) -> str:
        return os.path.join(directory, f"{self.container}-{stream}")

    def _hold(self, stream: str, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            if (fd := pipes.open_writer(path)) is not None:
                self._theirs[stream] = fd

    def join(self, client: clients.Client) -> None:
        """Have a client listen, and speak, from now on; who has it finishes it when ``ended`` is done."""
        if self._hurried:
            client.hurry()
        self._clients.add(client)
        client.when_gone(lambda: self._clients.discard(client))
        if not client.has_input or self._stdin is None:
            return
        # Several clients have the same pipe; each waits for room by a number of its own, which stays its own when others end the input.
        try:
            own = os.dup(self._stdin)
        except OSError as error:
            client.fail("the container's input can't be opened", error)
            return
        ends, self._stdin_ends = self._stdin_ends, False
        task = asyncio.create_task(self._feed(client, own, ends=ends), name="input")
        self._feeding.add(task)

        def done(_: object) -> None:
            # Not at the end of the coroutine: one that is cancelled at once never begins.
            self._feeding.discard(task)
            os.close(own)

        task.add_done_callback(done)

    async def _feed(self, client: clients.Client, pipe: int, *, ends: bool) -> None:
        await client.feed(pipe)
        if ends:
            await self.end_input()

    async def end_input(self) -> None:
        """Let the container see the end of its input, whoever else has some for it."""
        if self._stdin is None:
            return
        others = self._feeding - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if self._stdin is not None:
            os.close(self._stdin)
            self._stdin = None
            await self._close_stdin()

    def hurry(self) -> None:
        """The process has ended, so what is left of its output is small: clients that are slow are not waited for any more."""
        self._hurried = True
        for each in self._clients:
            each.hurry()

    async def serve(self, ended: Awaitable[T], log_path: str) -> T:
        """Write the log and hand output on until the container's process has ended, and all of its output has come.

        Args:
            ended: Waits for the process's end; what it returns is returned.
            log_path: The log; empty: there is none.
        """
        self._log.path = log_path
        waiting = asyncio.ensure_future(ended)
        readers = {fd: asyncio.create_task(self._read(name, fd), name=name) for name, fd in self._outputs.items()}
        try:
            await pipes.complete(waiting, readers, lambda: self._busy > 0)
            for _ in range(_LAST_TRIES):
                if not await self._tell_gaps():
                    break
                await asyncio.sleep(_RETRY)
            return waiting.result()
        finally:
            ours = [waiting, *readers.values(), *self._feeding]
            for task in ours:
                task.cancel()
            await asyncio.gather(*ours, return_exceptions=True)
            # A next node doesn't know what is missing.
            await uncut.to_its_end(self._tell_gaps())

    async def _tell_gaps(self) -> bool:
        """Have it told in the log what is missing there; whether that is still to be done."""
        # A thread more, too, may be refused.
        with contextlib.suppress(OSError, RuntimeError):
            async with self._logging:
                if self._log.has_gaps:
                    await asyncio.get_running_loop().run_in_executor(self._threads, self._log.tell_gaps)
        return self._log.has_gaps

    async def _read(self, name: str, fd: int) -> None:
        try:
            while await self._read_piece(name, fd):
                pass
        finally:
            # containerd says that the container has ended when it sees this.
            if (theirs := self._theirs.pop(name, None)) is not None:
                os.close(theirs)

    async def _read_piece(self, name: str, fd: int) -> bool:
        """Take a piece of output where it belongs; False at its end."""
        try:
            data = await self._peeker.see(fd)
            if not data:
                return False
            self._busy += 1
            try:
                await uncut.to_its_end(self._keep(name, data, fd))
                await asyncio.gather(*(self._give(each, name, data) for each in self._clients))
            finally:
                self._busy -= 1
        except Exception as error:  # noqa: BLE001 (whatever it is, the container must not wait for a reader for ever)
            self._tell(error)
            await asyncio.sleep(_RETRY)
        return True

    async def _give(self, client: clients.Client, name: str, data: bytes) -> None:
        try:
            await client.give(name, data)
        except Exception:  # noqa: BLE001 (it is logged, and is one client's trouble)
            _log.exception("a client of container %s gets no more of its output", self.container)
            client.leave()

    async def _keep(self, stream: str, data: bytes, fd: int) -> None:
        """Write to the log, and only then take it from the pipe: where the node is killed in between, the next one writes it again."""

        def keep() -> None:
            failure = None
            try:
                self._log.write(stream, data)
            except OSError as error:
                failure = error
            self._peeker.take(fd, len(data))
            if failure is not None:
                raise failure

        try:
            async with self._logging:
                await asyncio.get_running_loop().run_in_executor(self._threads, keep)
        except OSError as error:
            # The process must go on; how much is missing will stand in the log.
            self._tell(error)
        else:
            self._told = False

    def _tell(self, error: Exception) -> None:
        if not self._told:
            self._told = True
            reason = error.strerror if isinstance(error, OSError) else repr(error)
            _log.warning(
                "a part of what a container prints is missing in %s, or comes later: %s", self._log.path, reason
            )


def _put_back(path: str) -> None:
    # containerd takes the pipes of a container away that did not start.
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, path + OURS)
    with contextlib.suppress(FileNotFoundError):
        os.replace(path + _ASIDE, path)
