"""Which archives outside the store may be opened: one answer for all that may not."""

import os
import socket
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.images import admission

OWN = {0, os.getuid()}


@pytest.fixture
def allowed(tmp_path: Path) -> Path:
    directory = tmp_path / "images"
    (directory / "sub").mkdir(parents=True)
    (directory / "a.tar").write_bytes(b"content")
    (directory / "sub" / "b.tar").write_bytes(b"below")
    (tmp_path / "secret").write_bytes(b"secret")
    return directory


@pytest.mark.parametrize(("name", "content"), [("a.tar", b"content"), ("sub/b.tar", b"below")])
def test_an_archive_in_its_place_is_opened(allowed: Path, name: str, content: bytes) -> None:
    with admission.open_allowed_archive(f"{allowed}/{name}", ["/nowhere", str(allowed)], OWN) as fd:
        assert os.read(fd, 100) == content
        assert not os.get_inheritable(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_link_in_the_administrators_own_path_is_followed(allowed: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(allowed)
    with admission.open_allowed_archive(f"{tmp_path}/link/a.tar", [f"{tmp_path}/link/"], OWN) as fd:
        assert os.read(fd, 100) == b"content"


def test_all_that_is_refused_looks_alike(allowed: Path, tmp_path: Path) -> None:
    (allowed / "link.tar").symlink_to(allowed / "a.tar")
    (allowed / "out").symlink_to(tmp_path)
    (allowed / "loop").symlink_to("loop")
    os.mkfifo(allowed / "fifo.tar")
    (allowed / "open.tar").write_bytes(b"x")
    (allowed / "open.tar").chmod(0o666)
    (tmp_path / "images-not").mkdir()
    (tmp_path / "images-not" / "a.tar").write_bytes(b"x")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{allowed}/s")
    # What all get to know is one sentence; the reason is for those who may see these files.
    refused = {
        f"{allowed}/missing.tar": "can't be opened: No such file or directory",
        f"{allowed}/link.tar": "/link.tar is a symbolic link",
        f"{allowed}/out/secret": "/out is a symbolic link",
        f"{allowed}/loop": "/loop is a symbolic link",
        f"{allowed}/loop/x": "/loop is a symbolic link",
        f"{allowed}/fifo.tar": "it is no regular file",
        f"{allowed}/open.tar": "can be written by everyone",
        f"{allowed}/s": "it is no regular file",
        f"{allowed}/sub": "it is no regular file",
        f"{allowed}": "lies below none of the archive directories",
        f"{allowed}/": "is not written without",
        f"{allowed}/a.tar/x": "can't be opened: Not a directory",
        f"{allowed}/../secret": "is not written without",
        f"{allowed}/sub/../../secret": "is not written without",
        f"{tmp_path}/secret": "lies below none of the archive directories",
        f"{tmp_path}/images-not/a.tar": "lies below none of the archive directories",
        "/dev/null": "lies below none of the archive directories",
    }
    hints = set()
    for path, reason in refused.items():
        with (
            pytest.raises(admission.NotAdmittedError) as caught,
            admission.open_allowed_archive(path, [str(allowed)], OWN),
        ):
            pass
        assert str(caught.value) == f"there is no image archive {path}"
        assert str(allowed) in caught.value.hint
        hints.add(caught.value.hint)
        assert reason in str(caught.value.reason)
    assert len(hints) == 1


def test_only_trusted_owners_files_are_opened(allowed: Path) -> None:
    with (
        pytest.raises(errors.NotFoundError),
        admission.open_allowed_archive(f"{allowed}/a.tar", [str(allowed)], {os.getuid() + 1}),
    ):
        pass


def test_nothing_stays_open(allowed: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for name in ("a.tar", "sub/b.tar", "missing", "sub"):
        try:
            with admission.open_allowed_archive(f"{allowed}/{name}", [str(allowed)], OWN):
                pass
        except errors.NotFoundError:
            continue
    assert len(os.listdir("/proc/self/fd")) == before
