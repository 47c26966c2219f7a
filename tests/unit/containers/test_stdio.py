"""A process's streams, with named pipes and a real process at their other end."""

import asyncio
import contextlib
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nixlet.containers import stdio


class Pipes:
    """What a shim would do: open the pipes, run a program with them, close them."""

    def __init__(self, directory: Path) -> None:
        self.paths = {name: str(directory / name) for name in ("stdin", "stdout", "stderr")}
        for path in self.paths.values():
            os.mkfifo(path)
        self.streams = stdio.Streams()
        self.output: dict[str, bytes] = {"stdout": b"", "stderr": b""}
        self.closed = asyncio.Event()
        self.opened: set[str] = set()
        # As a shim does, both ends of the input are held until it is told to forget its own.
        self._input = os.open(self.paths["stdin"], os.O_RDWR)

    async def sink(self, name: str, data: bytes) -> None:
        self.output[name] += data

    async def close_stdin(self) -> None:
        os.close(self._input)
        self._input = -1
        self.closed.set()

    def close(self) -> None:
        self.streams.close()
        if self._input >= 0:
            os.close(self._input)

    def run(self, command: str) -> "subprocess.Popen[bytes]":
        for name in {"stdout", "stderr"} - self.opened:
            self.streams.open_output(name, self.paths[name])
        reader = os.open(self.paths["stdin"], os.O_RDONLY)
        out, err = (os.open(self.paths[name], os.O_WRONLY) for name in ("stdout", "stderr"))
        process = subprocess.Popen(["/bin/sh", "-c", command], stdin=reader, stdout=out, stderr=err)
        self.streams.open_input(self.paths["stdin"])
        for fd in (reader, out, err):
            os.close(fd)
        return process

    async def serve(self, process: "subprocess.Popen[bytes]", stdin: AsyncIterator[bytes] | None = None) -> int:
        async def ended() -> int:
            return await asyncio.to_thread(process.wait)

        return await self.streams.serve(ended(), self.sink, stdin, self.close_stdin)


@pytest.fixture
async def pipes(tmp_path: Path) -> AsyncIterator[Pipes]:
    made = Pipes(tmp_path)
    yield made
    made.close()


async def pieces(*texts: bytes) -> AsyncIterator[bytes]:
    for text in texts:
        await asyncio.sleep(0)
        yield text


async def test_every_byte_goes_through_and_the_end_of_input_is_seen(pipes: Pipes) -> None:
    data = bytes(range(256)) * 4096
    code = await pipes.serve(pipes.run("cat; echo done >&2; exit 3"), pieces(data, b"\r\n", data))
    assert code == 3
    assert pipes.output == {"stdout": data + b"\r\n" + data, "stderr": b"done\n"}
    assert pipes.closed.is_set()


async def test_a_process_without_input_of_ours_sees_no_end_of_it(pipes: Pipes) -> None:
    process = pipes.run("read -t 0.1 line || echo nothing")
    assert await pipes.serve(process) == 0
    assert not pipes.closed.is_set()


async def test_input_that_nobody_reads_ends_with_the_process(pipes: Pipes) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(1 << 16)
            await asyncio.sleep(0)

    assert await asyncio.wait_for(pipes.serve(pipes.run("echo out; exit 1"), endless()), 10) == 1
    assert pipes.output["stdout"] == b"out\n"


async def test_what_a_process_leaves_running_is_not_waited_for(pipes: Pipes) -> None:
    process = pipes.run("echo $$; sleep 1000 & echo $!")
    assert await asyncio.wait_for(pipes.serve(process), 10) == 0
    left = int(pipes.output["stdout"].split()[1])
    os.kill(left, 9)


async def test_a_sink_that_fails_ends_it(pipes: Pipes) -> None:
    async def refuse(_name: str, _data: bytes) -> None:
        raise BrokenPipeError

    pipes.sink = refuse  # type: ignore[method-assign, assignment]  # for this test alone
    process = pipes.run("while :; do echo y; done")
    waiter = asyncio.create_task(pipes.serve(process))
    try:
        with pytest.raises(BrokenPipeError):
            await asyncio.wait_for(asyncio.shield(waiter), 10)
    finally:
        process.kill()
        await asyncio.gather(waiter, return_exceptions=True)


async def test_a_copy_gets_all_of_it_and_ends_with_the_output(pipes: Pipes, tmp_path: Path) -> None:
    place, found = str(tmp_path / "copy"), tmp_path / "found"
    os.mkfifo(place)
    with subprocess.Popen(["/bin/sh", "-c", f"cat {place} > {found}"]) as reader:
        try:
            # It can be opened as soon as somebody reads.
            for _ in range(1000):
                try:
                    pipes.streams.open_output("stdout", pipes.paths["stdout"], copy=place)
                    pipes.opened.add("stdout")
                    break
                except OSError:
                    await asyncio.sleep(0.005)
            process = pipes.run("seq 50000")
            assert await pipes.serve(process) == 0
            assert await asyncio.to_thread(reader.wait, 10) == 0
        finally:
            reader.kill()
    assert found.read_bytes() == pipes.output["stdout"] == b"".join(b"%d\n" % number for number in range(1, 50001))


async def test_what_a_copys_reader_does_not_take_is_handed_over(pipes: Pipes, tmp_path: Path) -> None:
    """It goes after some bytes, as containerd 1.6 does when a container has ended."""
    place = str(tmp_path / "copy")
    os.mkfifo(place)
    reader = os.open(place, os.O_RDONLY | os.O_NONBLOCK)
    lost: list[bytes] = []
    gone = asyncio.Event()

    async def after_it_has_gone() -> AsyncIterator[bytes]:
        await gone.wait()
        yield b"go\n"

    async def take(name: str, data: bytes) -> None:
        assert name == "stdout"
        lost.append(data)

    pipes.streams.open_output("stdout", pipes.paths["stdout"], copy=place, lost=take)
    pipes.opened.add("stdout")
    process = pipes.run("echo first; read word; echo second")
    serving = asyncio.create_task(pipes.serve(process, after_it_has_gone()))
    first = b""
    while not first:
        with contextlib.suppress(BlockingIOError):
            first = os.read(reader, 100)
        await asyncio.sleep(0.005)
    os.close(reader)
    gone.set()
    assert await asyncio.wait_for(serving, 30) == 0
    assert pipes.output["stdout"] == b"first\nsecond\n"
    assert first + b"".join(lost) == pipes.output["stdout"]
    assert lost


async def test_a_process_goes_on_when_what_it_prints_can_be_written_nowhere(pipes: Pipes, tmp_path: Path) -> None:
    """The reader of the copy is away, as containerd is while it is started again, and the disk is full."""
    os.mkfifo(tmp_path / "copy")
    refused = 0

    async def lost(_name: str, data: bytes) -> None:
        nonlocal refused
        try:
            Path("/dev/full").write_bytes(data)
        except OSError:
            refused += 1
            raise

    pipes.streams.open_output("stdout", pipes.paths["stdout"], copy=str(tmp_path / "copy"), lost=lost)
    pipes.opened.add("stdout")
    assert await pipes.serve(pipes.run("seq 100000; exit 3")) == 3
    assert pipes.output["stdout"] == b"".join(b"%d\n" % number for number in range(1, 100001))
    assert refused > 0
