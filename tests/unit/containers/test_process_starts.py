"""Processes that are added to containers, where something fails that a real containerd, or kernel, lets fail at no chosen moment."""

import asyncio
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import empty_pb2
from google.protobuf.message import Message
from grpclib import const
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from nixlet import errors
from nixlet.containerd import tasks
from nixlet.containers import clients, pipes, processes
from nixlet.host import unixsocket
from nixlet.rpc import channel as channels
from nixlet.rpc import server
from nixlet.rpc.gen import containerd_tasks_pb2 as pb


class Tasks:
    """Has one process, which ends when it is killed. That it has started is heard by nobody when ``loses_start`` is set."""

    def __init__(self, *, loses_start: bool) -> None:
        self._loses_start = loses_start
        self._killed = asyncio.Event()
        self.runs = False
        self.calls: list[str] = []

    async def _answer(self, name: str) -> Message:
        if name == "Start":
            self.runs = True
            if self._loses_start:
                raise GRPCError(Status.UNAVAILABLE, "it is started again")
            return pb.StartResponse(pid=1)
        if name == "Kill":
            self._killed.set()
        if name == "Wait":
            await self._killed.wait()
            self.runs = False
            return pb.WaitResponse(exit_status=137)
        if name == "DeleteProcess":
            if self.runs:
                raise GRPCError(Status.FAILED_PRECONDITION, "it runs")
            return pb.DeleteResponse()
        return empty_pb2.Empty()

    def _handler(self, name: str) -> Callable[["server.Stream[Any, Any]"], Any]:
        async def handle(stream: "server.Stream[Any, Any]") -> None:
            await server.request(stream)
            self.calls.append(name)
            await stream.send_message(await self._answer(name))

        return handle

    def __mapping__(self) -> dict[str, const.Handler]:
        types: dict[str, tuple[type[Message], type[Message]]] = {
            "Exec": (pb.ExecProcessRequest, empty_pb2.Empty),
            "Start": (pb.StartRequest, pb.StartResponse),
            "Kill": (pb.KillRequest, empty_pb2.Empty),
            "Wait": (pb.WaitRequest, pb.WaitResponse),
            "DeleteProcess": (pb.DeleteProcessRequest, pb.DeleteResponse),
        }
        return {
            f"/containerd.services.tasks.v1.Tasks/{name}": const.Handler(
                self._handler(name), const.Cardinality.UNARY_UNARY, request, answer
            )
            for name, (request, answer) in types.items()
        }


@pytest.mark.parametrize("loses_start", [False, True])
async def test_a_process_that_may_run_is_ended_when_its_start_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loses_start: bool
) -> None:
    def refuse(path: str) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)

    monkeypatch.setattr(pipes, "open_writer", refuse)
    containerd = Tasks(loses_start=loses_start)
    path = str(tmp_path / "run" / "c.sock")
    async with server.serve(unixsocket.listen(path), [containerd]), channels.connect(path) as channel:
        process = processes.Process(tasks.Tasks(channel, path), "c", str(tmp_path), "one")
        client = clients.Client()
        with pytest.raises(errors.FailedPreconditionError if loses_start else errors.ResourceExhaustedError):
            await process.begin({"args": ["/bin/sh"], "terminal": False}, client, stdin=True)
        client.leave()
    begun, ended = containerd.calls[:3], containerd.calls[3:]
    assert (sorted(begun), ended) == (["Exec", "Start", "Wait"], ["Kill", "Wait", "DeleteProcess"])
    assert not containerd.runs
    assert list(tmp_path.glob("exec-*")) == []
