"""A container's streams in the node's hands: named pipes where containerd has them, a real process in the place of a container's,
and a containerd that can be away, which a real one is at no moment that a test could choose."""

import asyncio
import contextlib
import errno
import gc
import json
import os
import subprocess
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from concurrent import futures
from pathlib import Path

import pytest
from google.protobuf import empty_pb2
from grpclib import const
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from nixlet import errors
from nixlet.containerd import client as containerd_client
from nixlet.containerd import cri, tasks
from nixlet.containers import clients, endings, keeping, logs, pipes, streams
from nixlet.host import unixsocket
from nixlet.rpc import channel as channels
from nixlet.rpc import server
from nixlet.rpc.gen import containerd_tasks_pb2 as tasks_pb2
from nixlet.rpc.gen import cri_pb2
from support.pipes import pipe


class Containerd:
    """A containerd with one container, "c": it has ended when ``code`` is set.

    Attributes:
        away: It answers nobody.
        refuses: It doesn't say how the container is, and how often it was asked.
        closed: Called when it is told to forget its end of the input.
    """

    def __init__(self, log_path: Path) -> None:
        self.log_path = log_path
        self.code: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.away = False
        self.asked_to_close = 0
        self.asked_for_status = 0
        self.refused = 0
        self.refuses = False
        self.config: dict[str, bool] = {}
        self.close_input: Callable[[], None] = lambda: None

    async def _close(self, stream: "server.Stream[tasks_pb2.CloseIORequest, empty_pb2.Empty]") -> None:
        await server.request(stream)
        self.asked_to_close += 1
        if self.away:
            self.away = False
            raise GRPCError(Status.UNAVAILABLE, "it is started again")
        self.close_input()
        await stream.send_message(empty_pb2.Empty())

    async def _wait(self, stream: "server.Stream[tasks_pb2.WaitRequest, tasks_pb2.WaitResponse]") -> None:
        await server.request(stream)
        await stream.send_message(tasks_pb2.WaitResponse(exit_status=await asyncio.shield(self.code)))

    async def _status(
        self, stream: "server.Stream[cri_pb2.ContainerStatusRequest, cri_pb2.ContainerStatusResponse]"
    ) -> None:
        request = await server.request(stream)
        self.asked_for_status += 1
        if request.container_id != "c":
            raise GRPCError(Status.NOT_FOUND, "there is no such container")
        if self.refuses:
            self.refused += 1
            raise GRPCError(Status.UNKNOWN, "it is out of order")
        ended = self.code.done()
        status = cri_pb2.ContainerStatus(
            state=cri_pb2.CONTAINER_EXITED if ended else cri_pb2.CONTAINER_RUNNING,
            exit_code=self.code.result() if ended else 0,
            log_path=str(self.log_path),
        )
        info = {"info": json.dumps({"config": self.config})}
        await stream.send_message(cri_pb2.ContainerStatusResponse(status=status, info=info))

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


class World:
    """A containerd, its pipes for one container, and the node's hold on them."""

    def __init__(self, directory: Path, containerd: Containerd, channel: channels.Channel, address: str) -> None:
        self.containerd = containerd
        self._directory, self._channel, self._address = directory, channel, address
        self.pipes = directory / "io.containerd.grpc.v1.cri" / "containers" / "c" / "io" / "1"
        self.pipes.mkdir(parents=True)
        for stream in ("stdin", "stdout", "stderr"):
            os.mkfifo(self.pipes / f"c-{stream}")
        self.log = containerd.log_path
        self.keeper = self.new_keeper()
        self._shim = contextlib.ExitStack()
        self.shim_may_go = asyncio.Event()
        self.shim_may_go.set()
        self._input = -1
        self.processes: list[subprocess.Popen[bytes]] = []
        self._waiting: list[asyncio.Task[None]] = []

    def new_keeper(self) -> keeping.Keeper:
        return keeping.Keeper(
            containerd_client.Containerd(self._channel, self._address),
            tasks.Tasks(self._channel, self._address),
            cri.RuntimeClient(self._channel, self._address),
            str(self._directory),
        )

    def run(self, command: str) -> "subprocess.Popen[bytes]":
        """What a shim does at a container's start: it has both ends of each pipe, so nobody sees an end before it goes."""
        ends = {name: os.open(self.pipes / f"c-{name}", os.O_RDWR) for name in ("stdin", "stdout", "stderr")}
        self._input = ends["stdin"]
        self.containerd.close_input = self._forget_input
        for name in ("stdout", "stderr"):
            self._shim.callback(os.close, ends[name])
        reader = os.open(self.pipes / "c-stdin", os.O_RDONLY)
        process = subprocess.Popen(
            ["/bin/sh", "-c", command], stdin=reader, stdout=ends["stdout"], stderr=ends["stderr"]
        )
        os.close(reader)
        self.processes.append(process)
        self._waiting.append(asyncio.create_task(self._end(process)))
        return process

    async def _end(self, process: "subprocess.Popen[bytes]") -> None:
        code = await asyncio.to_thread(process.wait)
        await self.shim_may_go.wait()
        self._shim.close()
        # As shims tell of signals.
        self.containerd.code.set_result(code if code >= 0 else 128 - code)

    def _forget_input(self) -> None:
        if self._input >= 0:
            os.close(self._input)
            self._input = -1

    async def ended(self, keeper: keeping.Keeper | None = None) -> int:
        held = (keeper or self.keeper).find("c")
        assert held is not None
        return await asyncio.wait_for(asyncio.shield(held.ended), 20)

    def logged(self, stream: str = "stdout") -> bytes:
        return b"".join(each.text for each in logs.records(str(self.log)) if each.stream == stream)

    async def close(self) -> None:
        self.shim_may_go.set()
        for process in self.processes:
            process.kill()
        await asyncio.gather(*self._waiting)
        await self.keeper.close()
        self._forget_input()


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    containerd = Containerd(tmp_path / "0.log")
    address = str(tmp_path / "run" / "c.sock")
    async with server.serve(unixsocket.listen(address), [containerd]), channels.connect(address) as channel:
        made = World(tmp_path, containerd, channel, address)
        try:
            yield made
        finally:
            await made.close()


async def read_all(fd: int) -> bytes:
    return await asyncio.to_thread(Path(f"/proc/self/fd/{fd}").read_bytes)


async def test_everything_goes_to_the_log_and_to_all_clients(world: World) -> None:
    expected = b"".join(b"%d\n" % number for number in range(1, 50001))
    with pipe() as first, pipe() as second:
        one, other = clients.Client({"stdout": first.writer}), clients.Client({"stdout": second.writer})
        first.write_end.close()
        second.write_end.close()
        with world.keeper.started("c", one):
            world.run("seq 50000; echo complaint >&2; exit 3")
        held = world.keeper.find("c")
        assert held is not None
        held.join(other)
        reading = [asyncio.create_task(read_all(each.reader)) for each in (first, second)]
        assert await world.ended() == 3
        await one.finish()
        await other.finish()
        assert await asyncio.gather(*reading) == [expected, expected]
    assert world.logged() == expected
    assert world.logged("stderr") == b"complaint\n"
    # The names are containerd's again, and nothing else is there.
    assert sorted(path.name for path in world.pipes.iterdir()) == ["c-stderr", "c-stdin", "c-stdout"]
    assert world.keeper.find("c") is None


async def test_a_container_that_prints_nothing_keeps_nothing_of_clients_that_left(world: World) -> None:
    with world.keeper.started("c"):
        world.run("read word; exit 3")
    held = world.keeper.find("c")
    assert held is not None
    left = []
    for _ in range(10):
        with pipe() as output, pipe() as keys:
            client = clients.Client({"stdout": output.writer}, keys.reader)
            held.join(client)
            client.leave()
            await client.finish()
            left.append(weakref.ref(client))
            del client
    while any(asyncio.current_task() is not each and each.get_name() == "input" for each in asyncio.all_tasks()):
        await asyncio.sleep(0.01)
    gc.collect()
    assert [each() for each in left] == [None] * 10
    assert world.keeper.writes(str(world.log))
    ended = held.ended
    await held.end_input()
    assert await asyncio.wait_for(ended, 10) == 3
    assert not world.keeper.writes(str(world.log))


async def test_a_client_that_no_pipe_can_be_made_for_is_the_only_one_that_is_left(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with world.keeper.started("c"):
        world.run("read word; echo $word; seq 50000; exit 3")
    held = world.keeper.find("c")
    assert held is not None
    ended = held.ended
    with pipe() as first:
        client = clients.Client({"stdout": first.writer})
        held.join(client)

        def refuse() -> tuple[int, int]:
            raise OSError(errno.EMFILE, "Too many open files")

        # Only for a moment: no limit would spare the node's other files.
        with monkeypatch.context() as patched:
            patched.setattr(pipes, "new_pipe", refuse)
            with open(world.pipes / "c-stdin.nixlet", "wb", buffering=0) as keys:
                keys.write(b"word\n")
            await asyncio.wait_for(client.gone.wait(), 10)
        assert client.failure is not None
        assert "Too many open files" in str(client.failure)
        assert await asyncio.wait_for(ended, 10) == 3
        await client.finish()
    assert world.logged() == b"word\n" + b"".join(b"%d\n" % number for number in range(1, 50001))


async def test_what_goes_wrong_with_a_piece_of_output_is_tried_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread or a descriptor that isn't there at the moment must not take the container its only reader."""
    monkeypatch.setattr(streams, "_RETRY", 0.01)
    failures = [RuntimeError("can't start new thread"), OSError(errno.ENOMEM, "Cannot allocate memory")]
    seen = pipes.Peeker.see

    async def see(peeker: pipes.Peeker, fd: int) -> bytes:
        if failures:
            raise failures.pop()
        return await seen(peeker, fd)

    monkeypatch.setattr(pipes.Peeker, "see", see)
    with world.keeper.started("c"):
        world.run("echo all of it; exit 3")
    assert await world.ended() == 3
    assert failures == []
    assert world.logged() == b"all of it\n"


async def test_a_container_is_read_although_containerd_goes_as_soon_as_it_has_started_it(world: World) -> None:
    with world.keeper.started("c"):
        async with asyncio.timeout(10):
            while not world.containerd.asked_for_status:
                await asyncio.sleep(0.01)
        world.containerd.refuses = True
        world.run("echo all of it; exit 3")
    held = world.keeper.find("c")
    assert held is not None
    async with asyncio.timeout(10):
        while not world.log.exists() or world.logged() != b"all of it\n":
            await asyncio.sleep(0.01)
    assert await asyncio.wait_for(held.ended, 10) == 3


async def test_the_end_of_input_arrives_although_containerd_was_away_at_that_moment(world: World) -> None:
    with pipe() as keys:
        client = clients.Client(stdin=keys.reader)
        with world.keeper.started("c", client, stdin_ends=True):
            world.run("cat; exit 4")
        world.containerd.away = True
        os.write(keys.writer, b"word\n")
        keys.write_end.close()
        assert await world.ended() == 4
        await client.finish()
    assert world.containerd.asked_to_close == 2
    assert world.logged() == b"word\n"


async def test_input_that_does_not_end_is_the_next_clients(world: World) -> None:
    with world.keeper.started("c"):
        world.run("while read line; do echo got $line; [ $line = end ] && exit 5; done")
    held = world.keeper.find("c")
    assert held is not None
    for text in (b"one\n", b"end\n"):
        with pipe() as keys:
            client = clients.Client(stdin=keys.reader)
            held.join(client)
            os.write(keys.writer, text)
            keys.write_end.close()
            while b"got " + text not in (world.logged() if world.log.exists() else b""):
                await asyncio.sleep(0.01)
            client.leave()
            await client.finish()
    assert await asyncio.wait_for(held.ended, 10) == 5
    assert world.containerd.asked_to_close == 0


async def test_input_ends_with_that_of_the_first_client_and_with_no_others(world: World) -> None:
    with pipe() as keys:
        front = clients.Client(stdin=keys.reader)
        with world.keeper.started("c", front, stdin_ends=True):
            world.run("cat; exit 5")
        held = world.keeper.find("c")
        assert held is not None
        said = b""
        for text in (b"one\n", b"two\n"):
            with pipe() as others:
                beside = clients.Client(stdin=others.reader)
                held.join(beside)
                os.write(others.writer, text)
                said += text
                while not world.log.exists() or world.logged() != said:
                    await asyncio.sleep(0.01)
                beside.leave()
                await beside.finish()
        assert world.containerd.asked_to_close == 0
        with pipe() as others:
            # One that is still there, and says nothing.
            beside = clients.Client(stdin=others.reader)
            held.join(beside)
            os.write(keys.writer, b"end\n")
            keys.write_end.close()
            assert await world.ended() == 5
            beside.leave()
            await beside.finish()
        await front.finish()
    assert world.logged() == b"one\ntwo\nend\n"


async def test_input_goes_into_nobody_elses_file_when_it_has_just_ended(world: World, tmp_path: Path) -> None:
    with world.keeper.started("c"):
        world.run("read word; exit 5")
    held = world.keeper.find("c")
    assert held is not None
    ended = held.ended
    with pipe() as keys:
        os.write(keys.writer, b"secret\n")
        keys.write_end.close()
        client = clients.Client(stdin=keys.reader)
        others: list[int] = []
        try:
            held.join(client)
            ending = asyncio.create_task(held.end_input())
            while held._stdin is not None:
                await asyncio.sleep(0)
            # The numbers that were free are others' now.
            others += [os.open(tmp_path / f"other{number}", os.O_RDWR | os.O_CREAT) for number in range(3)]
            await ending
            assert await asyncio.wait_for(ended, 10) == 5
            client.leave()
            await client.finish()
            assert [os.pread(other, 10, 0) for other in others] == [b""] * 3
        finally:
            for other in others:
                os.close(other)


async def test_what_a_container_leaves_running_is_not_waited_for(world: World) -> None:
    with world.keeper.started("c"):
        process = world.run("sleep 1000 & echo $!; exit 0")
    # As a shim that waits for the pipe.
    left = os.open(world.pipes / "c-stdout.nixlet", os.O_WRONLY)
    try:
        assert await world.ended() == 0
        os.kill(int(world.logged()), 9)
    finally:
        os.close(left)
    assert process.returncode == 0


async def test_a_next_node_goes_on_also_with_what_ended_meanwhile(world: World) -> None:
    with world.keeper.started("c"):
        world.run("echo first; read word; echo second $word; exit 6")
    while not world.log.exists() or world.logged() != b"first\n":
        await asyncio.sleep(0.01)
    await world.keeper.close()
    # A shim stays, with the pipes, until containerd has heard of the end, which starts after the node has looked.
    world.shim_may_go.clear()
    world.keeper = world.new_keeper()
    with open(world.pipes / "c-stdin.nixlet", "wb", buffering=0) as keys:
        keys.write(b"word\n")
    while not _waits(world.pipes / "c-stdout.nixlet"):
        await asyncio.sleep(0.01)
    world.keeper.look()
    world.shim_may_go.set()
    await asyncio.wait_for(asyncio.shield(world.containerd.code), 10)
    await world.keeper.adopt()
    # Its log is complete by now, since CRI says that it has ended.
    assert world.keeper.find("c") is None
    assert world.logged() == b"first\nsecond word\n"


async def test_a_container_that_containerd_says_nothing_of_keeps_no_node_from_starting(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "_LAST_WORDS", 0.01)
    monkeypatch.setattr(endings, "RETRY", 0.01)
    with world.keeper.started("c"):
        world.run("read word; echo $word; exit 6")
    await world.keeper.close()
    for answers in (False, True):
        world.containerd.refuses = True
        before = world.containerd.refused
        world.keeper = world.new_keeper()
        world.keeper.look()
        # As somebody who attaches.
        awaiting = asyncio.create_task(world.keeper.awaited("c"))
        await asyncio.wait_for(world.keeper.adopt(), 10)
        assert world.keeper.find("c") is None
        async with asyncio.timeout(10):
            while world.containerd.refused < before + 3:
                await asyncio.sleep(0.01)
            world.containerd.refuses = not answers
            assert not awaiting.done()
            if not answers:
                await world.keeper.close()
            assert (await awaiting is not None) == answers
            assert awaiting.result() is world.keeper.find("c")
    with open(world.pipes / "c-stdin.nixlet", "wb", buffering=0) as keys:
        keys.write(b"word\n")
    assert await world.ended() == 6
    assert world.logged() == b"word\n"


def _waits(path: Path) -> bool:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return pipes.unread(fd) > 0
    finally:
        os.close(fd)


@pytest.mark.parametrize("tty", [False, True])
async def test_after_a_restart_input_that_was_one_clients_ends_but_not_a_terminals(world: World, tty: bool) -> None:
    with world.keeper.started("c", stdin_ends=not tty):
        world.run("read word; echo read $word; exit 7")
    await world.keeper.close()
    world.containerd.config = {"stdin": True, "stdin_once": True, "tty": tty}
    world.keeper = world.new_keeper()
    world.keeper.look()
    await world.keeper.adopt()
    held = world.keeper.find("c")
    assert held is not None
    if tty:
        with pipe() as keys:
            client = clients.Client(stdin=keys.reader)
            held.join(client)
            os.write(keys.writer, b"typed\n")
            assert await world.ended() == 7
            await client.finish()
    else:
        assert await world.ended() == 7
    assert world.logged() == (b"read typed\n" if tty else b"read\n")


async def test_a_node_keeps_its_hands_off_pipes_of_a_container_that_its_containerd_does_not_know(world: World) -> None:
    """It may be another node's, of another containerd."""
    others = world.pipes.parents[2] / "other" / "io" / "1"
    others.mkdir(parents=True)
    for name in ("stdout", "stdout.nixlet", "stderr", "stderr.nixlet"):
        os.mkfifo(others / f"other-{name}")
    before = sorted(path.name for path in others.iterdir())
    world.keeper.look()
    await world.keeper.adopt()
    assert world.keeper.find("other") is None
    assert sorted(path.name for path in others.iterdir()) == before


async def test_a_container_that_does_not_start_leaves_the_pipes_as_they_were(world: World) -> None:
    with pytest.raises(errors.NotFoundError), world.keeper.started("c"):
        raise errors.NotFoundError("no such program")
    assert sorted(path.name for path in world.pipes.iterdir()) == ["c-stderr", "c-stdin", "c-stdout"]
    assert world.keeper.find("c") is None


async def test_pipes_at_other_places_are_told(world: World) -> None:
    with pytest.raises(errors.UnsupportedError), world.keeper.started("other"):
        pass


async def test_a_container_goes_on_when_its_log_can_not_be_written(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "_RETRY", 0.01)
    world.log.symlink_to("/dev/full")
    with world.keeper.started("c"):
        world.run("seq 100000; exit 3")
    assert await world.ended() == 3


@pytest.mark.parametrize("stopped", [False, True])
async def test_what_is_missing_stands_in_the_log_although_nothing_comes_after_it(world: World, stopped: bool) -> None:
    world.log.symlink_to("/dev/full")
    with world.keeper.started("c"):
        world.run("echo lost; read word; exit 3")
    held = world.keeper.find("c")
    assert held is not None
    async with asyncio.timeout(10):
        while not held._log.has_gaps:
            await asyncio.sleep(0.01)
    world.log.unlink()
    if stopped:
        await world.keeper.close()
    with open(world.pipes / "c-stdin.nixlet", "wb", buffering=0) as keys:
        keys.write(b"word\n")
    if not stopped:
        assert await world.ended() == 3
    assert world.logged() == b"nixlet: 5 bytes are missing here: the log could not be written\n"


async def test_a_log_is_written_although_all_threads_that_are_shared_are_busy(world: World) -> None:
    come_back = threading.Event()
    asyncio.get_running_loop().set_default_executor(futures.ThreadPoolExecutor(1))
    busy = asyncio.create_task(asyncio.to_thread(come_back.wait))
    try:
        with world.keeper.started("c"):
            world.run("echo all of it; exit 3")
        held = world.keeper.find("c")
        assert held is not None
        async with asyncio.timeout(10):
            while not world.log.exists() or world.logged() != b"all of it\n":
                await asyncio.sleep(0.01)
    finally:
        come_back.set()
    await busy
    assert await asyncio.wait_for(held.ended, 10) == 3
