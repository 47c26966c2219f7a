"""Files and locks."""

import os
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.host import files, mounts


def test_a_failed_write_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    files.write_atomically(str(path), "old", mode=0o600)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(
        errors.FailedPreconditionError, match=r"/file can't be written: No space left on device$"
    ) as caught:
        files.write_atomically(str(path), "new")
    assert caught.value.hint == "make room on that file system, or choose another directory"
    assert path.read_text() == "old"
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["file"]


def test_a_second_lock_names_the_first_holder(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    with (
        files.exclusive_lock(path, what="the data directory"),
        pytest.raises(errors.FailedPreconditionError, match=f"the data directory is in use by process {os.getpid()}"),
        files.exclusive_lock(path, what="the data directory"),
    ):
        pass
    with files.exclusive_lock(path, what="the data directory"):
        pass


def test_the_mount_table_is_read(tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(
        "22 1 253:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
        "40 22 0:35 /sub\\040dir /mnt/with\\040blank ro master:2 propagate_from:1 - overlay overlay ro,lowerdir=/a:/b\n"
    )
    root, overlay = mounts.table(str(table))
    assert (root.path, root.fstype, root.source) == ("/", "ext4", "/dev/vda")
    assert (overlay.path, overlay.root, overlay.parent_id) == ("/mnt/with blank", "/sub dir", 22)
    assert overlay.options == "ro,lowerdir=/a:/b"


def test_too_long_options_are_refused_before_the_kernel_cuts_them(tmp_path: Path) -> None:
    with pytest.raises(errors.FailedPreconditionError, match="the kernel takes 4095"):
        mounts.mount("overlay", str(tmp_path), "overlay", 0, "lowerdir=" + ":".join(["/a"] * 4000))


def test_a_refused_mount_says_why(tmp_path: Path) -> None:
    with pytest.raises(errors.FailedPreconditionError, match=r"can't mount no-such-fs on .*ENODEV"):
        mounts.mount("none", str(tmp_path), "no-such-fs")
