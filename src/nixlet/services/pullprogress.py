"""Telling a client what the pulls are doing that it waits for."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from nixlet.images import obtaining
from nixlet.telemetry import progress
from nixlet.varlink import server


class _Teller:
    """Sends the latest news: a client that reads slowly misses steps, and holds nothing up."""

    def __init__(self, call: server.Call[Any]) -> None:
        self._call = call
        self._news: dict[str, progress.Progress | None] = {}
        self._more = asyncio.Event()
        self._ended = False

    def tell(self, image: str, step: progress.Progress | None) -> None:
        self._news[image] = step
        self._more.set()

    def end(self) -> None:
        self._ended = True
        self._more.set()

    async def send(self) -> None:
        while not self._ended:
            await self._more.wait()
            self._more.clear()
            while self._news:
                image, step = self._news.popitem()
                await self._call.reply({"progress": {"image": image, **({} if step is None else step._asdict())}})


@contextlib.asynccontextmanager
async def told(call: server.Call[Any]) -> AsyncIterator[obtaining.Teller]:
    """Tell a client of the steps of pulls, for the time of the context, by replies ``{progress: …}``; one that takes one reply gets none."""
    if not call.more:
        yield obtaining.tell_nobody
        return
    teller = _Teller(call)
    sending = asyncio.create_task(teller.send(), name="progress")
    try:
        yield teller.tell
    finally:
        # Half a reply would be none: what is being sent is sent to its end, or until the client is gone.
        teller.end()
        await sending
