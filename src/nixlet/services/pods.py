"""Playing, stopping and removing pods for clients: what was asked for goes on in tasks of the node's own, whatever becomes of the client."""

import asyncio
from collections.abc import AsyncIterator

import msgspec

from nixlet import errors
from nixlet.containerd import cri
from nixlet.containers import foreground, model
from nixlet.pods import lifecycle, player
from nixlet.rpc import server
from nixlet.rpc.gen import cri_pb2
from nixlet.rpc.gen import node_pb2 as pb

#: Pieces of input that a client may be ahead of its container.
_AHEAD = 16


class Pods:
    """Plays pods for gRPC's clients."""

    def __init__(self, pods: lifecycle.Pods, images: cri.ImageClient) -> None:
        self._pods = pods
        self._images = images

    async def play(self, stream: server.Stream[pb.PlayPodRequest, pb.PlayPodEvent]) -> None:
        """Serve the call of a client that plays a pod."""
        call = _Call(stream, await server.request(stream))

        async def obtain(container: model.Container) -> cri_pb2.Image:
            image = await self._images.status(call.images[container.image])
            if image is None:
                raise errors.NotFoundError(f"the image {container.image} is gone")
            return image

        front = lifecycle.Front(None)
        if call.in_front:
            front = lifecycle.Front(call.listener, call.input() if call.pod.containers[0].stdin else None)
        await call.serve(self._pods.play(call.pod, obtain, call.given_up, front=front))


class _Call:
    """One client's call, and what is done for it.

    Attributes:
        pod: The pod.
        images: What its containers are made from.
        in_front: The client wants its only container's output.
        given_up: Nobody wants it any more.
        listener: Takes the output.
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

    async def serve(self, playing: "asyncio.Task[lifecycle.Played]") -> None:
        """Serve it until the pod has started or, in the foreground, ended."""
        receiving = asyncio.create_task(self._receive(), name="receive")
        try:
            try:
                played = await asyncio.shield(playing)
            except errors.NixletError as error:
                await self._stream.send_message(pb.PlayPodEvent(failed=_failed(error)))
                return
            await self._stream.send_message(pb.PlayPodEvent(started=_started(played.running)))
            for serving in played.serving.values():
                await self._show(played, serving)
        finally:
            # The client has its answer, or is gone. What has started goes on without it.
            self.given_up.set()
            self.listener.leave()
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)

    async def _show(self, played: lifecycle.Played, serving: "asyncio.Task[int]") -> None:
        running = played.running
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
        if self.pod.remove_when_ended:
            # Afterwards nothing of it is there.
            await asyncio.wait({played.ended})
        await self._stream.send_message(pb.PlayPodEvent(ended=pb.PlayPodEvent.Ended(exit_code=code)))


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
