"""What a sweep deletes, told when it is gone."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import pytest

from nixlet.snapshots import closures as closures_module
from nixlet.snapshots import disk, faults, metadata, model, sweep, tasks


class NoClosures:
    """In the place of closures, where there are none."""

    async def sweep(self) -> list[str]:
        return []


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[metadata.Metadata]:
    made = metadata.Metadata(str(tmp_path / "nixlet.db"))
    yield made
    await made.close()


@pytest.fixture
def sweeper(tmp_path: Path, database: metadata.Metadata) -> sweep.Sweeper:
    (tmp_path / "snapshots").mkdir()
    return sweep.Sweeper(
        database,
        cast("closures_module.Closures", NoClosures()),
        snapshots=str(tmp_path / "snapshots"),
        spares=disk.Spares(str(tmp_path / "spare")),
        tasks=tasks.Tasks(),
        faults=faults.Faults(),
    )


class Held:
    """Holds up a deletion in the middle."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        unlink = os.unlink

        def slow(path: str, *, dir_fd: int | None = None) -> None:
            if path == "file" and not self.begun.is_set():
                self.begun.set()
                assert self.go_on.wait(60)
            unlink(path, dir_fd=dir_fd)

        monkeypatch.setattr(os, "unlink", slow)


async def test_what_two_delete_is_told_gone_by_neither_before_it_is(
    database: metadata.Metadata, sweeper: sweep.Sweeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    left = tmp_path / "snapshots" / "7"
    (left / "fs").mkdir(parents=True)
    (left / "fs" / "file").touch()
    first = asyncio.create_task(sweeper.sweep())
    assert await asyncio.to_thread(held.begun.wait, 60)
    others = [asyncio.create_task(sweeper.sweep()) for _ in range(2)]
    # The first gives up, but is in the middle of something.
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    for _ in range(3):
        await database.settled()
    done, _ = await asyncio.wait(others, timeout=0.2)
    assert not done
    held.go_on.set()
    async with asyncio.timeout(60):
        assert await asyncio.gather(*others) == [["snapshot directory 7"]] * 2
    assert not left.exists()


async def test_a_removed_snapshot_that_is_being_deleted_is_gone_when_a_sweep_has_ended(
    database: metadata.Metadata, sweeper: sweep.Sweeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    row = await database.create_snapshot("a", model.Kind.ACTIVE, "", {}, strategy="view")
    directory = tmp_path / "snapshots" / str(row.id)
    (directory / "fs").mkdir(parents=True)
    (directory / "fs" / "file").touch()
    sweeper.free(await database.remove_snapshot("a"))
    assert await asyncio.to_thread(held.begun.wait, 60)
    sweeping = asyncio.create_task(sweeper.sweep())
    done, _ = await asyncio.wait([sweeping], timeout=0.2)
    assert not done
    held.go_on.set()
    async with asyncio.timeout(60):
        await sweeping
    assert not directory.exists()
