"""Further processes in containers, over the real protocol; the shim's part is played here."""

import asyncio
import json
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import any_pb2, empty_pb2
from grpclib import const

from nixlet.containerd import client as containerd_client
from nixlet.containerd import tasks
from nixlet.containers import clients, processes
from nixlet.host import unixsocket
from nixlet.rpc import channel as channels
from nixlet.rpc import server
from nixlet.rpc.gen import containerd_containers_pb2 as containers_pb2
from nixlet.rpc.gen import containerd_tasks_pb2 as tasks_pb2

SERVICE = "/containerd.services.tasks.v1.Tasks"


class Containerd:
    """A containerd whose every container runs, and has the processes that are added to it.

    Attributes:
        killed: The names of the processes that it was told to kill.
    """

    def __init__(self) -> None:
        self.killed: list[str] = []
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self._added: dict[str, tasks_pb2.ExecProcessRequest] = {}

    async def _get(self, stream: "server.Stream[Any, Any]") -> None:
        request = await server.request(stream)
        spec = any_pb2.Any(value=json.dumps({"process": {"env": []}}).encode())
        container = containers_pb2.Container(id=request.id, spec=spec)
        await stream.send_message(containers_pb2.GetContainerResponse(container=container))

    async def _exec(self, stream: "server.Stream[Any, Any]") -> None:
        request = await server.request(stream)
        self._added[request.exec_id] = request
        await stream.send_message(empty_pb2.Empty())

    async def _start(self, stream: "server.Stream[Any, Any]") -> None:
        name = (await server.request(stream)).exec_id
        added = self._added[name]
        with open(added.stdout, "wb") as output, open(added.stderr, "wb") as complaints:
            arguments = json.loads(added.spec.value)["args"]
            self.running[name] = subprocess.Popen(arguments, stdout=output, stderr=complaints)
        await stream.send_message(tasks_pb2.StartResponse())

    async def _wait(self, stream: "server.Stream[Any, Any]") -> None:
        name = (await server.request(stream)).exec_id
        code = await asyncio.to_thread(self.running[name].wait) if name in self.running else 0
        # As shims tell of signals.
        await stream.send_message(tasks_pb2.WaitResponse(exit_status=code if code >= 0 else 128 - code))

    async def _kill(self, stream: "server.Stream[Any, Any]") -> None:
        name = (await server.request(stream)).exec_id
        self.killed.append(name)
        if name in self.running:
            self.running[name].kill()
        await stream.send_message(empty_pb2.Empty())

    async def _delete(self, stream: "server.Stream[Any, Any]") -> None:
        await server.request(stream)
        await stream.send_message(tasks_pb2.DeleteResponse())

    def __mapping__(self) -> dict[str, const.Handler]:
        unary = const.Cardinality.UNARY_UNARY
        get = containers_pb2.GetContainerRequest, containers_pb2.GetContainerResponse
        return {
            "/containerd.services.containers.v1.Containers/Get": const.Handler(self._get, unary, *get),
            f"{SERVICE}/Exec": const.Handler(self._exec, unary, tasks_pb2.ExecProcessRequest, empty_pb2.Empty),
            f"{SERVICE}/Start": const.Handler(self._start, unary, tasks_pb2.StartRequest, tasks_pb2.StartResponse),
            f"{SERVICE}/Wait": const.Handler(self._wait, unary, tasks_pb2.WaitRequest, tasks_pb2.WaitResponse),
            f"{SERVICE}/Kill": const.Handler(self._kill, unary, tasks_pb2.KillRequest, empty_pb2.Empty),
            f"{SERVICE}/DeleteProcess": const.Handler(
                self._delete, unary, tasks_pb2.DeleteProcessRequest, tasks_pb2.DeleteResponse
            ),
        }


@pytest.fixture
async def containerd(tmp_path: Path) -> AsyncIterator[Containerd]:
    made = Containerd()
    async with server.serve(unixsocket.listen(str(tmp_path / "run" / "c.sock")), [made]):
        try:
            yield made
        finally:
            for process in made.running.values():
                process.kill()
                await asyncio.to_thread(process.wait)


async def test_a_nodes_start_ends_what_an_earlier_one_left_and_nothing_of_its_own(
    tmp_path: Path, containerd: Containerd
) -> None:
    """It is asked for processes before it has ended what it found."""
    left = tmp_path / "exec-left"
    left.mkdir()
    (left / "container").write_text("c")
    address = str(tmp_path / "run" / "c.sock")
    async with channels.connect(address) as channel:
        adds = processes.Processes(
            containerd_client.Containerd(channel, address), tasks.Tasks(channel, address), str(tmp_path)
        )
        client = clients.Client({})
        process = await adds.start("c", processes.Command(("sleep", "1000")), client, stdin=False)
        await adds.recover()
        assert containerd.killed == ["nixlet-left"]
        assert not left.exists()
        assert len(list(tmp_path.glob("exec-*"))) == 1
        await process.send_signal(signal.SIGKILL)
        assert await asyncio.wait_for(process.ended, 20) == 128 + signal.SIGKILL
        client.leave()
        await adds.close()
