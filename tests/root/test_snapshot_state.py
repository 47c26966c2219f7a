"""The snapshotter's own state on full disks and without its database; no containerd, and no Nix store but an empty one."""

import asyncio
import contextlib
import functools
import os
import shutil
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from unittest import mock

import pytest

from nixlet import errors
from nixlet.host import files
from nixlet.snapshots import model, snapshotter, tasks
from support import disks

#: What the layers of these tests are as large as (bytes).
CONTENT = 4096


@pytest.fixture(params=["tmpfs", "ext4"])
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    with disks.disk(request.param, tmp_path / "disk", 16) as made:
        yield made


async def nothing_to_check() -> None:
    pass


def opened(root: Path) -> snapshotter.Snapshotter:
    """A snapshotter over a store without paths: nobody realises or roots anything."""
    store = root.parent / "store"
    files.new_directories(str(store))
    roots = mock.Mock()
    roots.names.return_value = []
    return snapshotter.Snapshotter(
        str(root),
        store_dir="/nix/store",
        real_store_dir=str(store),
        realise=mock.sentinel.realiser,
        gc_roots=roots,
        check_targets=nothing_to_check,
    )


@contextlib.asynccontextmanager
async def running(root: Path) -> AsyncIterator[snapshotter.Snapshotter]:
    made = opened(root)
    try:
        await made.start()
        await made.strategy()
        yield made
    finally:
        await made.close()


async def keys(made: snapshotter.Snapshotter) -> set[str]:
    return {info.name async for page in made.pages() for info in page}


async def layer(made: snapshotter.Snapshotter, name: str) -> None:
    (mount,) = await made.prepare(f"unpack {name}", "", {})
    (Path(mount.source) / "content").write_bytes(bytes(CONTENT))
    await made.commit(name, f"unpack {name}", {})


async def test_a_full_disk_loses_nothing_and_all_goes_on_when_there_is_room(small_disk: Path) -> None:
    root = small_disk / "root"
    async with running(root) as made:
        await layer(made, "base")
        await made.prepare("container", "base", {})
        # Most of the log, and as much that is not yet in the database itself.
        heavy = {f"heavy {number}" for number in range(5)}
        for key in heavy:
            await made.prepare(key, "base", {"fills": "x" * 700_000})
        disks.fill(small_disk)
        refusals = []
        for number in range(20):
            with pytest.raises(errors.ResourceExhaustedError) as caught:
                await made.prepare(f"full {number}", "base", {})
            refusals.append(caught.value)
        assert all(str(root) in error.message and error.hint.startswith("make room") for error in refusals)
        assert await keys(made) == {"base", "container", *heavy}
        # What is there can be used, and taken away, also while the disk is full.
        assert await made.mounts("container")
        for key in heavy:
            await made.remove(key)
        await made.cleanup()
        kept = {"base", "container"}
        assert await keys(made) == kept
        disks.make_room(small_disk)
        for number in range(20):
            await made.prepare(f"again {number}", "base", {})
            kept.add(f"again {number}")
        await layer(made, "later")
        await made.remove("container")
        await made.cleanup()
        kept = {*kept, "later"} - {"container"}
        assert await keys(made) == kept
        assert len(os.listdir(root / "snapshots")) == len(kept)
    async with running(root) as made:
        assert await keys(made) == kept
        assert (root / "snapshots/1/fs/content").stat().st_size == CONTENT
        assert len(os.listdir(root / "snapshots")) == len(kept)


@pytest.mark.parametrize("crashed", [False, True])
async def test_a_full_disk_is_not_taken_for_a_broken_database(small_disk: Path, tmp_path: Path, crashed: bool) -> None:
    root = small_disk / "root"
    async with running(root) as made:
        await layer(made, "base")
        for file in root.glob("nixlet.db*"):
            shutil.copy(file, tmp_path)
    if crashed:
        for file in tmp_path.glob("nixlet.db*"):
            shutil.copy(file, root)
    disks.fill(small_disk)
    # It starts, or says what is wrong; never that what is there should be moved away.
    told: errors.NixletError | None = None
    try:
        async with running(root) as made:
            assert await keys(made) == {"base"}
    except errors.NixletError as error:
        told = error
    assert told is None or isinstance(told, errors.ResourceExhaustedError), told
    assert told is None or (str(root) in told.message and told.hint.startswith("make room"))
    disks.make_room(small_disk)
    async with running(root) as made:
        assert await keys(made) == {"base"}
        await made.prepare("container", "base", {})


async def test_a_missing_database_beside_snapshots_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    database, content = root / "nixlet.db", root / "snapshots/1/fs/content"
    async with running(root) as made:
        await layer(made, "base")
    older = database.read_bytes()
    async with running(root) as made:
        await layer(made, "later")
    right = database.read_bytes()
    for wrong, why in (
        (None, "is missing, or not the one of"),
        (b"", "is missing, or not the one of"),
        (older, "is older than"),
    ):
        database.unlink()
        if wrong is not None:
            database.write_bytes(wrong)
        for _ in range(2):
            with pytest.raises(errors.FailedPreconditionError, match=why) as caught:
                opened(root)
            assert str(database) in caught.value.message
            assert f"move containerd's directory and {root} away" in caught.value.hint
        assert content.stat().st_size == CONTENT
        assert (root / "snapshots/2/fs/content").exists()
        assert database.exists() == (wrong is not None)
        database.unlink(missing_ok=True)
        database.write_bytes(right)
        async with running(root) as made:
            assert await keys(made) == {"base", "later"}
    # The way out without it.
    database.unlink()
    root.rename(tmp_path / "away")
    async with running(root) as made:
        assert await keys(made) == set()


async def test_labels_that_change_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    async with running(tmp_path / "root") as made:
        await made.prepare("a", "", {})
        changes = ({f"k{number}": "v"} for number in range(8))
        await asyncio.gather(*(made.update("a", each, [f"labels.{key}" for key in each]) for each in changes))
        assert (await made.stat("a")).labels == {f"k{number}": "v" for number in range(8)}


async def test_a_cleanup_ends_while_snapshots_come_and_go(tmp_path: Path) -> None:
    working = True

    async def work(made: snapshotter.Snapshotter, hand: int) -> None:
        turn = 0
        while working:
            await made.prepare(f"{hand}-{turn}", "", {})
            await made.remove(f"{hand}-{turn}")
            turn += 1
            # Other calls take their turns.
            await asyncio.sleep(0.002)

    async with running(tmp_path / "root") as made:
        tasks = [asyncio.create_task(work(made, hand)) for hand in range(4)]
        async with asyncio.timeout(20):
            await made.cleanup()
        working = False
        await asyncio.gather(*tasks)
        await made.cleanup()
        assert os.listdir(tmp_path / "root" / "snapshots") == []


async def test_usage_is_told_while_files_come_and_go(tmp_path: Path) -> None:
    async with running(tmp_path / "root") as made:
        (mount,) = await made.prepare("a", "", {})
        work = Path(mount.source)
        script = "while :; do mkdir -p d/e/f; : > d/e/f/g; rm -rf d; done"
        with subprocess.Popen(["/bin/sh", "-c", script], cwd=work) as churning:
            try:
                for _ in range(300):
                    assert (await made.usage("a")).inodes >= 1
            finally:
                churning.kill()
        with pytest.raises(errors.NotFoundError):
            await made.usage("b")
        assert (await made.stat("a")).kind is model.Kind.ACTIVE


async def test_an_end_does_not_wait_for_a_large_layer_to_be_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is given up between two entries, and the next start goes on with it."""
    monkeypatch.setattr(tasks.Tasks, "finish", functools.partialmethod(tasks.Tasks.finish, 0.05))
    root, unlink, unlinked = tmp_path / "root", os.unlink, list[str]()
    async with running(root) as made:
        (mount,) = await made.prepare("a", "", {})
        for number in range(50):
            (Path(mount.source) / f"file-{number}").touch()
        (Path(mount.source) / "link").symlink_to("/")
        begun, ending = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        def slow(path: str, *, dir_fd: int | None = None) -> None:
            unlink(path, dir_fd=dir_fd)
            if not path.startswith("file-"):
                return
            unlinked.append(path)
            loop.call_soon_threadsafe(begun.set)
            ending.wait(20)

        monkeypatch.setattr(os, "unlink", slow)
        await made.remove("a")
        async with asyncio.timeout(20):
            await begun.wait()
            await made.close()
        ending.set()
        await loop.shutdown_default_executor()
    assert len(unlinked) == 1
    assert len(os.listdir(mount.source)) >= 49


async def test_a_long_list_lets_others_be_served(tmp_path: Path) -> None:
    async with running(tmp_path / "root") as made:
        making = (
            made._db.create_snapshot(f"k{number}", model.Kind.VIEW, "", {}, strategy="view") for number in range(1050)
        )
        await asyncio.gather(*making)
        turns, listing = 0, True

        async def others() -> None:
            nonlocal turns
            while listing:
                turns += 1
                await asyncio.sleep(0)

        serving = asyncio.create_task(others())
        for wanted, found in ((['name=="none"'], 0), ([], 1050)):
            before = turns
            assert len([info async for page in made.pages(wanted) for info in page]) == found
            assert turns - before >= 10
        listing = False
        await serving
