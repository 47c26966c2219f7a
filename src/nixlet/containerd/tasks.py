"""The processes of containers, over containerd's Tasks service: signals, terminals, and further processes beside the first.

CRI has an Exec of its own, but it can't pass on a signal, nor say that standard input has ended to every containerd; this can, in all
versions. A process's streams are named pipes that the shim opens, so client and containerd must share a file system.
"""

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf import any_pb2

from nixlet import errors
from nixlet.containerd import namespaces
from nixlet.rpc import channel as channels
from nixlet.rpc.gen import containerd_tasks_grpc
from nixlet.rpc.gen import containerd_tasks_pb2 as pb

#: How containerd names a process of the OCI runtime specification in an Any.
_PROCESS_TYPE = "types.containerd.io/opencontainers/runtime-spec/1/Process"


@dataclasses.dataclass(frozen=True, slots=True)
class Streams:
    """The named pipes of a process; an empty path is a stream that it has not (a terminal has no ``stderr``)."""

    stdin: str = ""
    stdout: str = ""
    stderr: str = ""


class Tasks:
    """The processes of one containerd's containers, in one of its namespaces."""

    def __init__(self, channel: channels.Channel, address: str, namespace: str = namespaces.CRI) -> None:
        self._peer = f"containerd at {address}"
        self._metadata = {"containerd-namespace": namespace}
        self._stub = containerd_tasks_grpc.TasksStub(channel)

    async def pid(self, container: str) -> int:
        """The process number, on the host, of a container's first process.

        Raises:
            NotFoundError: It has none.
        """
        with channels.translated(self._peer):
            request = pb.GetRequest(container_id=container)
            return (await self._stub.Get(request, metadata=self._metadata)).process.pid

    async def pids(self, container: str) -> Sequence[int]:
        """The process numbers of all of a container's processes."""
        with channels.translated(self._peer):
            answer = await self._stub.ListPids(pb.ListPidsRequest(container_id=container), metadata=self._metadata)
        return [each.pid for each in answer.processes]

    async def kill(self, container: str, number: int, *, process: str = "") -> None:
        """Send a signal to a container's first process, or to one that was added.

        Raises:
            NotFoundError: It has ended.
        """
        with channels.translated(self._peer):
            request = pb.KillRequest(container_id=container, exec_id=process, signal=number)
            await self._stub.Kill(request, metadata=self._metadata)

    async def add(self, container: str, process: str, spec: Mapping[str, Any], streams: Streams) -> None:
        """Add a process to a running container; it doesn't run yet.

        Args:
            container: The container.
            process: What the process is to be called.
            spec: The process as the OCI runtime specification has it ("process" of config.md).
            streams: Its named pipes.
        """
        value = any_pb2.Any(type_url=_PROCESS_TYPE, value=json.dumps(spec).encode())
        with channels.translated(self._peer):
            request = pb.ExecProcessRequest(
                container_id=container,
                exec_id=process,
                terminal=bool(spec.get("terminal")),
                spec=value,
                **dataclasses.asdict(streams),
            )
            await self._stub.Exec(request, metadata=self._metadata)

    async def start(self, container: str, process: str) -> None:
        """Start a process that was added."""
        with channels.translated(self._peer):
            request = pb.StartRequest(container_id=container, exec_id=process)
            await self._stub.Start(request, metadata=self._metadata)

    async def wait(self, container: str, process: str) -> int:
        """Wait until a process that was added has ended; its exit status."""
        with channels.translated(self._peer):
            request = pb.WaitRequest(container_id=container, exec_id=process)
            return (await self._stub.Wait(request, metadata=self._metadata)).exit_status

    async def close_stdin(self, container: str, process: str = "") -> None:
        """Let a process (by default the first one) see the end of its standard input, once all writers of the pipe are gone."""
        # One that has ended needs none.
        with contextlib.suppress(errors.NotFoundError), channels.translated(self._peer):
            request = pb.CloseIORequest(container_id=container, exec_id=process, stdin=True)
            await self._stub.CloseIO(request, metadata=self._metadata)

    async def resize(self, container: str, columns: int, rows: int, *, process: str = "") -> None:
        """Tell the size of a process's terminal."""
        with channels.translated(self._peer):
            request = pb.ResizePtyRequest(container_id=container, exec_id=process, width=columns, height=rows)
            await self._stub.ResizePty(request, metadata=self._metadata)

    async def remove(self, container: str, process: str) -> None:
        """Forget a process that was added and has ended, or never started."""
        with contextlib.suppress(errors.NotFoundError), channels.translated(self._peer):
            request = pb.DeleteProcessRequest(container_id=container, exec_id=process)
            await self._stub.DeleteProcess(request, metadata=self._metadata)
