"""The probe of strategies: what it finds, where it looks, and how long it keeps that."""

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.host import mounts
from nixlet.snapshots import model, probe

MS_REMOUNT = 32


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "store" / "pkg" / "bin").mkdir(parents=True)
    return tmp_path / "store"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def on_overlay(tmp_path: Path) -> Iterator[Path]:
    """A directory on an overlay, as a container's own root is."""
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    options = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    mounts.mount("overlay", str(tmp_path / "merged"), "overlay", 0, options)
    yield tmp_path / "merged"
    mounts.unmount(str(tmp_path / "merged"))


async def test_both_strategies_work_here_and_nothing_is_left(root: Path, store: Path) -> None:
    assert await probe.findings(str(root), str(store)) == {"view": "", "bind": ""}
    assert await probe.choose("auto", str(root), str(store)) is model.Strategy.VIEW
    assert await probe.choose("bind", str(root), str(store)) is model.Strategy.BIND
    assert os.listdir(root) == ["probe.json"]
    # Others mount as well meanwhile.
    assert mounts.below(str(root)) == []
    assert os.listdir(store) == ["pkg"]


async def test_roots_that_a_program_shows(root: Path, store: Path) -> None:
    overlay = model.Overlay.FUSE_OVERLAYFS
    assert await probe.findings(str(root), str(store), overlay) == {"view": "", "bind": ""}
    assert os.listdir(root) == ["probe.json"]
    assert mounts.below(str(root)) == []
    assert os.listdir(store) == ["pkg"]
    # What was found for one kind of roots says nothing of another.
    kept = json.loads((root / "probe.json").read_text())
    kept["findings"]["view"] = "so it was found"
    (root / "probe.json").write_text(json.dumps(kept))
    assert (await probe.findings(str(root), str(store), overlay))["view"] == "so it was found"
    assert (await probe.findings(str(root), str(store)))["view"] == ""


async def test_a_root_behind_a_link_costs_the_store_nothing(root: Path, store: Path, tmp_path: Path) -> None:
    (store / "pkg" / "bin" / "hello").write_text("hello")
    (tmp_path / "link").symlink_to(tmp_path)
    for _ in range(2):
        assert (await probe.findings(str(tmp_path / "link" / "root"), str(store)))["bind"] == ""
        assert os.listdir(root) == ["probe.json"]
        assert (store / "pkg" / "bin" / "hello").read_text() == "hello"
        (root / "probe.json").unlink()


async def test_findings_are_kept_for_one_boot_and_one_device(root: Path, store: Path) -> None:
    await probe.findings(str(root), str(store))
    kept = json.loads((root / "probe.json").read_text())
    kept["findings"]["view"] = "so it was found"
    (root / "probe.json").write_text(json.dumps(kept))
    assert (await probe.findings(str(root), str(store)))["view"] == "so it was found"
    assert await probe.choose("auto", str(root), str(store)) is model.Strategy.BIND
    changes: list[object] = [
        {**kept, "circumstances": ["another boot", *kept["circumstances"][1:]]},
        {"circumstances": 1},
        [],
    ]
    for changed in changes:
        (root / "probe.json").write_text(json.dumps(changed))
        assert (await probe.findings(str(root), str(store)))["view"] == ""


async def test_snapshots_on_an_overlay_are_refused(on_overlay: Path, store: Path) -> None:
    with pytest.raises(
        errors.UnsupportedError, match=f"can't be given a root file system below {on_overlay}"
    ) as caught:
        await probe.choose("auto", str(on_overlay), str(store))
    assert caught.value.hint is not None
    assert "volume" in caught.value.hint
    # Only what works is kept: what doesn't is tried again, here and there a volume is mounted meanwhile.
    assert os.listdir(on_overlay) == []


async def test_a_store_on_an_overlay_is_too_deep_for_views_but_can_be_bound(root: Path, on_overlay: Path) -> None:
    (on_overlay / "pkg" / "bin").mkdir(parents=True)
    found = await probe.findings(str(root), str(on_overlay))
    assert found["bind"] == ""
    assert await probe.choose("auto", str(root), str(on_overlay)) is model.Strategy("bind" if found["view"] else "view")
    with pytest.raises(errors.UnsupportedError, match="stacked too deep"):
        await probe.choose("view", str(root), str(on_overlay))


async def test_a_full_disk_is_told_and_nothing_is_kept_of_it(root: Path, store: Path) -> None:
    mounts.mount("tmpfs", str(root), "tmpfs", 0, "size=16k")
    try:
        (root / "filling").write_bytes(b"x" * (12 << 10))
        with pytest.raises(
            errors.ResourceExhaustedError, match=f"can't be tried below {root} .*No space left"
        ) as caught:
            await probe.choose("auto", str(root), str(store))
        assert "make room" in caught.value.hint
        (root / "filling").unlink()
        mounts.mount("tmpfs", str(root), "tmpfs", MS_REMOUNT, "size=1m")
        assert await probe.choose("auto", str(root), str(store)) is model.Strategy.VIEW
    finally:
        mounts.unmount(str(root))


async def test_what_a_killed_probe_left_is_swept_and_a_running_one_is_not_disturbed(root: Path) -> None:
    (root / ".probe-killed" / "work").mkdir(parents=True)
    (root / ".probe-running").mkdir()
    fd = os.open(root / ".probe-running", os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        probe.sweep(str(root))
        assert os.listdir(root) == [".probe-running"]
    finally:
        os.close(fd)
    probe.sweep(str(root))
    assert os.listdir(root) == []
