"""Playing, stopping and removing pods for clients: what was asked for goes on in tasks of the node's own, whatever becomes of the client."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence

import msgspec

from nixlet import errors
from nixlet.containerd import client, cri, tasks
from nixlet.containers import foreground, model
from nixlet.host import signals
from nixlet.pods import ended, player, removal
from nixlet.rpc import server
from nixlet.rpc.gen import cri_pb2
from nixlet.rpc.gen import node_pb2 as pb

#: Pieces of input that a client may be ahead of its container.
_AHEAD = 16

_log = logging.getLogger("nixlet.pods")


class Pods:
    """The pods of one node, as its clients play, stop and remove them."""

    def __init__(
        self,
        runtime: cri.RuntimeClient,
        containerd: client.Containerd,
        service: tasks.Tasks,
        plays: player.Player,
        removals: removal.Removals,
        state_dirs: Sequence[str],
    ) -> None:
        """None yet.

        Args:
            runtime: The CRI.
            containerd: The containerd behind it.
            service: Its tasks.
            plays: Runs pods there.
            removals: Takes them away.
            state_dirs: Where containerd's state may be.
        """
        self._runtime = runtime
        self._player = plays
        self._removals = removals
        self._watcher = ended.Watcher(runtime, containerd, removals)
        self._foregrounds = foreground.Foregrounds(containerd, service, runtime, state_dirs)
        self._playing: dict[asyncio.Task[player.RunningPod], asyncio.Event] = {}
        self._recovered = asyncio.Event()

    async def recover(self) -> None:
        """Go on with what an earlier node began. Until then no pod is played: it would be taken for one of the earlier node's."""
        await self._player.recover()
        await self._foregrounds.adopt()
        await self._watcher.adopt()
        self._recovered.set()

    async def close(self, ending: signals.Ending) -> None:
        """End what goes on by itself, in a limited time; a next node goes on with it."""
        for given_up in self._playing.values():
            given_up.set()
        await ending.wait(set(self._playing))
        await self._watcher.close()
        await self._foregrounds.close()
        await self._player.close(ending)
        await self._removals.close(ending)

    def release(self, sandbox: str) -> None:
        """End a pod's containers and give back what it holds; it goes on by itself."""

        def released(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                _log.warning("pod %s keeps its network: %s", sandbox, error)

        self._removals.release(sandbox).add_done_callback(released)

    async def stop(self, sandbox: str, container: str, grace: int) -> None:
        """End a pod's container, and give back what the pod holds when it has none that runs.

        Raises:
            NotFoundError: There is none.
            NixletError: The runtime can't.
        """
        await self._removals.stop(await self._sandbox(sandbox), container, grace)

    async def remove(self, sandbox: str, grace: int) -> None:
        """Remove a pod.

        Raises:
            NotFoundError: There is none.
            NixletError: The runtime can't; the pod stays, and can be removed later.
        """
        await self._removals.remove(await self._sandbox(sandbox), grace=grace)

    async def _sandbox(self, wanted: str) -> cri_pb2.PodSandbox:
        for found in await self._runtime.sandboxes():
            if found.id == wanted:
                return found
        raise errors.NotFoundError(f"there is no pod {wanted}")

    async def play(self, stream: server.Stream[pb.PlayPodRequest, pb.PlayPodEvent]) -> None:
        """Serve the call of a client that plays a pod."""
        await _Call(stream, await server.request(stream)).serve(self)

    def begin(self, call: "_Call") -> "asyncio.Task[player.RunningPod]":
        """Play a call's pod, in a task that is waited for at the end."""
        task = asyncio.create_task(self._play(call), name=f"play {call.pod.name}")
        self._playing[task] = call.given_up
        task.add_done_callback(self._played)
        return task

    def _played(self, task: "asyncio.Task[player.RunningPod]") -> None:
        self._playing.pop(task)
        if not task.cancelled():
            # Whoever asked may be gone.
            task.exception()

    async def _play(self, call: "_Call") -> player.RunningPod:
        await _either(self._recovered, call.given_up)
        if call.given_up.is_set():
            raise errors.CallCancelledError(f"pod {call.pod.name} is not wanted any more")
        if not call.in_front:
            running = await self._player.play(call.pod, call.images, call.given_up)
        else:
            with contextlib.ExitStack() as stack:
                front = self._foregrounds.new()
                stack.callback(front.close)
                running = await self._player.play(call.pod, call.images, call.given_up, front.interposed)
                stdin = call.input() if call.pod.containers[0].stdin else None
                call.serving = self._foregrounds.serve(front, call.listener, stdin)
                stack.pop_all()
        watching = self._watcher.wait_for(running.sandbox)
        if call.pod.remove_when_ended:
            call.removing = watching
        return running


class _Call:
    """One client's call, and what is done for it.

    Attributes:
        pod: The pod.
        images: What its containers are made from.
        in_front: The client wants its only container's output.
        given_up: Nobody wants it any more.
        listener: Takes the output.
        serving: Serves the container's streams.
        removing: Removes the pod when it has ended.
    """

    def __init__(self, stream: server.Stream[pb.PlayPodRequest, pb.PlayPodEvent], request: pb.PlayPodRequest) -> None:
        try:
            self.pod = msgspec.json.decode(request.pod, type=model.Pod)
        except msgspec.MsgspecError as error:
            raise errors.InvalidArgumentError(f"the pod is not well-formed: {error}") from error
        self._stream = stream
        self.images = dict(request.images)
        self.in_front = request.foreground
        if self.in_front and len(self.pod.containers) != 1:
            raise errors.InvalidArgumentError("only a pod of one container can be in the foreground")
        self.given_up = asyncio.Event()
        self.listener = foreground.Listener()
        self.serving: asyncio.Task[int] | None = None
        self.removing: asyncio.Task[None] | None = None
        self._input: asyncio.Queue[bytes] = asyncio.Queue(_AHEAD)
        self._input_ended = asyncio.Event()

    async def input(self) -> AsyncIterator[bytes]:
        """What the client sends for the container, until it ends that or is gone."""
        ended = asyncio.create_task(self._input_ended.wait(), name="end of input")
        try:
            while True:
                getting = asyncio.create_task(self._input.get(), name="input")
                await asyncio.wait({getting, ended}, return_when=asyncio.FIRST_COMPLETED)
                if getting.done():
                    yield getting.result()
                    continue
                getting.cancel()
                if self._input.empty():
                    return
                yield self._input.get_nowait()
        finally:
            ended.cancel()

    async def _receive(self) -> None:
        try:
            async for message in self._stream:
                if message.cancelled:
                    self.given_up.set()
                elif message.input_ended:
                    self._input_ended.set()
                else:
                    await self._input.put(message.input)
        finally:
            self._input_ended.set()

    async def serve(self, plays: Pods) -> None:
        """Serve it until the pod has started or, in the foreground, ended."""
        receiving = asyncio.create_task(self._receive(), name="receive")
        playing = plays.begin(self)
        try:
            try:
                running = await asyncio.shield(playing)
            except errors.NixletError as error:
                await self._stream.send_message(pb.PlayPodEvent(failed=_failed(error)))
                return
            await self._stream.send_message(pb.PlayPodEvent(started=_started(running)))
            if self.serving is not None:
                await self._show(running, self.serving)
        finally:
            # The client has its answer, or is gone. What has started goes on without it.
            self.given_up.set()
            self.listener.leave()
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)

    async def _show(self, running: player.RunningPod, serving: "asyncio.Task[int]") -> None:
        async for stream, data in self.listener.pieces():
            await self._stream.send_message(pb.PlayPodEvent(output=pb.PlayPodEvent.Output(stream=stream, data=data)))
        await asyncio.wait({serving})
        if serving.cancelled():
            raise errors.UnavailableError(
                f"the node ends; pod {running.pod.name} goes on", hint=f"see nixlet logs {running.pod.name}"
            )
        code = serving.result()
        if running.containers[0].exit_code is not None:
            code = running.containers[0].exit_code
        if self.removing is not None:
            # Afterwards nothing of it is there.
            await asyncio.wait({self.removing})
        await self._stream.send_message(pb.PlayPodEvent(ended=pb.PlayPodEvent.Ended(exit_code=code)))


async def _either(*events: asyncio.Event) -> None:
    """Wait until one of some events is set."""
    waiting = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


def _started(running: player.RunningPod) -> pb.PlayPodEvent.Started:
    return pb.PlayPodEvent.Started(
        pod_sandbox_id=running.sandbox,
        containers=[
            pb.PlayPodEvent.Container(name=each.name, id=each.id, log_path=each.log_path, exit_code=each.exit_code)
            for each in running.containers
        ],
    )


def _failed(error: errors.NixletError) -> pb.PlayPodEvent.Failed:
    output = error.output if isinstance(error, errors.CommandFailedError) else ""
    return pb.PlayPodEvent.Failed(message=error.message, hint=error.hint, output=output, kind=type(error).__name__)
