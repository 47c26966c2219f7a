"""The mounts of deep chains: they fit into the page that the kernel takes, or are refused."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from unittest import mock

import pytest

from nixlet import errors
from nixlet.snapshots import metadata, model, mounts, tables


async def nothing_to_check() -> None:
    pass


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[metadata.Metadata]:
    made = metadata.Metadata(str(tmp_path / "nixlet.db"))
    yield made
    await made.close()


async def chain(database: metadata.Metadata, count: int) -> tables.Row:
    """An active snapshot on so many ordinary layers; what is asked for in one turn of the loop is made in that order."""
    changes: list[Awaitable[object]] = []
    parent = ""
    for number in range(count):
        changes.append(database.create_snapshot("unpacked", model.Kind.ACTIVE, parent, {}, strategy="view"))
        changes.append(database.commit_snapshot(f"layer {number}", "unpacked", {}, lambda: model.Usage(0, 0)))
        parent = f"layer {number}"
    await asyncio.gather(*changes)
    return await database.create_snapshot("container", model.Kind.ACTIVE, parent, {}, strategy="view")


@pytest.mark.parametrize("count", [128, 400, 700])
async def test_the_options_fit_into_a_page_or_are_refused(database: metadata.Metadata, count: int) -> None:
    # No layer has a closure here, so nobody is asked for one.
    made = mounts.Mounts(
        database,
        mock.sentinel.closures,
        root="/var/lib/nixlet/agent/containerd/io.containerd.snapshotter.v1.nix",
        store_dir="/nix/store",
        real_store_dir="/nix/store",
        check_targets=nothing_to_check,
    )
    row = await chain(database, count)
    if count == 700:
        with pytest.raises(errors.FailedPreconditionError, match="has 700 layers, whose names take"):
            await made.of(row)
        return
    (mount,) = await made.of(row)
    assert mount.options[-1].count(":") == count - 1
