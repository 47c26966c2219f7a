"""How a node opens archives: threads end with their callers, and compressed ones wait for each other."""

import asyncio
import contextlib
import gzip
import os
from pathlib import Path

import pytest

from nixlet.images import archive, model, opening
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


async def test_few_archives_are_expanded_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "image.tar.gz"
    path.write_bytes(gzip.compress(made.tar(made.oci())))
    opener = opening.Opener(str(tmp_path))
    inside, most, may_leave = 0, 0, asyncio.Event()

    async def hold() -> None:
        nonlocal inside, most
        with path.open("rb") as file:
            async with opener.opened(file.fileno(), "it", image_of) as (_, image):
                assert image.names
                inside += 1
                most = max(most, inside)
                await may_leave.wait()
                inside -= 1

    holders = [asyncio.create_task(hold()) for _ in range(5)]
    while inside < 2:
        await asyncio.sleep(0.001)
    for _ in range(20):
        await asyncio.sleep(0.001)
    # What is not compressed doesn't wait.
    plain = tmp_path / "image.tar"
    plain.write_bytes(gzip.decompress(path.read_bytes()))
    with plain.open("rb") as file:
        async with opener.opened(file.fileno(), "it", image_of):
            assert len(scratch_files(tmp_path)) == 2
    may_leave.set()
    await asyncio.gather(*holders)
    assert most == 2
    assert scratch_files(tmp_path) == []
