"""Who listens to a process: slow, stalled, gone; pipes, files and devices that they share with others."""

import asyncio
import os
import pty
import re
import socket
import threading
import tty
from collections.abc import Iterator
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.containers import clients, pipes
from support import pipes as made_pipes

PIECE = bytes(range(256)) * 256


class Pipe(made_pipes.Pipe):
    """A pipe of which the test has both ends."""

    async def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = await asyncio.to_thread(os.read, self.reader, size - len(data))
            assert more, f"an end after {len(data)} bytes"
            data += more
        return data


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    made.read_end.close()
    made.write_end.close()


async def fill(client: clients.Client, pieces: int) -> None:
    for _ in range(pieces):
        await client.give("stdout", PIECE)


async def test_a_client_that_reads_gets_every_byte_and_the_end(pipe: Pipe) -> None:
    client = clients.Client({"stdout": pipe.writer})
    pipe.write_end.close()
    reading = asyncio.create_task(pipe.read(200 * len(PIECE)))
    await fill(client, 200)
    await asyncio.wait_for(client.finish(), 10)
    assert await reading == PIECE * 200
    assert os.read(pipe.reader, 1) == b""
    assert not client.reader_gone


async def test_a_client_that_is_slow_is_waited_for(pipe: Pipe) -> None:
    client = clients.Client({"stdout": pipe.writer}, patience=60)
    filling = asyncio.create_task(fill(client, 100))
    await asyncio.wait({filling}, timeout=0.1)
    assert not filling.done()
    assert pipe.is_blocking()
    assert await pipe.read(100 * len(PIECE)) == PIECE * 100
    await asyncio.wait_for(filling, 10)
    client.leave()


async def test_a_client_that_has_stalled_is_told_what_it_missed(pipe: Pipe) -> None:
    client = clients.Client({"stdout": pipe.writer}, patience=0.05)
    pipe.write_end.close()
    await asyncio.wait_for(fill(client, 500), 30)

    reading = asyncio.create_task(asyncio.to_thread(Path(f"/proc/self/fd/{pipe.reader}").read_bytes))
    # It has caught up.
    while client._outputs["stdout"]._pieces or pipes.unread(pipe.reader):
        await asyncio.sleep(0.01)
    await client.give("stdout", b"again")
    await asyncio.wait_for(client.finish(), 10)
    seen = await reading
    before, told, after = seen.partition(b"\nnixlet: ")
    assert told
    assert before == PIECE * (len(before) // len(PIECE))
    assert 16 <= len(before) // len(PIECE) < 100
    missing = 500 * len(PIECE) - len(before)
    assert after == b"%d bytes are left out here: nobody read them for 0.05 s\nagain" % missing


async def test_a_client_that_reads_again_after_the_end_is_told_what_it_missed(pipe: Pipe) -> None:
    client = clients.Client({"stdout": pipe.writer}, patience=0.05)
    pipe.write_end.close()
    await asyncio.wait_for(fill(client, 500), 30)
    client.hurry()
    finishing = asyncio.create_task(client.finish())
    seen = await asyncio.to_thread(Path(f"/proc/self/fd/{pipe.reader}").read_bytes)
    await asyncio.wait_for(finishing, 5)
    before, _, rest = seen.partition(b"\nnixlet: ")
    missing, _, after = rest.partition(b" bytes are left out here: nobody read them for 0.05 s\n")
    assert len(before) + int(missing) == 500 * len(PIECE)
    assert after == b""


async def test_a_client_that_takes_little_by_little_is_not_waited_for_without_end(pipe: Pipe) -> None:
    client = clients.Client({"stdout": pipe.writer}, patience=0.05)
    pipe.write_end.close()
    seen = b""

    async def trickle() -> None:
        nonlocal seen
        while True:
            if pipes.unread(pipe.reader):
                seen += os.read(pipe.reader, 4096)
            await asyncio.sleep(0.02)

    trickling = asyncio.create_task(trickle())
    await asyncio.wait_for(fill(client, 500), 10)
    trickling.cancel()
    await asyncio.gather(trickling, return_exceptions=True)
    client.hurry()
    finishing = asyncio.create_task(client.finish())
    seen += await asyncio.to_thread(Path(f"/proc/self/fd/{pipe.reader}").read_bytes)
    await asyncio.wait_for(finishing, 10)
    counts = [int(each) for each in re.findall(rb"\nnixlet: (\d+) bytes are left out here[^\n]*\n", seen)]
    shown = re.sub(rb"\nnixlet: \d+ bytes are left out here[^\n]*\n", b"", seen)
    assert len(shown) + sum(counts) == 500 * len(PIECE)
    assert sum(counts) > 400 * len(PIECE)


async def test_a_client_that_goes_while_it_is_waited_for_is_passed_over(pipe: Pipe) -> None:
    client = clients.Client({"stdout": pipe.writer}, patience=60)
    filling = asyncio.create_task(fill(client, 100))
    await asyncio.wait({filling}, timeout=0.05)
    assert not filling.done()
    client.leave()
    await asyncio.wait_for(filling, 5)


async def test_a_reader_that_is_gone_is_noticed(pipe: Pipe) -> None:
    client = clients.Client({"stdout": pipe.writer})
    pipe.read_end.close()
    await client.give("stdout", b"x")
    await asyncio.wait_for(client.gone.wait(), 5)
    assert client.reader_gone
    await fill(client, 100)


async def test_after_the_end_of_the_process_nobody_is_waited_for_and_nothing_is_lost(pipe: Pipe) -> None:
    client = clients.Client({"stdout": pipe.writer}, patience=60)
    filling = asyncio.create_task(fill(client, 100))
    await asyncio.wait({filling}, timeout=0.05)
    client.hurry()
    await asyncio.wait_for(filling, 5)
    finishing = asyncio.create_task(client.finish())
    assert await pipe.read(100 * len(PIECE)) == PIECE * 100
    await asyncio.wait_for(finishing, 5)


async def test_what_goes_on_printing_after_the_end_fills_no_memory(pipe: Pipe) -> None:
    client = clients.Client({"stdout": pipe.writer}, patience=60)
    pipe.write_end.close()
    client.hurry()
    await asyncio.wait_for(fill(client, 1000), 10)
    held = client._outputs["stdout"]._pieces
    assert sum(map(len, held)) <= 9 << 20
    finishing = asyncio.create_task(client.finish())
    seen = await asyncio.to_thread(Path(f"/proc/self/fd/{pipe.reader}").read_bytes)
    await asyncio.wait_for(finishing, 10)
    before, _, rest = seen.partition(b"\nnixlet: ")
    assert len(before) + int(rest.split(b" ")[0]) == 1000 * len(PIECE)


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_WRONLY | os.O_APPEND])
async def test_files_are_written_where_they_stand(tmp_path: Path, flags: int) -> None:
    place = tmp_path / "output"
    place.write_bytes(b"before ")
    fd = os.open(place, flags)
    os.lseek(fd, 7, os.SEEK_SET)
    reader, writer = pipes.new_pipe()
    client = clients.Client({"stdout": fd})
    piping = asyncio.create_task(client.pipe("stdout", reader))
    await pipes.write(writer, PIECE * 40)
    os.close(writer)
    await asyncio.wait_for(piping, 10)
    os.write(fd, b"after")
    os.close(reader)
    os.close(fd)
    await client.finish()
    assert place.read_bytes() == b"before " + PIECE * 40 + b"after"


async def test_a_full_disk_is_told(tmp_path: Path) -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    client = clients.Client({"stdout": fd})
    os.close(fd)
    await client.give("stdout", b"x")
    await asyncio.wait_for(client.gone.wait(), 5)
    assert client.failure is not None
    assert "No space left" in str(client.failure)


async def test_terminals_and_sockets_are_written_without_waiting_for_who_has_them() -> None:
    person, program = pty.openpty()
    tty.setraw(program)
    ours, theirs = socket.socketpair()
    try:
        for fd in (program, theirs.fileno()):
            client = clients.Client({"stdout": fd}, patience=0.05)
            assert os.get_blocking(fd)
            await asyncio.wait_for(fill(client, 60), 10)
            client.leave()
            await client.finish()
            assert os.get_blocking(fd)
        assert os.read(person, 10) == PIECE[:10]
        assert ours.recv(10) == PIECE[:10]
    finally:
        for fd in (person, program):
            os.close(fd)
        ours.close()
        theirs.close()


async def test_a_pipe_is_emptied_until_its_end_or_the_clients(pipe: Pipe) -> None:
    reader, writer = pipes.new_pipe()
    try:
        client = clients.Client({"stdout": pipe.writer})
        piping = asyncio.create_task(client.pipe("stdout", reader))
        await asyncio.wait_for(pipes.write(writer, b"some"), 5)
        assert await pipe.read(4) == b"some"
        client.leave()
        await asyncio.wait_for(piping, 5)
        await pipes.write(writer, b"for nobody")
        assert pipes.unread(reader) == 10
        assert pipes.unread(pipe.reader) == 0
    finally:
        os.close(reader)
        os.close(writer)


async def test_input_goes_into_a_pipe_until_it_ends(pipe: Pipe) -> None:
    reader, writer = pipes.new_pipe()
    client = clients.Client(stdin=pipe.reader)
    feeding = asyncio.create_task(client.feed(writer))
    data = b""
    for _ in range(40):
        await asyncio.to_thread(os.write, pipe.writer, PIECE)
        data += await pipes.read(reader)
    pipe.write_end.close()
    while len(data) < 40 * len(PIECE):
        data += await pipes.read(reader)
    await asyncio.wait_for(feeding, 5)
    assert data == PIECE * 40
    client.leave()
    os.close(reader)
    os.close(writer)


async def test_input_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "input").write_bytes(PIECE * 3)
    fd = os.open(tmp_path / "input", os.O_RDONLY)
    reader, writer = pipes.new_pipe()
    client = clients.Client(stdin=fd)
    os.close(fd)
    await asyncio.wait_for(client.feed(writer), 5)
    os.close(writer)
    data = b""
    while more := await pipes.read(reader):
        data += more
    assert data == PIECE * 3
    client.leave()
    os.close(reader)


async def test_what_is_of_no_use_is_refused_in_words(pipe: Pipe) -> None:
    with pytest.raises(errors.InvalidArgumentError):
        clients.Client({"stdout": pipe.reader})
    with pytest.raises(errors.InvalidArgumentError):
        clients.Client(stdin=pipe.writer)
    # Whose write(2) may wait for ever, and can't be told not to.
    counter = os.eventfd(0)
    try:
        with pytest.raises(errors.InvalidArgumentError):
            clients.Client({"stdout": counter})
    finally:
        os.close(counter)


async def test_files_that_take_for_ever_keep_nobody_else_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a network file system whose server is gone do, which no test can have."""
    come_back, write, read = threading.Event(), os.write, os.read
    waiting: set[int] = set()

    def hang(fd: int) -> None:
        if os.path.basename(os.readlink(f"/proc/self/fd/{fd}")).startswith("hangs"):
            waiting.add(fd)
            come_back.wait()

    def writes(fd: int, data: bytes) -> int:
        hang(fd)
        return write(fd, data)

    def reads(fd: int, size: int) -> bytes:
        hang(fd)
        return read(fd, size)

    reader, writer = pipes.new_pipe()
    left = []
    try:
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", writes)
            patched.setattr(os, "read", reads)
            # More than threads that all share.
            for number in range(40):
                fd = os.open(tmp_path / f"hangs{number}", os.O_RDWR | os.O_CREAT)
                client = clients.Client({"stdout": fd}, fd)
                os.close(fd)
                await client.give("stdout", b"some")
                left.append((client, asyncio.create_task(client.feed(writer))))
            async with asyncio.timeout(10):
                while len(waiting) < 80:
                    await asyncio.sleep(0.01)
                await asyncio.to_thread(os.getpid)
            for client, feeding in left:
                client.leave()
                await asyncio.wait_for(feeding, 10)
    finally:
        come_back.set()
        for client, _ in left:
            await client.finish()
        os.close(reader)
        os.close(writer)


async def test_what_was_seen_stays_in_its_pipe_until_it_is_taken() -> None:
    """Whoever is killed between the two leaves it to the next."""
    reader, writer = pipes.new_pipe()
    peeker = pipes.Peeker()
    try:
        os.write(writer, PIECE)
        os.write(writer, b"more")
        assert await peeker.see(reader) == PIECE + b"more"
        assert await peeker.see(reader) == PIECE + b"more"
        peeker.take(reader, len(PIECE))
        assert await peeker.see(reader) == b"more"
        peeker.take(reader, 4)
        os.close(writer)
        assert await peeker.see(reader) == b""
    finally:
        os.close(reader)
        peeker.close()
