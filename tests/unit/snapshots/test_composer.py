"""The mounts of deep chains: they fit into the page that the kernel takes, or are refused."""

from collections.abc import AsyncIterator
from pathlib import Path
from unittest import mock

import pytest

from nixlet import errors
from nixlet.snapshots import composer, metadata, model


async def nothing_to_check() -> None:
    pass


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[metadata.Metadata]:
    made = metadata.Metadata(str(tmp_path / "nixlet.db"))
    yield made
    made.close()


async def chain(database: metadata.Metadata, count: int) -> metadata.Row:
    """An active snapshot on so many ordinary layers."""

    def make() -> metadata.Row:
        parent = ""
        for number in range(count):
            database.insert_snapshot("unpacked", model.Kind.ACTIVE, parent, {}, None, "view")
            database.commit_snapshot(f"layer {number}", "unpacked", {}, model.Usage(0, 0))
            parent = f"layer {number}"
        return database.insert_snapshot("container", model.Kind.ACTIVE, parent, {}, None, "view")

    return await database.write(make)


@pytest.mark.parametrize("count", [128, 400, 700])
async def test_the_options_fit_into_a_page_or_are_refused(database: metadata.Metadata, count: int) -> None:
    # No layer has a closure here, so nobody is asked for one.
    made = composer.Composer(
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
            await made.mounts(row)
        return
    (mount,) = await made.mounts(row)
    assert mount.options[-1].count(":") == count - 1
