"""The pods of a node from being asked for to their end: all that is done for them is done in tasks of the node's own."""

import asyncio
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping

from nixlet import errors
from nixlet.containerd import cri, tasks
from nixlet.containers import clients, endings, keeping, model
from nixlet.host import signals
from nixlet.pods import ended, player, removal, undoing
from nixlet.rpc.gen import cri_pb2


@dataclasses.dataclass(frozen=True, slots=True)
class Played:
    """A pod that was started.

    Attributes:
        running: What runs.
        serving: By container, what serves its streams, and gives its exit status.
        ended: Waits for the pod's end, and gives back what it holds, or removes it.
    """

    running: player.RunningPod
    serving: Mapping[str, asyncio.Task[int]]
    ended: asyncio.Task[None]


class Pods:
    """The pods of one node."""

    def __init__(
        self,
        runtime: cri.RuntimeClient,
        plays: player.Player,
        undoings: undoing.Undoings,
        removals: removal.Removals,
        watcher: ended.Watcher,
        keeper: keeping.Keeper,
        processes: tasks.Tasks,
    ) -> None:
        """None yet.

        Args:
            runtime: The CRI.
            plays: Starts pods.
            undoings: Takes back what doesn't start.
            removals: Takes pods away.
            watcher: Waits for their ends.
            keeper: Keeps containers' streams.
            processes: containerd's tasks.
        """
        self._runtime = runtime
        self._player = plays
        self._undoings = undoings
        self._removals = removals
        self._watcher = watcher
        self._keeper = keeper
        self._processes = processes
        self._playing: dict[asyncio.Task[Played], asyncio.Event] = {}
        self._recovered = asyncio.Event()

    async def recover(self) -> None:
        """Go on with what an earlier node began. Until then no pod is played: it would be taken for one of the earlier node's."""
        await self._undoings.recover()
        await self._keeper.adopt()
        await self._watcher.adopt()
        self._recovered.set()

    async def close(self, ending: signals.Ending) -> None:
        """End what goes on by itself, in a limited time; a next node goes on with it."""
        for given_up in self._playing.values():
            given_up.set()
        await ending.wait(set(self._playing))
        await self._watcher.close()
        await self._keeper.close()
        await self._undoings.close(ending)
        await self._removals.close(ending)

    def play(
        self,
        pod: model.Pod,
        obtain: player.Obtain,
        given_up: asyncio.Event,
        *,
        listeners: Mapping[str, clients.Client] | None = None,
        size: tuple[int, int] = (0, 0),
    ) -> "asyncio.Task[Played]":
        """Start a pod, in a task that needs not be waited for; see ``player.Player.play``.

        Args:
            pod: The pod.
            obtain: Has a container's image ready.
            given_up: Set when nobody wants the pod any more.
            listeners: Who has the streams of which of its containers, by name.
            size: The columns and rows of the terminal of its only container, where that has one.
        """
        playing = self._play(pod, obtain, given_up, listeners or {}, size)
        task = asyncio.create_task(playing, name=f"play {pod.name}")
        self._playing[task] = given_up
        task.add_done_callback(self._played)
        return task

    def _played(self, task: "asyncio.Task[Played]") -> None:
        self._playing.pop(task)
        if not task.cancelled():
            # Whoever asked may be gone.
            task.exception()

    async def _play(
        self,
        pod: model.Pod,
        obtain: player.Obtain,
        given_up: asyncio.Event,
        listeners: Mapping[str, clients.Client],
        size: tuple[int, int],
    ) -> Played:
        await player.unless(given_up, self._recovered.wait(), pod)

        serving = {}

        @contextlib.contextmanager
        def started(container_id: str, container: model.Container) -> Iterator[None]:
            stdin_ends = container.stdin_once and not container.tty
            with self._keeper.started(container_id, listeners.get(container.name), stdin_ends=stdin_ends):
                yield
            kept = self._keeper.find(container_id)
            assert kept is not None
            serving[container_id] = kept.ended

        running = await self._player.play(pod, obtain, given_up, started)
        # From here on it is looked after, whatever fails.
        ended = self._watcher.wait_for(running.sandbox)
        if all(size) and pod.containers[0].tty:
            # One that has ended has no size.
            with contextlib.suppress(errors.NixletError):
                await self._processes.resize(running.containers[0].id, *size)
        return Played(running, serving, ended)

    async def wait_until_said(self, container: str) -> None:
        """As ``endings.wait_until_said``."""
        await endings.wait_until_said(self._runtime, container)

    def release(self, sandbox: str) -> None:
        """End a pod's containers and give back what it holds; it goes on by itself."""
        self._removals.begin_release(sandbox)

    async def remove(self, sandbox: str, grace: int) -> None:
        """Remove a pod.

        Raises:
            NotFoundError: There is none.
            NixletError: The runtime can't; the pod stays, and can be removed later.
        """
        await self._removals.remove(await self._sandbox(sandbox), grace=grace)

    async def leave(self, sandbox: str) -> None:
        """Begin to remove a pod that goes when it has ended: nobody sees it any more, and its name can be had again.

        Raises:
            NixletError: The runtime can't; it is tried again.
        """
        # It goes by itself when it has ended.
        with contextlib.suppress(errors.NotFoundError):
            await self._removals.leave(await self._sandbox(sandbox))

    async def named(self, name: str, namespace: str) -> list[cri_pb2.PodSandbox]:
        """The pods of a name that nixlet made."""
        return list(await player.find(self._runtime, name, namespace))

    async def _sandbox(self, wanted: str) -> cri_pb2.PodSandbox:
        for found in await self._runtime.sandboxes():
            if found.id == wanted:
                return found
        raise errors.NotFoundError(f"there is no pod {wanted}")
