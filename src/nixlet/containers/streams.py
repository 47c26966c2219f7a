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
import glob
import json
import logging
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TypeVar

from nixlet import errors
from nixlet.containerd import client as containerd_client
from nixlet.containerd import cri, tasks
from nixlet.containers import clients, endings, logwriter, pipes
from nixlet.host import files, uncut
from nixlet.rpc.gen import cri_pb2

#: Where CRI keeps a container's pipes below containerd's state directory: the same from 1.6 to 2.4.
_PIPES = "io.containerd.grpc.v1.cri/containers/{container}/io/*"

#: What containerd's own pipe is called while ours has its name, and what ours is called afterwards.
_ASIDE = ".aside"
_OURS = ".nixlet"

_OUTPUTS = ("stdout", "stderr")

#: Seconds that the output of a container may take to its log that has ended while no node ran.
_LAST_WORDS = 5.0

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

    def __init__(self, container: str, peeker: pipes.Peeker, close_stdin: Callable[[], Awaitable[None]]) -> None:
        """A container that is started, or was.

        Args:
            container: Its ID.
            peeker: Reads its output.
            close_stdin: Makes the shim forget its own end of the input, so that the container sees that ours is closed.
        """
        self.container = container
        self._peeker = peeker
        self._close_stdin = close_stdin
        self._stdin: int | None = None
        self._stdin_ends = False
        self._outputs: dict[str, int] = {}
        #: containerd's own pipes, which are held open.
        self._theirs: dict[str, int] = {}
        self._names: list[str] = []
        self._clients: list[clients.Client] = []
        self._feeding: set[asyncio.Task[None]] = set()
        self._busy = 0
        self._log = logwriter.LogWriter()
        self._logging = asyncio.Lock()
        self._told = False
        self._hurried = False

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
            stdin_ends: Its input ends with that of the first client. A terminal's has no end: others may have it later.
        """
        self._stdin_ends = stdin_ends
        found = [each for each in ("stdin", *_OUTPUTS) if os.path.lexists(self._place(directory, each))]
        with contextlib.ExitStack() as stack:
            for stream in found:
                path = self._place(directory, stream)
                os.rename(path, path + _ASIDE)
                stack.callback(_put_back, path)
                self._names.append(path + _OURS)
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
            path = self._place(directory, stream) + _OURS
            if os.path.lexists(path):
                self._names.append(path)
                self._outputs[stream] = pipes.open_reader(path)

    def take_up_the_rest(self, directory: str) -> None:
        """Take up the input too, which other clients can give, and containerd's own pipes, now that there is a containerd."""
        path = self._place(directory, "stdin") + _OURS
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
        self._clients.append(client)
        if client.has_input and self._stdin is not None:
            task = asyncio.create_task(self._feed(client, self._stdin), name="input")
            self._feeding.add(task)
            task.add_done_callback(self._feeding.discard)

    async def _feed(self, client: clients.Client, pipe: int) -> None:
        await client.feed(pipe)
        if self._stdin_ends:
            await self.end_input()

    async def end_input(self) -> None:
        """Let the container see the end of its input."""
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
            return waiting.result()
        finally:
            ours = [waiting, *readers.values(), *self._feeding]
            for task in ours:
                task.cancel()
            await asyncio.gather(*ours, return_exceptions=True)

    async def _read(self, name: str, fd: int) -> None:
        try:
            while data := await self._peeker.see(fd):
                self._busy += 1
                try:
                    await uncut.to_its_end(self._keep(name, data, fd))
                    self._clients = [each for each in self._clients if not each.gone.is_set()]
                    await asyncio.gather(*(each.give(name, data) for each in self._clients))
                finally:
                    self._busy -= 1
        finally:
            # containerd says that the container has ended when it sees this.
            if (theirs := self._theirs.pop(name, None)) is not None:
                os.close(theirs)

    async def _keep(self, stream: str, data: bytes, fd: int) -> None:
        """Write to the log, and only then take it from the pipe: where the node is killed in between, the next one writes it again."""

        def keep() -> None:
            try:
                self._log.write(stream, data)
            finally:
                self._peeker.take(fd, len(data))

        try:
            async with self._logging:
                await asyncio.to_thread(keep)
        except OSError as error:
            # The process must go on; how much is missing will stand in the log.
            if not self._told:
                self._told = True
                _log.warning("a part of what a container prints is missing in %s: %s", self._log.path, error.strerror)
        else:
            self._told = False


class Keeper:
    """The streams of all containers that a node has started."""

    def __init__(
        self,
        containerd: containerd_client.Containerd,
        service: tasks.Tasks,
        runtime: cri.RuntimeClient,
        state_dirs: Sequence[str],
    ) -> None:
        """None yet.

        Args:
            containerd: The containerd.
            service: Its tasks.
            runtime: Its CRI.
            state_dirs: Where its state may be.
        """
        self._containerd = containerd
        self._tasks = service
        self._runtime = runtime
        self._state_dirs = state_dirs
        self._streams: dict[str, Streams] = {}
        self._found: list[tuple[str, Streams]] = []
        self._peeker = pipes.Peeker()

    def find(self, container: str) -> Streams | None:
        """The streams of a container, if they are the node's."""
        return self._streams.get(container)

    @contextlib.contextmanager
    def started(
        self, container: str, client: clients.Client | None = None, *, stdin_ends: bool = False
    ) -> Iterator[None]:
        """Have a container's streams, which must be started in the context; afterwards ``find`` has them until it has ended.

        Args:
            container: The container, which has been made.
            client: Listens from the first byte on.
            stdin_ends: As in ``Streams.interposed``.

        Raises:
            UnsupportedError: containerd keeps its pipes elsewhere.
        """
        directory = next((found for found, _ in self._pipes(container, "stdout")), "")
        if not directory:
            raise errors.UnsupportedError(
                "containerd's pipes for the container are at none of the usual places, so the node can't have its output",
                hint="look into the node's log, and report it with containerd's version",
            )
        with contextlib.ExitStack() as stack:
            streams = self._new(container)
            stack.callback(streams.forget)
            stack.callback(streams.close)
            with streams.interposed(directory, stdin_ends=stdin_ends):
                yield
            stack.pop_all()
        if client is not None:
            streams.join(client)
        self._serve(streams)

    def look(self) -> None:
        """Look for containers whose streams were an earlier node's; before containerd starts, which forgets those that have ended."""
        for directory, name in self._pipes("*", "stdout" + _OURS):
            streams = self._new(name.removesuffix("-stdout" + _OURS))
            streams.take_up(directory)
            self._found.append((directory, streams))

    async def adopt(self) -> None:
        """Go on with the containers that were found: their output waits for us."""
        while self._found:
            directory, streams = self._found.pop()
            try:
                status, texts = await self._runtime.container_details(streams.container)
            except errors.NotFoundError:
                streams.close()
                streams.forget()
                continue
            config = json.loads(texts.get("info", "{}")).get("config", {})
            streams.take_up_the_rest(directory)
            self._serve(streams)
            if config.get("stdin_once") and not config.get("tty"):
                # Whoever gave it is gone.
                await streams.end_input()
            if status.state == cri_pb2.CONTAINER_EXITED:
                # CRI says so, so its log must be complete when the node is ready.
                await asyncio.wait({streams.ended}, timeout=_LAST_WORDS)

    async def close(self) -> None:
        """Leave them alone; a next node goes on."""
        for _, streams in self._found:
            streams.close()
        ended = [each.ended for each in self._streams.values()]
        for task in ended:
            task.cancel()
        await asyncio.gather(*ended, return_exceptions=True)
        self._peeker.close()

    def _pipes(self, container: str, ending: str) -> Iterator[tuple[str, str]]:
        """The directories of pipes and the pipes' names there."""
        pattern = os.path.join(_PIPES.format(container=container), f"{container}-{ending}")
        for state_dir in self._state_dirs:
            for path in glob.iglob(os.path.join(glob.escape(state_dir), pattern)):
                yield os.path.split(path)

    def _new(self, container: str) -> Streams:
        async def close_stdin() -> None:
            # Nobody would say it again, and the container may wait for it.
            while True:
                try:
                    await self._tasks.close_stdin(container)
                except errors.NixletError:
                    await asyncio.sleep(endings.RETRY)
                else:
                    return

        return Streams(container, self._peeker, close_stdin)

    def _serve(self, streams: Streams) -> None:
        async def serve() -> int:
            code = await streams.serve(self._process_ended(streams), await self._log_path(streams.container))
            streams.forget()
            if code is None:
                code = (await endings.wait(self._runtime, self._containerd, streams.container, patient=True)).exit_code
            return code

        def done(task: "asyncio.Task[int]") -> None:
            # Not at the end of the coroutine: one that is cancelled at once never begins.
            del self._streams[streams.container]
            streams.close()
            if not task.cancelled() and (error := task.exception()) is not None:
                _log.warning("the streams of container %s are given up: %s", streams.container, error)

        self._streams[streams.container] = streams
        streams.ended = asyncio.create_task(serve(), name=f"streams of {streams.container}")
        streams.ended.add_done_callback(done)

    async def _log_path(self, container: str) -> str:
        while True:
            try:
                return (await self._runtime.container_status(container)).log_path
            except errors.NotFoundError:
                return ""
            except errors.NixletError:
                # containerd is being started again.
                await asyncio.sleep(endings.RETRY)

    async def _process_ended(self, streams: Streams) -> int | None:
        """Wait for the end of a container's process; its exit status, None where containerd has forgotten it."""
        while True:
            try:
                code = await self._containerd.wait_task(streams.container)
            except errors.NotFoundError:
                code = None
            except errors.NixletError:
                await asyncio.sleep(endings.RETRY)
                continue
            streams.hurry()
            return code


def _put_back(path: str) -> None:
    # containerd takes the pipes of a container away that did not start.
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, path + _OURS)
    with contextlib.suppress(FileNotFoundError):
        os.replace(path + _ASIDE, path)
