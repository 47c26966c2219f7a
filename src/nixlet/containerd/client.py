"""containerd's API, as far as loading images and watching containers needs it; see https://pkg.go.dev/github.com/containerd/containerd/api."""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Mapping, Sequence

from google.protobuf import any_pb2, empty_pb2, field_mask_pb2
from grpclib import client
from grpclib.exceptions import GRPCError, StreamTerminatedError

from nixlet import errors
from nixlet.containerd import namespaces
from nixlet.rpc import channel as channels
from nixlet.rpc.gen import (
    containerd_containers_grpc,
    containerd_containers_pb2,
    containerd_events_grpc,
    containerd_events_pb2,
    containerd_introspection_grpc,
    containerd_introspection_pb2,
    containerd_tasks_grpc,
    containerd_tasks_pb2,
    containerd_version_grpc,
)

_Envelopes = client.Stream[containerd_events_pb2.SubscribeRequest, containerd_events_pb2.Envelope]


class Containerd:
    """A containerd, seen from one of its namespaces."""

    def __init__(self, channel: channels.Channel, address: str, namespace: str = namespaces.CRI) -> None:
        self._peer = f"containerd at {address}"
        self._channel = channel
        self._known_release: tuple[int, tuple[int, int]] | None = None
        self.namespace = namespace
        self._metadata = {"containerd-namespace": namespace}
        self._introspection = containerd_introspection_grpc.IntrospectionStub(channel)
        self._version = containerd_version_grpc.VersionStub(channel)
        self._tasks = containerd_tasks_grpc.TasksStub(channel)
        self._containers = containerd_containers_grpc.ContainersStub(channel)
        self._events = containerd_events_grpc.EventsStub(channel)

    def _translated(self) -> contextlib.AbstractContextManager[None]:
        return channels.translated(self._peer)

    async def version(self) -> str:
        """What version it says it is; also the question whether it answers."""
        with self._translated():
            return (await self._version.Version(empty_pb2.Empty(), timeout=10)).version

    async def identity(self) -> str:
        """What it calls itself, which it keeps with its data: another containerd has another name, also at the same address."""
        with self._translated():
            return (await self._introspection.Server(empty_pb2.Empty(), timeout=10)).uuid

    async def plugin_failure(self, kind: str, name: str) -> str:
        """Why a plugin ("io.containerd.grpc.v1", "cri") does not work; empty where it does, or is not there."""
        with self._translated():
            request = containerd_introspection_pb2.PluginsRequest(filters=[f"type=={kind},id=={name}"])
            answer = await self._introspection.Plugins(request, timeout=10)
        return next((plugin.init_err.message for plugin in answer.plugins), "")

    async def release(self) -> tuple[int, int]:
        """The first two numbers of its version; (0, 0) for one that has none. Asked once over each connection."""
        connection = self._channel.connections
        if self._known_release is not None and self._known_release[0] == connection:
            return self._known_release[1]
        numbers = re.match(r"v?(\d+)\.(\d+)", await self.version())
        found = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
        if connection == self._channel.connections:
            self._known_release = connection, found
        return found

    async def check_mount_targets(self) -> None:
        """Check that it can make mounts below a snapshot's root: containerd 1.6 drops the targets of mounts.

        Raises:
            UnsupportedError: It can't; all mounts would land on the root itself.
        """
        if await self.release() < (1, 7):
            raise errors.UnsupportedError(
                f"{self._peer} is version {await self.version()}, which can't bind store paths into containers",
                hint="use containerd 1.7 or later, or the strategy view",
            )

    # Containers and tasks.

    async def container(self, name: str) -> containerd_containers_pb2.Container | None:
        """A container's record, or None."""
        try:
            with self._translated():
                request = containerd_containers_pb2.GetContainerRequest(id=name)
                return (await self._containers.Get(request, metadata=self._metadata)).container
        except errors.NotFoundError:
            return None

    async def containers(self, labels: Mapping[str, str]) -> Sequence[containerd_containers_pb2.Container]:
        """The records of the containers that have all of the labels."""
        wanted = ",".join(f'labels."{name}"=={json.dumps(value)}' for name, value in labels.items())
        with self._translated():
            request = containerd_containers_pb2.ListContainersRequest(filters=[wanted])
            return (await self._containers.List(request, metadata=self._metadata)).containers

    async def replace_spec(self, container: str, spec: any_pb2.Any) -> None:
        """Change what a container's process will be started by; nothing else of its record.

        Raises:
            NotFoundError: There is no such container.
        """
        request = containerd_containers_pb2.UpdateContainerRequest(
            container=containerd_containers_pb2.Container(id=container, spec=spec),
            update_mask=field_mask_pb2.FieldMask(paths=["spec"]),
        )
        with self._translated():
            await self._containers.Update(request, metadata=self._metadata)

    @contextlib.asynccontextmanager
    async def exits(self, container: str) -> AsyncIterator["Exits"]:
        """Watch for the end of a container's first process, for the time of the context."""
        stream = self._events.Subscribe.open(metadata=self._metadata)
        async with contextlib.AsyncExitStack() as stack:
            with self._translated():
                await stack.enter_async_context(stream)
                request = containerd_events_pb2.SubscribeRequest(filters=['topic=="/tasks/exit"'])
                await stream.send_message(request, end=True)
            try:
                yield Exits(stream, container)
            finally:
                # It would go on for ever.
                await channels.hang_up(stream)

    async def wait_task(self, container: str) -> int:
        """Wait until a container's process ends; its exit status.

        Raises:
            NotFoundError: It has no process, for example since it was ended and taken away before.
        """
        with self._translated():
            request = containerd_tasks_pb2.WaitRequest(container_id=container)
            return (await self._tasks.Wait(request, metadata=self._metadata)).exit_status


class Exits:
    """The news of processes' ends; ``Containerd.exits`` makes it."""

    def __init__(self, stream: _Envelopes, container: str) -> None:
        self._stream = stream
        self._container = container

    async def status(self, seconds: float) -> int | None:
        """The exit status of the container's first process; None if nothing is heard of its end for so long."""
        with contextlib.suppress(TimeoutError, OSError, StreamTerminatedError, GRPCError):
            async with asyncio.timeout(seconds):
                async for envelope in self._stream:
                    event = containerd_events_pb2.TaskExit.FromString(envelope.event.value)
                    if event.container_id == self._container and event.id in {"", self._container}:
                        return event.exit_status
        return None
