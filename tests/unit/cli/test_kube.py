"""Playing pods for a person who interrupts that."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from nixlet.cli import kube, playing
from nixlet.containers import logrecords, model
from nixlet.pods import player


class Connection:
    """A node whose call is interrupted when it is hung up, which no person can do on purpose."""

    def __init__(self) -> None:
        self.removed: list[str] = []

    @contextlib.asynccontextmanager
    async def played(self, pod: model.Pod) -> AsyncIterator[playing.Played]:
        stream: Any = None
        yield playing.Played(stream, player.RunningPod(pod, "sandbox", (player.RunningContainer("c", "id", "log"),)))
        raise asyncio.CancelledError

    async def output(self, _container: str, _log: str) -> AsyncIterator[logrecords.Record]:
        yield logrecords.Record("", "stdout", b"")

    async def wait(self, _container: str) -> int:
        return 0

    async def remove_pod(self, sandbox: str, *, grace: int) -> None:
        assert grace == -1
        self.removed.append(sandbox)


async def test_nothing_is_left_by_an_interruption_at_any_moment() -> None:
    connection: Any = Connection()
    with pytest.raises(asyncio.CancelledError):
        await kube._run_to_end(connection, model.Pod("p"), summary=False)
    assert connection.removed == ["sandbox"]
