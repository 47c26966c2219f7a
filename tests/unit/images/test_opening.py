"""How a node opens archives: threads end with their callers, and compressed ones wait for each other."""

import asyncio
import contextlib
import gzip
import io
import os
import socket
import threading
from pathlib import Path

import pytest

from nixlet.images import archive, model, opening
from nixlet.telemetry import progress
from support import image_archives as made


def scratch_files(directory: Path) -> list[int]:
    """The sizes of our unnamed files in a directory, in bytes."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            place = f"/proc/self/fd/{fd}"
            if os.readlink(place).startswith(f"{directory}/") and os.stat(place).st_nlink == 0:
                found.append(os.stat(place).st_size)
    return found


def write_all(file: io.RawIOBase, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def image_of(source: archive.Archive) -> archive.ArchiveImage:
    return source.image(model.Platform("amd64", "linux"))


async def test_a_cancelled_caller_leaves_neither_thread_nor_file(tmp_path: Path) -> None:
    """A megabyte expands to a gigabyte: whoever gives up does not go on with that."""
    whole = 1 << 30
    path, scratch = tmp_path / "bomb.tar", tmp_path / "scratch"
    scratch.mkdir()
    member = gzip.compress(bytes(16 << 20), 9)
    path.write_bytes(member * (whole >> 24))

    async def open_it() -> None:
        with path.open("rb") as file:
            async with opening.Opener(str(scratch)).opened(file.fileno(), "it", image_of):
                raise AssertionError

    opened = asyncio.create_task(open_it())
    while not any(scratch_files(scratch)):
        await asyncio.sleep(0.001)
    opened.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opened
    assert scratch_files(scratch) == []
    assert os.listdir(scratch) == []


@pytest.mark.parametrize("begun", [False, True])
async def test_whoever_gives_up_does_not_wait_for_a_pipe(tmp_path: Path, *, begun: bool) -> None:
    """On the other end is somebody who writes nothing, and doesn't go."""
    reading, writing = os.pipe()
    try:
        if begun:
            os.write(writing, b"x")

        async def open_it() -> None:
            async with opening.Opener(str(tmp_path)).opened(reading, "it", image_of, piped=True):
                raise AssertionError

        opened = asyncio.create_task(open_it())
        while scratch_files(tmp_path) != [int(begun)]:
            await asyncio.sleep(0.001)
        opened.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(opened, 20)
        assert scratch_files(tmp_path) == []
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize("kind", ["pipe", "socket"])
async def test_archives_that_bring_nothing_hold_no_thread(tmp_path: Path, kind: str) -> None:
    """As many as the loop's own executor has threads; all of them come in the end."""
    whole = made.tar(made.oci())
    count = min(32, (os.cpu_count() or 1) + 4)
    opener = opening.Opener(str(tmp_path))
    with contextlib.ExitStack() as stack:
        writers = []

        async def load(fd: int) -> tuple[str, ...]:
            async with opener.opened(fd, "it", image_of, piped=True) as (_, image):
                return tuple(image.names)

        loads = []
        for _ in range(count):
            ends = os.pipe() if kind == "pipe" else [each.detach() for each in socket.socketpair()]
            stack.callback(os.close, ends[0])
            writers.append(stack.enter_context(os.fdopen(ends[1], "wb", buffering=0)))
            writers[-1].write(whole[:100])
            loads.append(asyncio.create_task(load(ends[0])))
        try:
            async with asyncio.timeout(20):
                while scratch_files(tmp_path) != [100] * count:
                    await asyncio.sleep(0.001)
                await asyncio.to_thread(lambda: None)
                for writer in writers:
                    await asyncio.to_thread(write_all, writer, whole[100:])
                    writer.close()
                assert len(set(await asyncio.gather(*loads))) == 1
        finally:
            for task in loads:
                task.cancel()
            await asyncio.gather(*loads, return_exceptions=True)
    assert scratch_files(tmp_path) == []


async def test_an_archives_pipe_stays_as_blocking_as_it_is_and_may_have_other_readers(tmp_path: Path) -> None:
    """One that is quicker takes what was there to be read: that makes nobody wait in a thread."""
    reading, writing = os.pipe()
    opener = opening.Opener(str(tmp_path))

    async def load() -> None:
        async with opener.opened(reading, "it", image_of, piped=True):
            raise AssertionError

    try:
        loading = asyncio.create_task(load())
        while not scratch_files(tmp_path):
            await asyncio.sleep(0.001)
        for _ in range(20):
            os.write(writing, b"x")
            assert os.read(reading, 1) == b"x"
            await asyncio.sleep(0)
        assert os.get_blocking(reading)
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(loading, 20)
    finally:
        os.close(reading)
        os.close(writing)


async def test_few_archives_are_expanded_at_a_time(tmp_path: Path) -> None:
    """And none waits for one that is only used, perhaps for long."""
    path = tmp_path / "image.tar.gz"
    path.write_bytes(gzip.compress(made.tar(made.oci())))
    opener = opening.Opener(str(tmp_path))
    reading, may_read, may_leave = set[int](), threading.Event(), asyncio.Event()
    inside, most = set[int](), 0
    told: list[tuple[int, progress.Progress]] = []

    async def hold(number: int) -> None:
        def read(source: archive.Archive) -> archive.ArchiveImage:
            nonlocal most
            reading.add(number)
            most = max(most, len(reading))
            may_read.wait()
            reading.remove(number)
            return image_of(source)

        with path.open("rb") as file:
            sink = lambda step: told.append((number, step))  # noqa: E731 (it is used once)
            async with opener.opened(file.fileno(), "it", read, sink) as (_, image):
                assert image.names
                inside.add(number)
                await may_leave.wait()

    async with asyncio.timeout(30):
        holders = [asyncio.create_task(hold(number)) for number in range(5)]
        try:
            while len(told) < 3 or len(reading) < 2:
                await asyncio.sleep(0.001)
            # What is not compressed doesn't wait.
            plain = tmp_path / "image.tar"
            plain.write_bytes(gzip.decompress(path.read_bytes()))
            with plain.open("rb") as file:
                async with opener.opened(file.fileno(), "it", image_of):
                    assert len(scratch_files(tmp_path)) == 2
        finally:
            may_read.set()
        while len(inside) < 5:
            await asyncio.sleep(0.001)
        may_leave.set()
        await asyncio.gather(*holders)
    assert most == 2
    assert {step.stage for _, step in told} == {"waiting"}
    assert len({number for number, _ in told}) == 3
    assert scratch_files(tmp_path) == []
