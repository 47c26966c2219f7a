"""The output of several containers in one, line by line."""

import asyncio
import os

from nixlet.containers import clients, prefixes
from support import pipes


async def read_all(fd: int) -> bytes:
    data = b""
    while more := await asyncio.to_thread(os.read, fd, 1 << 16):
        data += more
    return data


async def test_each_line_has_its_containers_name() -> None:
    with pipes.pipe() as out, pipes.pipe() as err:
        client = clients.Client({"stdout": out.writer, "stderr": err.writer})
        out.write_end.close()
        err.write_end.close()
        lines = prefixes.Prefixes(client)
        try:
            web, job = lines.listener("web: "), lines.listener("job: ")
            await web.give("stdout", b"one\ntw")
            await web.give("stdout", b"o\n\n")
            await job.give("stderr", b"\xff bytes\nno end")
            await asyncio.wait_for(lines.finish(), 10)
        finally:
            await lines.close()
        assert await read_all(out.reader) == b"web: one\nweb: two\nweb: \n"
        assert await read_all(err.reader) == b"job: \xff bytes\njob: no end\n"


async def test_a_reader_that_goes_is_known_and_nothing_is_held_up() -> None:
    with pipes.pipe() as out:
        client = clients.Client({"stdout": out.writer})
        out.write_end.close()
        out.read_end.close()
        lines = prefixes.Prefixes(client)
        try:
            web = lines.listener("web: ")
            await web.give("stdout", b"one\n")
            await asyncio.wait_for(client.gone.wait(), 10)
            for _ in range(100):
                await web.give("stdout", b"two\n" * 10_000)
            await asyncio.wait_for(lines.finish(), 10)
        finally:
            await lines.close()
        assert client.reader_gone
