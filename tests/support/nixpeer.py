"""A fake Nix daemon on a real socket, which follows scripts: for what the real one won't do on command."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from nixlet.store.daemon import client, wire

LAST = wire.integer(wire.STDERR_LAST)

Script = Callable[["Peer"], Awaitable[None]]


def failure(message: str) -> bytes:
    head = wire.string("Error") + wire.integer(0) + wire.string("Error") + wire.string(message) + wire.integer(0)
    return wire.integer(wire.STDERR_ERROR) + head + wire.integer(1) + wire.integer(0) + wire.string("while testing")


class Peer:
    """The fake daemon's end of a connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def integer(self) -> int:
        return int.from_bytes(await self.reader.readexactly(8), "little")

    async def string(self) -> str:
        length = await self.integer()
        return (await self.reader.readexactly(length + -length % 8))[:length].decode()

    async def strings(self) -> list[str]:
        return [await self.string() for _ in range(await self.integer())]

    def send(self, *parts: bytes) -> None:
        self.writer.write(b"".join(parts))

    async def greet(self, version: int = 1 << 8 | 35) -> None:
        assert await self.integer() == wire.CLIENT_MAGIC
        self.send(wire.integer(wire.SERVER_MAGIC), wire.integer(version))
        minor = min(await self.integer(), version) & 0xFF
        assert (await self.integer(), await self.integer()) == (0, 0)
        if minor >= 33:
            self.send(wire.string("fake 1.0"))
        if minor >= 35:
            self.send(wire.integer(1))
        self.send(LAST)
        await self.asked_for_options()
        self.send(LAST)

    async def asked_for_options(self) -> None:
        """Which also tells a user of a kept connection whether it answers."""
        assert await self.integer() == 19  # SetOptions
        for _ in range(12):
            await self.integer()
        assert await self.integer() == 0

    async def valid_paths(self, *answer: str) -> list[str]:
        assert await self.integer() == 31
        asked = await self.strings()
        assert await self.integer() == 0
        self.send(LAST, wire.strings(answer))
        return asked

    async def ended(self) -> bool:
        return await self.reader.read() == b""


@contextlib.asynccontextmanager
async def daemon(tmp_path: Path, *scripts: Script) -> AsyncIterator[client.DaemonStore]:
    """A store kept by a daemon that follows a script on each of its connections; what a script raises fails the test.

    So does a connection more, or less.
    """
    done: list[asyncio.Future[None]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        result: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.append(result)
        try:
            await scripts[len(done) - 1](Peer(reader, writer))
        except Exception as error:  # noqa: BLE001 (raised again in the test)
            result.set_exception(error)
        else:
            result.set_result(None)
        writer.close()

    socket = str(tmp_path / "socket")
    async with await asyncio.start_unix_server(serve, socket):
        yield client.DaemonStore(client.DaemonSettings(socket=socket, stdio=("no-nix-daemon",)))
        async with asyncio.timeout(10):
            await asyncio.gather(*done)
        assert len(done) == len(scripts)
