"""Files that only root and the node's own user can change; these tests give files away, which takes root."""

import os
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.node.settings import names, trusted

STRANGER = 12345


@pytest.fixture
def file(tmp_path: Path) -> Path:
    directory = tmp_path / "etc"
    directory.mkdir()
    path = directory / "config.yaml"
    path.write_bytes(b"content")
    return path


def refused(path: Path) -> errors.PermissionDeniedError:
    with pytest.raises(errors.PermissionDeniedError) as caught:
        trusted.read(str(path), 100)
    return caught.value


def test_our_own(file: Path) -> None:
    assert trusted.read(str(file), 7) == b"content"
    file.chmod(0o444)
    file.parent.chmod(0o1777)
    assert trusted.read(str(file), 7) == b"content"


@pytest.mark.parametrize(("mode", "who"), [(0o664, "group 0"), (0o646, "everyone"), (0o666, "everyone")])
def test_a_file_that_others_can_write(file: Path, mode: int, who: str) -> None:
    file.chmod(mode)
    error = refused(file)
    assert error.message == f"{file} can be written by {who}, who could have the node run anything"
    assert error.hint.endswith(f"chmod go-w {file}")


def test_a_strangers_file(file: Path) -> None:
    os.chown(file, STRANGER, -1)
    error = refused(file)
    assert error.message == f"{file} belongs to user {STRANGER}, who could have the node run anything"
    assert error.hint.endswith(f"chown root {file}")


def test_a_directory_where_others_can_replace_it(file: Path) -> None:
    file.parent.chmod(0o777)
    assert refused(file).message.startswith(f"{file.parent} can be written by everyone")
    file.parent.chmod(0o775)
    assert refused(file).message.startswith(f"{file.parent} can be written by group 0")
    file.parent.chmod(0o1755)
    os.chown(file.parent, STRANGER, -1)
    assert refused(file).message.startswith(f"{file.parent} belongs to user {STRANGER}")


def test_links_are_followed_and_every_step_is_looked_at(file: Path, tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    middle = tmp_path / "middle"
    for directory in (outer, middle):
        directory.mkdir()
    (outer / "config.yaml").symlink_to("../middle/link")
    (middle / "link").symlink_to(file)
    assert trusted.read(str(outer / "config.yaml"), 7) == b"content"
    for directory in (outer, middle, file.parent):
        directory.chmod(0o777)
        assert refused(outer / "config.yaml").message.startswith(f"{directory} can be written by everyone")
        directory.chmod(0o755)
    file.chmod(0o666)
    assert refused(outer / "config.yaml").message.startswith(f"{outer}/config.yaml can be written by everyone")


def test_what_is_no_file(file: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(errors.UsageError, match=f"the configuration file {path} is not a regular file"):
            trusted.read(str(path), 100)
    with pytest.raises(errors.UsageError, match=f"the configuration file {tmp_path} can't be read: Is a directory"):
        trusted.read(str(tmp_path), 100)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name, reason in (("loop", "Too many levels"), ("dangling", "No such file"), ("etc/config.yaml/x", "Not a dir")):
        with pytest.raises(
            errors.UsageError, match=f"the configuration file {tmp_path}/{name} can't be read: {reason}"
        ):
            trusted.read(str(tmp_path / name), 100)


def test_a_file_that_is_too_large(file: Path) -> None:
    with pytest.raises(errors.UsageError, match="is larger than 6 bytes"):
        trusted.read(str(file), 6)


def test_a_directory_for_files(tmp_path: Path) -> None:
    trusted.check_directory(str(tmp_path))
    tmp_path.chmod(0o1777)
    with pytest.raises(errors.PermissionDeniedError, match="can be written by everyone"):
        trusted.check_directory(str(tmp_path))


@pytest.fixture
def inside(file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As in a namespace whose root is somebody else, to whom root's files are a stranger's."""
    monkeypatch.setattr("nixlet.host.userns.is_inside", lambda: True)
    monkeypatch.setattr(os, "geteuid", lambda: STRANGER + 1)
    monkeypatch.setenv(names.INSIDE, trusted.of_root([str(file)]))
    real = os.fstat, os.stat

    def seen(status: os.stat_result) -> os.stat_result:
        owner = STRANGER if status.st_uid == 0 else status.st_uid
        return os.stat_result((*status[:4], owner, *status[5:]))

    monkeypatch.setattr(os, "fstat", lambda fd: seen(real[0](fd)))
    monkeypatch.setattr(os, "stat", lambda path, **more: seen(real[1](path, **more)))
    return file


def test_in_a_namespace_what_is_roots_is_known_from_outside(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert trusted.read(str(inside), 7) == b"content"
    monkeypatch.delenv(names.INSIDE)
    error = refused(inside)
    assert error.message == f"{inside} belongs to another user, who could have the node run anything"


def test_in_a_namespace_another_file_is_a_strangers(inside: Path) -> None:
    """Also one in the same directory: from there nobody can tell who made it."""
    other = inside.parent / "other.yaml"
    other.write_text("content")
    assert refused(other).message.startswith(f"{other} belongs to another user")


def test_outside_of_a_namespace_the_variable_says_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.chown(file, STRANGER, -1)
    status = file.stat()
    monkeypatch.setenv(names.INSIDE, f"{status.st_dev}:{status.st_ino}")
    assert refused(file).message.startswith(f"{file} belongs to user {STRANGER}")
