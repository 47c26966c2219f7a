"""Containers in the foreground: their streams go through the node, from the first byte on.

CRI offers a container's streams only once it runs (Attach): what it wrote by then is in its log, but without the line that is being
written, and with every carriage return before a line's end gone. So for the moment in which the shim opens the container's
named pipes, ours are in their place. Output goes from us to the pipes that containerd made, so that the container has its log, and to
whoever has the container in front of it; input comes from there. Afterwards each name stands for what it stood for before.

The container writes to us, so it must never depend on anybody who may go: a client that is gone is passed over, and our pipes
keep a name, by which a next node finds them.

containerd 1.6 closes its pipes as soon as a container has ended, even if we are still writing. What it doesn't take then we
write to the log ourselves.
"""

import asyncio
import contextlib
import glob
import logging
import os
from collections.abc import AsyncIterator, Iterator, Sequence

from nixlet import errors
from nixlet.containerd import client, cri, tasks
from nixlet.containers import endings, logrecords, stdio
from nixlet.host import files
from nixlet.rpc.gen import cri_pb2

#: Where CRI keeps a container's pipes below containerd's state directory: the same from 1.6 to 2.4.
_PIPES = "io.containerd.grpc.v1.cri/containers/{container}/io/*/{container}-{stream}"

#: What containerd's own pipe is called while ours has its name, and what ours is called afterwards.
_ASIDE = ".aside"
_OURS = ".nixlet"

_OUTPUTS = ("stdout", "stderr")

#: Pieces of output that a client may be behind before the container waits for it, as it would for any reader of a pipe.
_AHEAD = 16

_log = logging.getLogger("nixlet.pods")


class Listener:
    """Whoever has a container in front of it; when it is gone, nobody waits for it."""

    def __init__(self) -> None:
        self._pieces: asyncio.Queue[tuple[str, bytes] | None] = asyncio.Queue()
        self._room = asyncio.Event()
        self._waited_for = True
        self._here = True

    async def put(self, stream: str, data: bytes) -> None:
        """Hand a piece of output to it, and wait until it isn't far behind."""
        if not self._here:
            return
        self._pieces.put_nowait((stream, data))
        while self._waited_for and self._pieces.qsize() > _AHEAD:
            self._room.clear()
            await self._room.wait()

    def hurry(self) -> None:
        """Wait for it no more: the container has ended, and what is left of its output is small."""
        self._waited_for = False
        self._room.set()

    def leave(self) -> None:
        """It is gone."""
        self._here = False
        self.hurry()

    def finish(self) -> None:
        """There is no more output."""
        self._pieces.put_nowait(None)

    async def pieces(self) -> AsyncIterator[tuple[str, bytes]]:
        """The output, until it is finished."""
        while (piece := await self._pieces.get()) is not None:
            self._room.set()
            yield piece


class Foreground:
    """One container, from before its start until its end."""

    def __init__(self, service: tasks.Tasks, runtime: cri.RuntimeClient, state_dirs: Sequence[str]) -> None:
        """A container that will be started.

        Args:
            service: containerd's tasks.
            runtime: Its CRI.
            state_dirs: Where its state may be.
        """
        self._tasks = service
        self._runtime = runtime
        self._state_dirs = state_dirs
        self._streams = stdio.Streams()
        self._container = ""

    def close(self) -> None:
        """Close the streams."""
        self._streams.close()

    @contextlib.contextmanager
    def interposed(self, container: str) -> Iterator[None]:
        """Be in between for the time of the context, in which the container must be started.

        Raises:
            UnsupportedError: containerd keeps its pipes elsewhere.
        """
        self._container = container
        found = {stream: path for stream in ("stdin", *_OUTPUTS) if (path := self._find(stream))}
        if "stdout" not in found:
            raise errors.UnsupportedError(
                "containerd's pipes for the container are at none of the usual places, so it can't run in the foreground",
                hint="run it with --detach, and see nixlet logs",
            )
        with contextlib.ExitStack() as stack:
            for stream, path in found.items():
                aside = path + _ASIDE
                os.rename(path, aside)
                stack.callback(_put_back, aside, path)
                files.new_pipe(path)
                if stream != "stdin":
                    self._streams.open_output(stream, path, copy=aside, lost=self._log)
            yield
            if "stdin" in found:
                self._streams.open_input(found["stdin"])
        for stream in _OUTPUTS:
            if stream in found:
                # Where containerd opens it again when it is started again.
                self._streams.copy_to(stream, found[stream])

    def taken_up(self, container: str) -> bool:
        """Be in between again, where an earlier node was; whether one was."""
        self._container = container
        for stream in _OUTPUTS:
            if ours := self._find(stream + _OURS):
                copy = ours.removesuffix(_OURS)
                self._streams.open_output(stream, ours, copy=copy, lost=self._log)
        return self._streams.has_output

    async def _log(self, stream: str, data: bytes) -> None:
        with contextlib.suppress(errors.NotFoundError, FileNotFoundError):
            path = await self._log_path()
            await asyncio.to_thread(logrecords.append, path, stream, data)

    async def _log_path(self) -> str:
        while True:
            try:
                return (await self._runtime.container_status(self._container)).log_path
            except errors.UnavailableError:
                # containerd is being started again.
                await asyncio.sleep(endings.RETRY)

    def _find(self, stream: str) -> str:
        pattern = _PIPES.format(container=self._container, stream=stream)
        for directory in self._state_dirs:
            for path in glob.iglob(os.path.join(glob.escape(directory), pattern)):
                return path
        return ""

    async def serve(self, containerd: client.Containerd, listener: Listener, stdin: AsyncIterator[bytes] | None) -> int:
        """Hand output and input on until the container has ended; its exit status.

        Args:
            containerd: Knows when it has ended.
            listener: Takes the output.
            stdin: The input.
        """

        async def ended() -> int:
            status = await endings.wait(
                self._runtime, containerd, self._container, patient=True, process_ended=listener.hurry
            )
            return status.exit_code

        async def close_stdin() -> None:
            # Nobody would say it again, and the container may wait for it.
            while True:
                try:
                    await self._tasks.close_stdin(self._container)
                except errors.NixletError:
                    await asyncio.sleep(endings.RETRY)
                else:
                    return

        try:
            return await self._streams.serve(ended(), listener.put, stdin, close_stdin)
        finally:
            self.close()
            listener.finish()


class Foregrounds:
    """All containers of a node whose streams go through it."""

    def __init__(
        self,
        containerd: client.Containerd,
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
        self._serving: set[asyncio.Task[int]] = set()

    def new(self) -> Foreground:
        """One for a container that will be started."""
        return Foreground(self._tasks, self._runtime, self._state_dirs)

    def serve(
        self, foreground: Foreground, listener: Listener, stdin: AsyncIterator[bytes] | None
    ) -> "asyncio.Task[int]":
        """Serve a container that was started, whatever becomes of the listener; the task gives its exit status.

        Args:
            foreground: The container.
            listener: Takes the output.
            stdin: The input.
        """
        task = asyncio.create_task(foreground.serve(self._containerd, listener, stdin), name="foreground")
        self._serving.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: "asyncio.Task[int]") -> None:
        self._serving.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.warning("a container's streams are given up: %s", error)

    async def adopt(self) -> None:
        """Go on with the containers whose streams went through an earlier node: their output waits for us."""
        for container in await self._runtime.containers():
            if container.state == cri_pb2.CONTAINER_RUNNING:
                foreground = self.new()
                if foreground.taken_up(container.id):
                    nobody = Listener()
                    nobody.leave()
                    self.serve(foreground, nobody, None)

    async def close(self) -> None:
        """Leave them alone; a next node goes on."""
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)


def _put_back(aside: str, path: str) -> None:
    # containerd takes the pipes of a container away that did not start.
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, path + _OURS)
    with contextlib.suppress(FileNotFoundError):
        os.replace(aside, path)
