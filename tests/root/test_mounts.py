"""Mounts of ours, as the kernel sees them."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.host import mounts


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A directory on a file system of its own that forbids to execute."""
    (tmp_path / "fs").mkdir()
    mounts.mount("tmpfs", str(tmp_path / "fs"), "tmpfs", 8)
    (tmp_path / "fs" / "pods" / "volume").mkdir(parents=True)
    (tmp_path / "bound").mkdir()
    try:
        yield tmp_path / "fs" / "pods"
    finally:
        for entry in reversed(mounts.below(str(tmp_path))):
            mounts.unmount(entry.path)


def powers(path: Path) -> tuple[bool, bool, bool]:
    """Whether set-user-ID programs, devices and programs count there."""
    flags = os.statvfs(path).f_flag
    return not flags & os.ST_NOSUID, not flags & os.ST_NODEV, not flags & os.ST_NOEXEC


def test_neither_set_user_id_nor_devices_count_in_a_powerless_directory(directory: Path, tmp_path: Path) -> None:
    assert powers(directory) == (True, True, False)
    link = tmp_path / "link"
    link.symlink_to(directory)
    with mounts.powerless(str(link)):
        assert powers(directory / "volume") == (False, False, False)
        mounts.mount(str(directory / "volume"), str(tmp_path / "bound"), "", mounts.MS_BIND)
        # Somebody is in it: it goes nevertheless.
        held = os.open(directory / "volume", os.O_RDONLY)
    os.close(held)
    assert powers(directory) == (True, True, False)
    assert [entry.path for entry in mounts.below(str(directory))] == []
    assert powers(tmp_path / "bound") == (False, False, False)


def test_what_an_earlier_owner_left_is_taken_over(directory: Path) -> None:
    mounts.mount(str(directory), str(directory), "", mounts.MS_BIND)
    with mounts.powerless(str(directory)), mounts.powerless(str(directory / "volume")):
        assert len(mounts.below(str(directory))) == 1
        assert powers(directory) == (False, False, False)
    assert mounts.below(str(directory)) == []


def test_nothing_stays_when_it_can_not_be(directory: Path) -> None:
    with pytest.raises(errors.NotFoundError), mounts.powerless(str(directory)):
        raise errors.NotFoundError("x")
    assert mounts.below(str(directory)) == []
