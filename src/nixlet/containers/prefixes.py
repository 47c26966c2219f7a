"""The output of several containers in one: line by line, each with its container's name in front."""

import asyncio
import contextlib
import os

from nixlet.containers import clients, pipes

_OUTPUTS = ("stdout", "stderr")

#: A line that is longer is handed on in pieces (bytes).
_MAX_LINE = 1 << 16


class Prefixes:
    """Hands the output of containers on to one client, whose descriptors get lines from all of them."""

    def __init__(self, client: clients.Client) -> None:
        """None yet; ``client`` is whom they are for."""
        self._client = client
        self._listeners: list[clients.Client] = []
        self._reading: list[asyncio.Task[None]] = []
        self._fds = contextlib.ExitStack()

    def listener(self, prefix: str) -> clients.Client:
        """A client that listens to one container.

        Args:
            prefix: What stands in front of each of its lines.
        """
        with contextlib.ExitStack() as stack:
            outputs = {}
            for stream in _OUTPUTS:
                reader, outputs[stream] = pipes.new_pipe()
                self._fds.callback(os.close, reader)
                stack.callback(os.close, outputs[stream])
                reading = asyncio.create_task(self._read(reader, stream, prefix.encode()), name=f"lines of {prefix}")
                self._reading.append(reading)
            # It has its own of them.
            made = clients.Client(outputs)
        self._listeners.append(made)
        return made

    async def _read(self, reader: int, stream: str, prefix: bytes) -> None:
        rest = b""
        while data := await pipes.read(reader):
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > _MAX_LINE:
                lines.append(rest)
                rest = b""
            if lines:
                await self._client.give(stream, b"".join(prefix + line + b"\n" for line in lines))
        if rest:
            await self._client.give(stream, prefix + rest + b"\n")

    async def finish(self) -> None:
        """The containers have ended: wait until the client has all of their output, or is gone."""
        await asyncio.gather(*(each.finish() for each in self._listeners))
        await asyncio.gather(*self._reading)
        await self._client.finish()

    async def close(self) -> None:
        """Give up what has not been handed on."""
        for listener in self._listeners:
            listener.leave()
        for task in self._reading:
            task.cancel()
        await asyncio.gather(*self._reading, return_exceptions=True)
        self._fds.close()
