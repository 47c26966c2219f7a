"""Who has the streams of which containers: a node's, as they start and end, and those of an earlier node, which go on."""

import asyncio
import contextlib
import glob
import logging
import os
from collections.abc import Iterator, Mapping
from concurrent import futures

from nixlet import errors
from nixlet.containerd import client as containerd_client
from nixlet.containerd import cri, tasks
from nixlet.containers import clients, endings, pipes, streams
from nixlet.rpc.gen import cri_pb2

#: Where CRI keeps a container's pipes below containerd's state directory: the same from 1.6 to 2.4.
_PIPES = "io.containerd.grpc.v1.cri/containers/{container}/io/*"

#: Seconds for which a start waits for containers whose streams were an earlier node's: until the logs of those that have ended
#: are complete.
_LAST_WORDS = 5.0

#: How many logs are written at once.
_THREADS = 4

_log = logging.getLogger("nixlet.pods")


class Keeper:
    """The streams of all containers that a node has started."""

    def __init__(
        self,
        containerd: containerd_client.Containerd,
        service: tasks.Tasks,
        runtime: cri.RuntimeClient,
        state_dir: str,
    ) -> None:
        """None yet.

        Args:
            containerd: The containerd.
            service: Its tasks.
            runtime: Its CRI.
            state_dir: Where its state is. Another containerd's pipes are another node's.
        """
        self._containerd = containerd
        self._tasks = service
        self._runtime = runtime
        self._state_dir = state_dir
        self._held: dict[str, streams.Streams] = {}
        self._found: list[tuple[str, streams.Streams]] = []
        self._adopting: dict[asyncio.Task[None], streams.Streams] = {}
        self._coming: dict[str, asyncio.Event] = {}
        self._peeker = pipes.Peeker()
        # Their own: whatever else is done in threads, and takes long, must keep no container waiting.
        self._threads = futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="logs")

    def find(self, container: str) -> streams.Streams | None:
        """The streams of a container, if they are the node's."""
        return self._held.get(container)

    async def awaited(self, container: str) -> streams.Streams | None:
        """As ``find``, once it is certain that an earlier node's streams are ours or won't be."""
        if coming := self._coming.get(container):
            await coming.wait()
        return self.find(container)

    def writes(self, log_path: str) -> bool:
        """Whether the log of this path is written here."""
        path = os.path.normpath(log_path)
        return any(each.log_path == path for each in self._held.values())

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
                "containerd's pipes for the container are not at the usual place, so the node can't have its output",
                hint="look into the node's log, and report it with containerd's version",
            )
        with contextlib.ExitStack() as stack:
            held = self._new(container)
            stack.callback(held.forget)
            stack.callback(held.close)
            # Asked now, so that nothing has to be asked between the container's first byte and its reading.
            log_path = asyncio.create_task(self._log_path(container), name=f"the log of {container}")
            stack.callback(log_path.cancel)
            with held.interposed(directory, stdin_ends=stdin_ends):
                yield
            stack.pop_all()
        if client is not None:
            held.join(client)
        self._serve(held, log_path)

    def look(self) -> None:
        """Look for containers whose streams were an earlier node's; before containerd starts, which forgets those that have ended."""
        for directory, name in self._pipes("*", "stdout" + streams.OURS):
            held = self._new(name.removesuffix("-stdout" + streams.OURS))
            try:
                held.take_up(directory)
            except OSError as error:
                # The others are none the worse for it.
                _log.warning("the streams of container %s can't be taken up: %s", held.container, error)
                held.close()
            else:
                self._found.append((directory, held))
                self._coming[held.container] = asyncio.Event()

    async def adopt(self) -> None:
        """Go on with the containers that were found: their output waits for us. One that takes long goes on by itself."""
        while self._found:
            directory, held = self._found.pop()
            task = asyncio.create_task(self._adopt(directory, held), name=f"adopt {held.container}")
            self._adopting[task] = held
            task.add_done_callback(self._adopted)
        if self._adopting:
            await asyncio.wait(set(self._adopting), timeout=_LAST_WORDS)

    async def _adopt(self, directory: str, held: streams.Streams) -> None:
        try:
            status, texts = await self._details(held.container)
        except errors.NotFoundError:
            # Its containerd takes the directory away when it starts; one that doesn't know it has no say.
            return
        try:
            held.take_up_the_rest(directory)
        except OSError as error:
            # Its output is read in any case: nothing else keeps it from waiting for ever.
            _log.warning("container %s gets no input: %s", held.container, error)
        log_path = asyncio.get_running_loop().create_future()
        log_path.set_result(status.log_path)
        self._serve(held, log_path)
        config = cri.container_config(texts)
        if config.get("stdin_once") and not config.get("tty"):
            # Whoever gave it is gone.
            await held.end_input()
        if status.state == cri_pb2.CONTAINER_EXITED:
            # CRI says so, so its log must be complete when the node is ready.
            await asyncio.wait({held.ended})

    async def _details(self, container: str) -> tuple[cri_pb2.ContainerStatus, Mapping[str, str]]:
        while True:
            try:
                return await self._runtime.container_details(container)
            except errors.NotFoundError:
                raise
            except errors.NixletError:
                await asyncio.sleep(endings.RETRY)

    def _adopted(self, task: "asyncio.Task[None]") -> None:
        held = self._adopting.pop(task)
        self._arrived(held.container)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.warning("the streams of container %s can't be taken up: %s", held.container, error)
        if held.container not in self._held:
            held.close()

    def _arrived(self, container: str) -> None:
        if coming := self._coming.pop(container, None):
            coming.set()

    async def close(self) -> None:
        """Leave them alone; a next node goes on."""
        for _, held in self._found:
            held.close()
            self._arrived(held.container)
        adopting = list(self._adopting)
        for task in adopting:
            task.cancel()
        await asyncio.gather(*adopting, return_exceptions=True)
        ended = [each.ended for each in self._held.values()]
        for serving in ended:
            serving.cancel()
        await asyncio.gather(*ended, return_exceptions=True)
        self._peeker.close()
        self._threads.shutdown(wait=False)

    def _pipes(self, container: str, ending: str) -> Iterator[tuple[str, str]]:
        """The directories of pipes and the pipes' names there."""
        pattern = os.path.join(_PIPES.format(container=container), f"{container}-{ending}")
        for path in glob.iglob(os.path.join(glob.escape(self._state_dir), pattern)):
            yield os.path.split(path)

    def _new(self, container: str) -> streams.Streams:
        async def close_stdin() -> None:
            # Nobody would say it again, and the container may wait for it.
            while True:
                try:
                    await self._tasks.close_stdin(container)
                except errors.NixletError:
                    await asyncio.sleep(endings.RETRY)
                else:
                    return

        return streams.Streams(container, self._peeker, self._threads, close_stdin)

    def _serve(self, held: streams.Streams, log_path: "asyncio.Future[str]") -> None:
        async def serve() -> int:
            code = await held.serve(self._process_ended(held), await log_path)
            held.forget()
            if code is None:
                code = (await endings.wait(self._runtime, self._containerd, held.container, patient=True)).exit_code
            return code

        def done(task: "asyncio.Task[int]") -> None:
            # Not at the end of the coroutine: one that is cancelled at once never begins.
            log_path.cancel()
            del self._held[held.container]
            held.close()
            if not task.cancelled() and (error := task.exception()) is not None:
                _log.warning("the streams of container %s are given up: %s", held.container, error)

        self._held[held.container] = held
        self._arrived(held.container)
        held.ended = asyncio.create_task(serve(), name=f"streams of {held.container}")
        held.ended.add_done_callback(done)

    async def _log_path(self, container: str) -> str:
        while True:
            try:
                return (await self._runtime.container_status(container)).log_path
            except errors.NotFoundError:
                return ""
            except errors.NixletError:
                # containerd is being started again.
                await asyncio.sleep(endings.RETRY)

    async def _process_ended(self, held: streams.Streams) -> int | None:
        """Wait for the end of a container's process; its exit status, None where containerd has forgotten it."""
        while True:
            try:
                code = await self._containerd.wait_task(held.container)
            except errors.NotFoundError:
                code = None
            except errors.NixletError:
                await asyncio.sleep(endings.RETRY)
                continue
            held.hurry()
            return code
