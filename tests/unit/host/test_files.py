"""Files and locks."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.host import files, logfiles, mounts, process, unixsocket
from nixlet.store import paths, roots


def test_a_failed_write_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    files.write_atomically(str(path), "old", mode=0o600)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(
        errors.ResourceExhaustedError, match=r"/file can't be written: No space left on device$"
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


@pytest.fixture(params=[0o077, 0o027, 0])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    try:
        yield request.param
    finally:
        os.umask(before)


def _log(path: str) -> None:
    logfiles.RotatingFile(path).close()


def _lock(path: str) -> None:
    with files.exclusive_lock(path, what="it"):
        pass


def _root(path: str) -> None:
    roots.Roots(os.path.dirname(path), "owner").set("1", [paths.StorePath(f"/nix/store/{'a' * 32}-x")])
    os.rename(os.path.join(os.path.dirname(path), "nixlet"), path)


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize(
    ("make", "modes"),
    [
        (lambda path: files.new_directory(path, 0o1775), [0o1775]),
        (lambda path: files.make_directory(f"{path}/b/c", mode=0o700), [0o755, 0o755, 0o700]),
        (lambda path: os.close(files.new_file(path, 0o666)), [0o666]),
        (files.new_pipe, [0o600]),
        (_log, [0o640]),
        (_lock, [0o600]),
        (lambda path: files.write_atomically(path, "", mode=0o644), [0o644]),
        (lambda path: unixsocket.listen(f"{path}/s").close(), [0o700, 0o600]),
        (_root, [0o755, 0o755, 0o755]),
    ],
    ids=["directory", "parents", "file", "pipe", "log", "lock", "replaced file", "socket", "GC root"],
)
def test_modes_do_not_depend_on_the_umask(
    tmp_path: Path, make: Callable[[str], object], modes: list[int], umask: int
) -> None:
    make(str(tmp_path / "a"))
    here, found = tmp_path, []
    while here.is_dir() and not here.is_symlink() and (inside := sorted(here.iterdir())):
        here = inside[0]
        found.append(here.lstat().st_mode & 0o7777)
    assert found[: len(modes)] == modes


async def test_programs_that_are_started_have_the_usual_umask(umask: int) -> None:
    status = (await process.run(["cat", "/proc/self/status"])).check().stdout.decode()
    assert re.findall("Umask:.(.*)", status) == ["0022"]


def test_what_is_there_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir(mode=0o700)
    files.make_directory(str(tmp_path / "d"))
    assert (tmp_path / "d").stat().st_mode & 0o7777 == 0o700


def test_a_directory_that_cannot_be_is_refused_and_not_tried_for_ever(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    for place in ("/proc/none/there", str(tmp_path / "file/a"), str(tmp_path / "dangling/a")):
        with pytest.raises(errors.FailedPreconditionError, match="can't make the directory"):
            files.make_directory(place)


def test_nobody_changes_the_umask_or_makes_directories_in_another_way() -> None:
    """The umask is one for all threads; and every mode is set where directories are made."""
    source = Path(__file__).parents[3] / "src/nixlet"
    found = {
        f"{path.relative_to(source)}: {call}"
        for path in source.rglob("*.py")
        for call in re.findall(
            r"\b(?:os\.(?:umask|mkdir|makedirs|mkfifo|mknod)|shutil\.copytree|\.mkdir)\(", path.read_text()
        )
        if path.name != "files.py"
    }
    assert not found


def test_a_file_that_is_so_already_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def written(content: str = "text", mode: int = 0o600) -> int:
        files.write_atomically(str(path), content, mode=mode)
        assert not path.is_symlink()
        assert (path.read_text(), path.stat().st_mode & 0o777) == (content, mode)
        return path.stat().st_ino

    first = written()
    assert written() == first
    path.chmod(0o644)
    assert written() != first
    # Neither a link to such a file is it, nor one that has another name.
    path.rename(tmp_path / "other")
    path.symlink_to(tmp_path / "other")
    second = written()
    os.link(path, tmp_path / "another")
    assert written() != second
    assert (tmp_path / "another").stat().st_ino == second
    for content in ("text2", "Text2", ""):
        before = path.stat().st_ino
        assert written(content) != before


def test_a_link_is_put_in_the_place_of_what_has_its_name(tmp_path: Path) -> None:
    path = tmp_path / "link"
    for _ in range(2):
        files.link_atomically(str(path), "target")
        assert os.readlink(path) == "target"
    inode = path.lstat().st_ino
    files.link_atomically(str(path), "target")
    assert path.lstat().st_ino == inode
    files.link_atomically(str(path), "other")
    assert os.readlink(path) == "other"
    path.unlink()
    path.write_text("a file")
    files.link_atomically(str(path), "target")
    assert os.readlink(path) == "target"
    path.unlink()
    path.mkdir()
    with pytest.raises(errors.FailedPreconditionError, match=r"/link can't be made a link: Is a directory$"):
        files.link_atomically(str(path), "target")
    assert os.listdir(tmp_path) == ["link"]


def test_a_file_is_written_anew_for_another_group(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for group in (os.getegid(), 12345):
        files.write_atomically(str(path), "same", mode=0o640, group=group)
        assert (path.stat().st_gid, path.stat().st_mode & 0o7777) == (group, 0o640)
    inode = path.stat().st_ino
    files.write_atomically(str(path), "same", mode=0o640, group=12345)
    files.write_atomically(str(path), "same", mode=0o640)
    assert path.stat().st_ino == inode
