"""Further processes in running containers: what ``exec`` does, over containerd's own API."""

import asyncio
import contextlib
import dataclasses
import functools
import json
import os
import signal
import tempfile
from collections.abc import AsyncIterator
from typing import Any

from nixlet import errors
from nixlet.containerd import client, tasks
from nixlet.containers import failures, model, stdio, users
from nixlet.host import files


@dataclasses.dataclass(frozen=True, slots=True)
class Command:
    """A process that is to be added; what is empty is as the container's first process has it."""

    args: tuple[str, ...]
    env: tuple[tuple[str, str], ...] = ()
    working_dir: str = ""
    user: model.Security | None = None
    tty: bool = False


class Processes:
    """Adds processes to containers."""

    def __init__(self, containerd: client.Containerd, service: tasks.Tasks, state_dir: str) -> None:
        self._containerd = containerd
        self._tasks = service
        self._state_dir = state_dir

    async def _spec(self, container: str, command: Command) -> dict[str, Any]:
        """The process as the OCI runtime specification has it: the first one's, with what the command changes."""
        record = await self._containerd.container(container)
        if record is None:
            raise errors.NotFoundError(f"container {container} does not exist")
        spec: dict[str, Any] = json.loads(record.spec.value)["process"]
        variables = dict(text.partition("=")[::2] for text in spec.get("env", ()))
        if command.tty:
            variables.setdefault("TERM", "xterm")
        variables |= dict(command.env)
        spec |= {
            "args": list(command.args),
            "env": [f"{name}={value}" for name, value in variables.items()],
            "terminal": command.tty,
        }
        if command.working_dir:
            spec["cwd"] = command.working_dir
        if command.user is not None:
            root = f"/proc/{await self._tasks.pid(container)}/root"
            ids = await asyncio.to_thread(users.find, root, command.user)
            spec["user"] = {"uid": ids.uid, "gid": ids.gid, "additionalGids": list(ids.groups)}
        return spec

    @contextlib.asynccontextmanager
    async def started(self, container: str, command: Command, *, stdin: bool) -> AsyncIterator["Process"]:
        """A process in a container; when the context is left before it has ended, it is killed.

        Raises:
            NotFoundError: There is no such container, or it doesn't run, or it has no such user.
            CommandNotFoundError: Its image has no such program.
            NotExecutableError: The program can't be executed.
        """
        spec = await self._spec(container, command)
        name = f"nixlet-{os.urandom(8).hex()}"
        process = Process(self._tasks, container, name)
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(process.streams.close)
            with tempfile.TemporaryDirectory(prefix="exec-", dir=self._state_dir) as directory:
                pipes = _make_pipes(directory, stdin=stdin, tty=command.tty)
                for stream, path in (("stdout", pipes.stdout), ("stderr", pipes.stderr)):
                    if path:
                        process.streams.open_output(stream, path)
                await self._tasks.add(container, name, spec, pipes)
                stack.push_async_callback(process.end)
                try:
                    await self._tasks.start(container, name)
                except errors.NixletError as error:
                    raise failures.start_failure("the process can't start", command.args[0], error) from error
                # The shim has opened all of them by now, and nobody needs their names any more.
                if pipes.stdin:
                    process.streams.open_input(pipes.stdin)
            yield process


def _make_pipes(directory: str, *, stdin: bool, tty: bool) -> tasks.Streams:
    names = ["stdout", *(["stdin"] if stdin else []), *([] if tty else ["stderr"])]
    paths = {name: os.path.join(directory, name) for name in names}
    for path in paths.values():
        files.new_pipe(path)
    return tasks.Streams(**paths)


class Process:
    """A process that was added to a container.

    Attributes:
        streams: Its streams.
    """

    def __init__(self, service: tasks.Tasks, container: str, name: str) -> None:
        self._tasks = service
        self._container = container
        self._name = name
        self._ended = False
        self.streams = stdio.Streams()

    async def serve(self, sink: stdio.Sink, stdin: AsyncIterator[bytes] | None) -> int:
        """Hand output and input on until the process has ended; its exit status."""

        async def ended() -> int:
            code = await self._tasks.wait(self._container, self._name)
            self._ended = True
            return code

        close_stdin = functools.partial(self._tasks.close_stdin, self._container, self._name)
        return await self.streams.serve(ended(), sink, stdin, close_stdin)

    async def send_signal(self, number: int) -> None:
        """Send it a signal."""
        await self._tasks.kill(self._container, number, process=self._name)

    async def resize(self, columns: int, rows: int) -> None:
        """Tell the size of its terminal."""
        await self._tasks.resize(self._container, columns, rows, process=self._name)

    async def end(self) -> None:
        """Take it away, and end it before when it still runs."""
        if not self._ended:
            with contextlib.suppress(errors.NixletError, TimeoutError):
                await self.send_signal(signal.SIGKILL)
                await asyncio.wait_for(self._tasks.wait(self._container, self._name), 5)
        with contextlib.suppress(errors.NixletError):
            await self._tasks.remove(self._container, self._name)
