"""Files that take for ever, in threads that nobody waits for."""

import asyncio
import os
import threading
from pathlib import Path

import pytest

from nixlet.host import filethread


async def test_what_a_function_returns_or_raises(tmp_path: Path) -> None:
    place = tmp_path / "file"
    file = filethread.FileThread(os.open(place, os.O_RDWR | os.O_CREAT))
    assert await file.call(lambda fd: os.write(fd, b"some")) == 4
    with pytest.raises(OSError, match="Invalid argument"):
        await file.call(lambda fd: os.lseek(fd, -1, os.SEEK_SET))
    file.close()
    await asyncio.wait_for(file.closed(), 10)
    assert place.read_bytes() == b"some"


async def test_who_goes_does_not_wait_and_the_descriptor_stays_as_long_as_it_is_used(tmp_path: Path) -> None:
    come_back, begun = threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    numbers: list[int] = []

    def hang(fd: int) -> None:
        numbers.append(fd)
        loop.call_soon_threadsafe(begun.set)
        come_back.wait()
        numbers.append(os.fstat(fd).st_ino)

    place = tmp_path / "file"
    file = filethread.FileThread(os.open(place, os.O_RDWR | os.O_CREAT))
    waiting = asyncio.create_task(file.call(hang))
    try:
        await asyncio.wait_for(begun.wait(), 10)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        file.close()
        # Its number is nobody else's yet.
        assert os.fstat(numbers[0]).st_ino == place.stat().st_ino
    finally:
        come_back.set()
    await asyncio.wait_for(file.closed(), 10)
    assert numbers[1:] == [place.stat().st_ino]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(numbers[0])
