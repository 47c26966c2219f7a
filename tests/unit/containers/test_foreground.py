"""Who has a container in front of them, and is slow or gone."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

from google.protobuf import empty_pb2
from grpclib import const
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from nixlet.containerd import client, cri, tasks
from nixlet.containers import foreground
from nixlet.host import unixsocket
from nixlet.rpc import channel as channels
from nixlet.rpc import server
from nixlet.rpc.gen import containerd_tasks_pb2 as tasks_pb2
from nixlet.rpc.gen import cri_pb2


async def test_a_client_that_is_slow_is_waited_for_until_it_goes() -> None:
    listener = foreground.Listener()

    async def fill() -> None:
        for _ in range(100):
            await listener.put("stdout", b"x")

    filling = asyncio.create_task(fill())
    await asyncio.wait({filling}, timeout=0.05)
    assert not filling.done()
    listener.leave()
    await asyncio.wait_for(filling, 5)


async def test_a_container_that_has_ended_waits_for_nobody_and_loses_nothing() -> None:
    listener = foreground.Listener()

    async def fill() -> None:
        for number in range(100):
            await listener.put("stdout", b"%d" % number)

    filling = asyncio.create_task(fill())
    await asyncio.sleep(0)
    listener.hurry()
    await asyncio.wait_for(filling, 5)
    listener.finish()
    assert [data async for _, data in listener.pieces()] == [b"%d" % number for number in range(100)]


class Containerd:
    """A containerd that is away when a container's input ends. The container ends when it sees that end."""

    def __init__(self) -> None:
        self.asked = 0
        self._closed = asyncio.Event()

    async def _close(self, stream: "server.Stream[tasks_pb2.CloseIORequest, empty_pb2.Empty]") -> None:
        await server.request(stream)
        self.asked += 1
        if self.asked == 1:
            raise GRPCError(Status.UNAVAILABLE, "it is started again")
        self._closed.set()
        await stream.send_message(empty_pb2.Empty())

    async def _wait(self, stream: "server.Stream[tasks_pb2.WaitRequest, tasks_pb2.WaitResponse]") -> None:
        await server.request(stream)
        await self._closed.wait()
        await stream.send_message(tasks_pb2.WaitResponse(exit_status=3))

    async def _status(
        self, stream: "server.Stream[cri_pb2.ContainerStatusRequest, cri_pb2.ContainerStatusResponse]"
    ) -> None:
        await server.request(stream)
        status = cri_pb2.ContainerStatus(state=cri_pb2.CONTAINER_EXITED, exit_code=3)
        await stream.send_message(cri_pb2.ContainerStatusResponse(status=status))

    def __mapping__(self) -> dict[str, const.Handler]:
        unary = const.Cardinality.UNARY_UNARY
        service = "/containerd.services.tasks.v1.Tasks"
        return {
            f"{service}/CloseIO": const.Handler(self._close, unary, tasks_pb2.CloseIORequest, empty_pb2.Empty),
            f"{service}/Wait": const.Handler(self._wait, unary, tasks_pb2.WaitRequest, tasks_pb2.WaitResponse),
            "/runtime.v1.RuntimeService/ContainerStatus": const.Handler(
                self._status, unary, cri_pb2.ContainerStatusRequest, cri_pb2.ContainerStatusResponse
            ),
        }


async def test_the_end_of_input_arrives_although_containerd_was_away_at_that_moment(tmp_path: Path) -> None:
    pipes = tmp_path / "io.containerd.grpc.v1.cri" / "containers" / "c" / "io" / "1"
    pipes.mkdir(parents=True)
    for stream in ("stdin", "stdout"):
        os.mkfifo(pipes / f"c-{stream}")

    async def nothing() -> AsyncIterator[bytes]:
        for piece in list[bytes]():
            yield piece

    address = str(tmp_path / "run" / "c.sock")
    serving = Containerd()
    async with (
        server.serve(unixsocket.listen(address), [serving]),
        channels.connect(address) as channel,
    ):
        runtime = cri.RuntimeClient(channel, address)
        front = foreground.Foreground(tasks.Tasks(channel, address), runtime, [str(tmp_path)])
        listener = foreground.Listener()
        with front.interposed("c"):
            reader = os.open(pipes / "c-stdin", os.O_RDONLY | os.O_NONBLOCK)
        try:
            code = await asyncio.wait_for(front.serve(client.Containerd(channel, address), listener, nothing()), 10)
        finally:
            os.close(reader)
    assert (code, serving.asked) == (3, 2)
