"""Further processes in running containers: what ``exec`` does, over containerd's own API.

They and their named pipes are the node's: a process whose client is gone goes on, and what it prints is read and dropped. It ends
with the node, or when the next one starts: nobody would read its pipes any more.
"""

import asyncio
import contextlib
import dataclasses
import glob
import json
import logging
import os
import shutil
import signal
from typing import Any

from nixlet import errors
from nixlet.containerd import client as containerd_client
from nixlet.containerd import tasks
from nixlet.containers import clients, endings, failures, model, pipes, users
from nixlet.host import files, uncut

#: The directories of processes, and the file in each that names its container.
_DIRECTORIES = "exec-"
_RECORD = "container"

#: Seconds that a process may take to end that is killed.
_KILL_PATIENCE = 5.0

_log = logging.getLogger("nixlet.containers")


@dataclasses.dataclass(frozen=True, slots=True)
class Command:
    """A process that is to be added; what is empty is as the container's first process has it.

    Attributes:
        args: The program and its arguments.
        env: Variables beside the container's own.
        working_dir: Its working directory.
        user: Its user and group.
        tty: It has a terminal.
        size: The terminal's columns and rows; zeros: nobody knows.
    """

    args: tuple[str, ...]
    env: tuple[tuple[str, str], ...] = ()
    working_dir: str = ""
    user: model.Security | None = None
    tty: bool = False
    size: tuple[int, int] = (0, 0)


class Processes:
    """Adds processes to the containers of one node."""

    def __init__(self, containerd: containerd_client.Containerd, service: tasks.Tasks, state_dir: str) -> None:
        """None yet, and those that an earlier node left.

        Args:
            containerd: The containerd.
            service: Its tasks.
            state_dir: Where the pipes are made. What is there by now is an earlier node's.
        """
        self._containerd = containerd
        self._tasks = service
        self._state_dir = state_dir
        self._running: set[Process] = set()
        self._left = glob.glob(os.path.join(glob.escape(state_dir), f"{_DIRECTORIES}*"))

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
        if command.tty and all(command.size):
            spec["consoleSize"] = {"width": command.size[0], "height": command.size[1]}
        if command.working_dir:
            spec["cwd"] = command.working_dir
        if command.user is not None:
            root = f"/proc/{await self._tasks.pid(container)}/root"
            ids = await asyncio.to_thread(users.find, root, command.user)
            spec["user"] = {"uid": ids.uid, "gid": ids.gid, "additionalGids": list(ids.groups)}
        return spec

    async def start(self, container: str, command: Command, client: clients.Client, *, stdin: bool) -> "Process":
        """Start a process in a container; it goes on by itself.

        Args:
            container: The container.
            command: What it is.
            client: Gets its output, and gives its input.
            stdin: It has an input.

        Raises:
            NotFoundError: There is no such container, or it doesn't run, or it has no such user.
            CommandNotFoundError: Its image has no such program.
            NotExecutableError: The program can't be executed.
        """
        spec = await self._spec(container, command)
        process = Process(self._tasks, container, self._state_dir, os.urandom(8).hex())

        async def begin() -> None:
            await process.begin(spec, client, stdin=stdin)
            self._running.add(process)
            process.ended.add_done_callback(lambda _: self._running.discard(process))

        await uncut.to_its_end(begin())
        return process

    async def recover(self) -> None:
        """End what an earlier node left."""
        for directory in self._left:
            name = os.path.basename(directory).removeprefix(_DIRECTORIES)
            await Process(self._tasks, _recorded(directory), self._state_dir, name).end()

    async def close(self) -> None:
        """End all: nobody would read their pipes."""
        await asyncio.gather(*(process.end() for process in self._running))


class Process:
    """A process that is added to a container."""

    def __init__(self, service: tasks.Tasks, container: str, state_dir: str, name: str) -> None:
        """A process that isn't there yet.

        Args:
            service: containerd's tasks.
            container: The container.
            state_dir: Where its directory is made.
            name: What tells it from others.
        """
        self._tasks = service
        self._container = container
        self._name = f"nixlet-{name}"
        self._directory = os.path.join(state_dir, f"{_DIRECTORIES}{name}")
        self._outputs: dict[str, int] = {}
        self._stdin: int | None = None
        self._serving: asyncio.Task[int] | None = None
        self._removing: asyncio.Task[None] | None = None

    @property
    def ended(self) -> "asyncio.Task[int]":
        """Its exit status, when it has ended and its client has been given all of its output; cancelled, if the node ends it."""
        assert self._serving is not None
        return self._serving

    async def begin(self, spec: dict[str, Any], client: clients.Client, *, stdin: bool) -> None:
        """Start it; see ``Processes.start``."""
        waiting = None
        try:
            with files.refusing(f"the pipes of a process can't be made in {self._directory}"):
                streams = self._make_pipes(stdin=stdin, tty=spec["terminal"])
            await self._tasks.add(self._container, self._name, spec, streams)
            # Asked beside the start: it may end at once.
            waiting = asyncio.create_task(self._wait(), name="process")
            try:
                await self._tasks.start(self._container, self._name)
            except errors.NixletError as error:
                raise failures.start_failure("the process can't start", spec["args"][0], error) from error
            if stdin:
                with files.refusing("the process's input can't be opened"):
                    self._stdin = pipes.open_writer(streams.stdin)
        except BaseException:
            if waiting is not None:
                # Nobody would read what it prints.
                await self._kill()
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)
            await self._close()
            await self._remove()
            raise
        self._serving = asyncio.create_task(self._serve(client, waiting), name=self._name)
        self._serving.add_done_callback(self._tell)

    def _make_pipes(self, *, stdin: bool, tty: bool) -> tasks.Streams:
        files.new_directory(self._directory, 0o700)
        with open(os.path.join(self._directory, _RECORD), "w", encoding="utf-8") as file:
            file.write(self._container)
        names = ["stdout", *(["stdin"] if stdin else []), *([] if tty else ["stderr"])]
        paths = {name: os.path.join(self._directory, name) for name in names}
        for name, path in paths.items():
            files.new_pipe(path)
            if name != "stdin":
                self._outputs[name] = pipes.open_reader(path)
        return tasks.Streams(**paths)

    async def _serve(self, client: clients.Client, waiting: "asyncio.Task[int]") -> int:
        readers = {
            fd: asyncio.create_task(self._read(name, fd, client), name=name) for name, fd in self._outputs.items()
        }
        ours = [waiting, *readers.values()]
        if self._stdin is not None:
            ours.append(asyncio.create_task(self._feed(client, self._stdin), name="stdin"))
        try:
            await pipes.complete(waiting, readers, lambda: client.busy)
            return waiting.result()
        finally:
            for task in ours:
                task.cancel()
            await asyncio.gather(*ours, return_exceptions=True)
            await self._close()
            # Nobody waits for that.
            self._removing = asyncio.create_task(self._remove(), name=f"remove {self._name}")

    async def _wait(self) -> int:
        while True:
            try:
                code = await self._tasks.wait(self._container, self._name)
            except errors.UnavailableError:
                # containerd is being started again; the shim remembers.
                await asyncio.sleep(endings.RETRY)
            else:
                return code

    async def _read(self, name: str, fd: int, client: clients.Client) -> None:
        await client.pipe(name, fd)
        await pipes.drain(fd)

    async def _feed(self, client: clients.Client, pipe: int) -> None:
        await client.feed(pipe)
        os.close(pipe)
        self._stdin = None
        with contextlib.suppress(errors.NixletError):
            await self._tasks.close_stdin(self._container, self._name)

    async def send_signal(self, number: int) -> None:
        """Send it a signal.

        Raises:
            NotFoundError: It has ended.
        """
        await self._tasks.kill(self._container, number, process=self._name)

    async def resize(self, columns: int, rows: int) -> None:
        """Tell the size of its terminal."""
        await self._tasks.resize(self._container, columns, rows, process=self._name)

    async def end(self) -> None:
        """End it for good, and take away what is there of it."""
        await self._kill()
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.gather(self._serving, return_exceptions=True)
        await self._close()
        await self._remove()

    async def _kill(self) -> None:
        with contextlib.suppress(errors.NixletError, TimeoutError):
            async with asyncio.timeout(_KILL_PATIENCE):
                await self.send_signal(signal.SIGKILL)
                await self._tasks.wait(self._container, self._name)

    async def _close(self) -> None:
        for fd in (*self._outputs.values(), *(() if self._stdin is None else (self._stdin,))):
            os.close(fd)
        self._outputs, self._stdin = {}, None
        await asyncio.to_thread(shutil.rmtree, self._directory, ignore_errors=True)

    async def _remove(self) -> None:
        with contextlib.suppress(errors.NixletError, TimeoutError):
            async with asyncio.timeout(_KILL_PATIENCE):
                await self._tasks.remove(self._container, self._name)

    def _tell(self, task: "asyncio.Task[int]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.warning("a process in container %s is given up: %s", self._container, error)


def _recorded(directory: str) -> str:
    """The container that a process's directory names; empty where it was cut off."""
    try:
        with open(os.path.join(directory, _RECORD), encoding="utf-8") as file:
            return file.read()
    except OSError:
        return ""
