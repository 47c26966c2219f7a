"""Containers in the foreground: their streams go through us, from the first byte on.

CRI offers a container's streams only once it runs (Attach): what it wrote by then is in its log, but without the line that is being
written, and with every carriage return before a line's end gone. So for the moment in which the shim opens the container's
named pipes, ours are in their place. Output goes to us and from us to the pipes that containerd made, so that the container has its log;
input comes from us. Afterwards each name stands for what it stood for before.

containerd 1.6 closes its pipes as soon as a container has ended, even if we are still writing. What it doesn't take then, or
after a restart, we write to the log ourselves.
"""

import asyncio
import contextlib
import functools
import glob
import os
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence

from nixlet import errors
from nixlet.containerd import cri, tasks
from nixlet.host import files
from nixlet.kube import logs, stdio

#: Where CRI keeps a container's pipes below containerd's state directory: the same from 1.6 to 2.4.
_PIPES = "io.containerd.grpc.v1.cri/containers/{container}/io/*/{container}-{stream}"

#: What containerd's own pipe is called while ours has its name.
_ASIDE = ".aside"


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
        found = {stream: path for stream in ("stdin", "stdout", "stderr") if (path := self._find(stream))}
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

    async def _log(self, stream: str, data: bytes) -> None:
        with contextlib.suppress(errors.NotFoundError, FileNotFoundError):
            status = await self._runtime.container_status(self._container)
            await asyncio.to_thread(logs.append, status.log_path, stream, data)

    def _find(self, stream: str) -> str:
        pattern = _PIPES.format(container=self._container, stream=stream)
        for directory in self._state_dirs:
            for path in glob.iglob(os.path.join(glob.escape(directory), pattern)):
                return path
        return ""

    async def serve(
        self, ended: Coroutine[None, None, int], sink: stdio.Sink, stdin: AsyncIterator[bytes] | None
    ) -> int:
        """Hand output and input on until the container has ended; its exit status.

        Args:
            ended: Waits for its end.
            sink: Takes the output.
            stdin: The input.
        """
        close_stdin = functools.partial(self._tasks.close_stdin, self._container)
        return await self._streams.serve(ended, sink, stdin, close_stdin)


def _put_back(aside: str, path: str) -> None:
    # containerd takes the pipes of a container away that did not start.
    with contextlib.suppress(FileNotFoundError):
        os.replace(aside, path)
