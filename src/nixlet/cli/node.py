"""How verbs reach a running node."""

import asyncio
import contextlib
import dataclasses
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable

from nixlet import errors
from nixlet.cli import playing, progress
from nixlet.containerd import client, cri, tasks
from nixlet.containers import endings, logrecords, logs, model, users
from nixlet.node import config
from nixlet.pods import player
from nixlet.rpc import channel as channels
from nixlet.rpc import status
from nixlet.rpc.gen import cri_pb2, node_grpc, node_pb2
from nixlet.telemetry import progress as steps

#: Seconds that a verb may take before it is looked who is waited for, and seconds in which everybody answers who can.
_PATIENCE = 3.0
_ANSWER = 2.0


class Node:
    """A running node: its services, and what it says of itself."""

    def __init__(
        self, containerd_channel: channels.Channel, own_channel: channels.Channel, layout: config.Layout
    ) -> None:
        address = layout.containerd_socket
        self._containerd_channel, self._address = containerd_channel, address
        self.runtime = cri.RuntimeClient(containerd_channel, address)
        self.containerd = client.Containerd(containerd_channel, address)
        self.tasks = tasks.Tasks(containerd_channel, address)
        self.images = cri.ImageClient(own_channel, layout.node_socket)
        self.layout = layout
        self._stub = node_grpc.NodeStub(own_channel)
        self._peer = f"the node at {layout.node_socket}"
        #: The last event of each pull, by reference.
        self.pulled: dict[str, node_pb2.PullEvent] = {}

    async def status(self) -> node_pb2.StatusResponse:
        """What the node says of itself."""
        with channels.translated(self._peer):
            return await self._stub.Status(node_pb2.StatusRequest(), timeout=10)

    async def release_pod(self, sandbox: str) -> None:
        """Let the node give back what a pod holds whose containers have ended; it goes on with that by itself."""
        with channels.translated(self._peer):
            await self._stub.ReleasePod(node_pb2.ReleasePodRequest(pod_sandbox_id=sandbox), timeout=10)

    async def stop_pod(self, sandbox: str, container: str, *, grace: int = -1) -> None:
        """End a pod's container; the node goes on with that when we are gone.

        Args:
            sandbox: The pod.
            container: The container; empty: the pod has none, and only gives back what it holds.
            grace: Seconds for it to end by itself; 0: at once; below 0: as many as the pod itself says.

        Raises:
            NotFoundError: There is no such pod.
        """
        request = node_pb2.StopPodRequest(pod_sandbox_id=sandbox, container_id=container, grace_seconds=grace)
        with channels.translated(self._peer):
            await self._stub.StopPod(request)

    async def remove_pod(self, sandbox: str, *, grace: int = 0) -> None:
        """Stop and remove a pod with all that is its; the node goes on with that when we are gone.

        Args:
            sandbox: The pod.
            grace: Seconds for its containers to end by themselves; 0: at once; below 0: as many as the pod itself says.

        Raises:
            NotFoundError: There is no such pod.
        """
        with channels.translated(self._peer):
            await self._stub.RemovePod(node_pb2.RemovePodRequest(pod_sandbox_id=sandbox, grace_seconds=grace))

    @contextlib.asynccontextmanager
    async def played(self, pod: model.Pod, *, foreground: bool = False) -> AsyncIterator[playing.Played]:
        """A pod, with its images pulled first; see ``playing.played``."""
        if await player.find(self.runtime, pod.name, pod.namespace):
            raise errors.AlreadyExistsError(
                f"there is a pod {pod.name} already", hint="remove it (nixlet kube down) or use --replace"
            )
        # Before anything is made: a pod without its images would only have to be taken down again.
        images = {each.image: await self._image(each) for each in (*pod.init_containers, *pod.containers)}
        wanted = dataclasses.replace(
            pod,
            init_containers=tuple(users.resolved(pod, each, images[each.image]) for each in pod.init_containers),
            containers=tuple(users.resolved(pod, each, images[each.image]) for each in pod.containers),
        )
        ids = {reference: image.id for reference, image in images.items()}
        async with playing.played(self._stub, self._peer, wanted, ids, foreground=foreground) as played:
            yield played

    async def _image(self, container: model.Container) -> cri_pb2.Image:
        if container.pull_policy != "Always":
            image = await self.images.status(container.image)
            if image is not None:
                return image
            if container.pull_policy == "Never":
                raise errors.NotFoundError(
                    f"the image {container.image} is not here, and imagePullPolicy is Never",
                    hint="pull or load it before",
                )
        image = await self.images.status(await self.pull(container.image))
        if image is None:
            raise errors.NotFoundError(f"the image {container.image} was pulled, and removed at once by somebody")
        return image

    async def wait(self, container: str) -> int:
        """Wait until a container has ended; its exit status.

        Raises:
            NotFoundError: There is no such container (any more).
            UnavailableError: The node has ended. As long as it runs, a containerd that is away is waited for.
        """
        while True:
            try:
                return (await endings.wait(self.runtime, self.containerd, container)).exit_code
            except errors.NotFoundError:
                raise
            except errors.NixletError:
                await self.status()
                await asyncio.sleep(endings.RETRY)

    async def output(self, container: str, log_path: str) -> AsyncIterator[logrecords.Record]:
        """A container's output until it ends."""
        waiting = asyncio.create_task(self.wait(container), name="end")
        try:
            with logs.at(log_path) as log:
                for found in logs.follow(log, waiting.done):
                    if isinstance(found, float):
                        await asyncio.sleep(found)
                    else:
                        for record in logrecords.parse(found):
                            yield record
            # Who can't be asked any more didn't say that it has ended.
            with contextlib.suppress(errors.NotFoundError):
                await waiting
        finally:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)

    async def mounts_of(self, container: str) -> int:
        """How many mounts make a container's root file system."""
        from nixlet.containerd import imagestore

        record = await self.containerd.container(container)
        if record is None:
            raise errors.NotFoundError(f"container {container} does not exist")
        store = imagestore.ImageStore(self._containerd_channel, self._address)
        return len(await store.snapshot_mounts(record.snapshotter, record.snapshot_key))

    async def pull(self, reference: str) -> str:
        """Pull an image through CRI, showing the progress that the node tells; what containers are made from."""
        with progress.shown(f"pulling {reference.rpartition('/')[2]}") as sink:
            async with self._watched(reference, sink) as last_event:
                try:
                    return await self.images.pull(reference)
                except errors.NotFoundError as error:
                    # CRI's callers learn little of the node's files; who may watch its pulls learns all.
                    event = await last_event()
                    if event is None or not event.error:
                        raise
                    message, hint = status.parted(event.error)
                    raise errors.NotFoundError(message, hint=hint) from error

    @contextlib.asynccontextmanager
    async def _watched(
        self, reference: str, sink: steps.ProgressSink
    ) -> AsyncIterator[Callable[[], Awaitable[node_pb2.PullEvent | None]]]:
        with channels.translated(self._peer):
            async with self._stub.WatchPulls.open() as stream:
                await stream.send_message(node_pb2.WatchPullsRequest(reference=reference), end=True)
                await stream.recv_initial_metadata()

                async def watch() -> None:
                    async for event in stream:
                        if event.finished:
                            self.pulled[reference] = event
                            return
                        sink(steps.Progress(event.stage, event.done, event.total, event.unit, event.detail))  # type: ignore[arg-type]  # the wire has the unit as any string

                async def last_event() -> node_pb2.PullEvent | None:
                    if reference.startswith("nix:0"):
                        # It is published before CRI answers, so it is on its way.
                        with contextlib.suppress(TimeoutError):
                            await asyncio.wait_for(watching, 2)
                    return self.pulled.get(reference)

                watching = asyncio.create_task(watch())
                try:
                    yield last_event
                    await last_event()
                finally:
                    watching.cancel()
                    await asyncio.gather(watching, return_exceptions=True)
                    await channels.hang_up(stream)


@contextlib.asynccontextmanager
async def connected(state_dir: str) -> AsyncIterator[Node]:
    """A node by its state directory.

    Raises:
        UnavailableError: None runs there.
    """
    layout = config.Layout("", os.path.abspath(state_dir))
    if not os.path.exists(layout.node_socket):
        raise errors.UnavailableError(
            f"no node runs at {layout.state_dir}", hint="start one (nixlet server) or say where it is: --state-dir"
        )
    async with channels.connect(layout.containerd_socket) as first, channels.connect(layout.node_socket) as second:
        node = Node(first, second, layout)
        telling = asyncio.create_task(_tell_who_is_waited_for(node), name="who is waited for")
        try:
            yield node
        finally:
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)


async def _tell_who_is_waited_for(node: Node) -> None:
    """Tell a person whose verb takes long who doesn't answer, if somebody doesn't."""
    await asyncio.sleep(_PATIENCE)
    answers = {
        f"containerd at {node.layout.containerd_socket}": node.runtime.version,
        f"the node at {node.layout.node_socket}": node.status,
    }
    for who, ask in answers.items():
        try:
            async with asyncio.timeout(_ANSWER):
                await ask()
        except TimeoutError:
            print(f"waiting for {who}, which does not answer", file=sys.stderr)
        except errors.NixletError:
            # The verb itself learns of that.
            pass


def image_reference(text: str) -> str:
    """An image as a person names it: a path stands for the archive there, also through links such as nix-build's ``result``."""
    if text.startswith(("/", "./", "../")) or text == "result":
        return f"nix:0{os.path.realpath(text)}"
    return text
