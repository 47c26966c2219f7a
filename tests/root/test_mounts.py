"""Mounts of ours, as the kernel sees them."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.host import mounts
from nixlet.pods import directories
from nixlet.snapshots import disk, probe


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


@pytest.mark.parametrize(
    "remove",
    [
        mounts.remove_tree,
        directories.remove,
        lambda place: disk.remove_trees([place]),
        lambda place: probe.sweep(os.path.dirname(place)),
    ],
    ids=["tree", "pod", "snapshot", "probe"],
)
def test_nothing_is_deleted_through_a_mount_however_its_directory_is_named(
    directory: Path, tmp_path: Path, remove: Callable[[str], None]
) -> None:
    (tmp_path / "link").symlink_to(directory)
    (tmp_path / "bound" / "kept").touch()
    (directory / ".probe-1" / "inside").mkdir(parents=True)
    mounts.mount(str(tmp_path / "bound"), str(directory / ".probe-1" / "inside"), "", mounts.MS_BIND)
    place = tmp_path / "link" / ".probe-1"
    assert [entry.path for entry in mounts.below(str(place))] == [str(directory / ".probe-1" / "inside")]
    with contextlib.suppress(errors.FailedPreconditionError):
        remove(str(place))
    assert (tmp_path / "bound" / "kept").exists()
    mounts.unmount(str(place / "inside"))
    remove(str(place))
    assert not place.exists()


def test_nothing_can_be_written_through_what_is_bound_to_be_read(directory: Path, tmp_path: Path) -> None:
    (directory / "volume" / "file").touch()
    mounts.bind_read_only(str(directory / "volume"), str(tmp_path / "bound"))
    assert powers(tmp_path / "bound") == powers(directory)
    with pytest.raises(OSError, match="Read-only"):
        (tmp_path / "bound" / "file").unlink()
    with pytest.raises(errors.FailedPreconditionError):
        mounts.bind_read_only(str(directory / "none"), str(tmp_path / "bound"))


def test_somebodys_own_file_system_stays_mounted(directory: Path) -> None:
    mounts.mount("tmpfs", str(directory), "tmpfs", mounts.MS_NOSUID)
    (directory / "own").touch()
    before = mounts.below(str(directory))
    with mounts.powerless(str(directory)):
        assert powers(directory) == (False, False, True)
        assert (directory / "own").exists()
    assert mounts.below(str(directory)) == before
    # Also another part of the same file system.
    mounts.unmount(str(directory))
    (directory.parent / "other").mkdir()
    mounts.mount(str(directory.parent / "other"), str(directory), "", mounts.MS_BIND)
    before = mounts.below(str(directory))
    # And what an earlier owner left on top of it goes.
    mounts.mount(str(directory), str(directory), "", mounts.MS_BIND)
    with mounts.powerless(str(directory)):
        assert powers(directory) == (False, False, False)
    assert mounts.below(str(directory)) == before


def test_what_is_mounted_from_itself_goes_and_a_disk_stays(directory: Path) -> None:
    """A kubelet mounts its directory on itself; a person may have mounted a disk there before."""

    def there() -> list[str]:
        return [entry.fstype for entry in mounts.below(str(directory))]

    mounts.unbind(str(directory))
    mounts.mount(str(directory), str(directory), "", mounts.MS_BIND)
    assert len(there()) == 1
    mounts.unbind(str(directory))
    assert there() == []
    mounts.mount("ramfs", str(directory), "ramfs")
    mounts.mount(str(directory), str(directory), "", mounts.MS_BIND)
    assert there() == ["ramfs", "ramfs"]
    for _ in range(2):
        mounts.unbind(str(directory))
        assert there() == ["ramfs"]
