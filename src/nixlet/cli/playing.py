"""Pods that the node plays for us: begun, shown, and given up when the person doesn't want them any more."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping

from grpclib import client
from grpclib.exceptions import StreamTerminatedError

from nixlet import errors
from nixlet.containers import model, stdio
from nixlet.pods import player
from nixlet.rpc import channel as channels
from nixlet.rpc.gen import node_grpc, node_pb2

_Stream = client.Stream[node_pb2.PlayPodRequest, node_pb2.PlayPodEvent]


#: The errors that a node tells by name, besides those that a status can tell.
_KINDS: dict[str, type[errors.NixletError]] = {
    kind.__name__: kind
    for kind in (
        errors.AlreadyExistsError,
        errors.CallCancelledError,
        errors.CommandNotFoundError,
        errors.FailedPreconditionError,
        errors.InvalidArgumentError,
        errors.NotExecutableError,
        errors.NotFoundError,
        errors.UnavailableError,
        errors.UnsupportedError,
    )
}


class Played:
    """A pod that runs.

    Attributes:
        running: What runs.
        ended: The container that was in front of us has ended, and the node does all that is left to do.
    """

    def __init__(self, stream: _Stream, running: player.RunningPod) -> None:
        self._stream = stream
        self.running = running
        self.ended = False

    async def serve(self, sink: stdio.Sink, stdin: AsyncIterator[bytes] | None) -> int:
        """Hand output and input on until the container has ended; its exit status.

        Raises:
            UnavailableError: The node ended before; the container goes on.
        """
        feeding = None if stdin is None else asyncio.create_task(self._feed(stdin), name="stdin")
        try:
            async for event in self._stream:
                if event.HasField("ended"):
                    self.ended = True
                    return event.ended.exit_code
                await sink(event.output.stream, event.output.data)
        except StreamTerminatedError:
            pass
        finally:
            if feeding is not None:
                feeding.cancel()
                await asyncio.gather(feeding, return_exceptions=True)
        name = self.running.pod.name
        # Nothing is to be done about it by us.
        self.ended = True
        raise errors.UnavailableError(
            f"the node ended while container {name} was in front of you; it goes on", hint=f"see nixlet logs {name}"
        )

    async def _feed(self, stdin: AsyncIterator[bytes]) -> None:
        async for data in stdin:
            await self._stream.send_message(node_pb2.PlayPodRequest(input=data))
        await self._stream.send_message(node_pb2.PlayPodRequest(input_ended=True))


@contextlib.asynccontextmanager
async def played(
    stub: node_grpc.NodeStub, peer: str, pod: model.Pod, images: Mapping[str, str], *, foreground: bool = False
) -> AsyncIterator[Played]:
    """Have a pod played by the node; when this is cancelled before it runs, nothing of it stays.

    Args:
        stub: The node.
        peer: What it is called.
        pod: The pod.
        images: What its containers are made from, by the references that it names.
        foreground: Its only container's streams are to be served as long as the context lasts.

    Raises:
        NixletError: It does not run, and nothing of it stays.
    """
    import msgspec

    request = node_pb2.PlayPodRequest(pod=msgspec.json.encode(pod), images=images, foreground=foreground)
    async with contextlib.AsyncExitStack() as stack:
        with channels.translated(peer):
            stream = await stack.enter_async_context(stub.PlayPod.open())
            stack.push_async_callback(channels.hang_up, stream)
            await stream.send_message(request)
            event = await _answer(stub, stream)
        if event is None:
            raise errors.UnavailableError(f"{peer} ended before pod {pod.name} was there")
        if event.HasField("failed"):
            raise _error(event.failed)
        containers = [
            player.RunningContainer(
                each.name, each.id, each.log_path, each.exit_code if each.HasField("exit_code") else None
            )
            for each in event.started.containers
        ]
        yield Played(stream, player.RunningPod(pod, event.started.pod_sandbox_id, tuple(containers)))


async def _answer(stub: node_grpc.NodeStub, stream: _Stream) -> node_pb2.PlayPodEvent | None:
    """The first event; who doesn't want to wait for it waits until all is undone."""
    receiving = asyncio.create_task(stream.recv_message(), name="play")
    try:
        return await asyncio.shield(receiving)
    except asyncio.CancelledError:
        await stream.send_message(node_pb2.PlayPodRequest(cancelled=True))
        event = await receiving
        if event is not None and event.HasField("started"):
            await stub.RemovePod(node_pb2.RemovePodRequest(pod_sandbox_id=event.started.pod_sandbox_id))
        raise


def _error(failed: node_pb2.PlayPodEvent.Failed) -> errors.NixletError:
    if failed.kind == errors.CommandFailedError.__name__:
        return errors.CommandFailedError(failed.message, returncode=1, output=failed.output, hint=failed.hint)
    return _KINDS.get(failed.kind, errors.NixletError)(failed.message, hint=failed.hint)
