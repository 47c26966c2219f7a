import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nixlet.host import logfiles


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def test_full_files_are_put_aside_and_the_oldest_goes(tmp_path: Path) -> None:
    with logfiles.RotatingFile(str(tmp_path / "log"), limit=20, backups=2) as file:
        for number in range(10):
            file.write(b"line %04d\n" % number)  # 10 bytes: two make a file
    assert names(tmp_path) == ["log", "log.1", "log.2"]
    assert (tmp_path / "log").read_text() == "line 0008\nline 0009\n"
    assert (tmp_path / "log.1").read_text() == "line 0006\nline 0007\n"
    assert (tmp_path / "log.2").read_text() == "line 0004\nline 0005\n"


def test_a_file_from_before_is_gone_on_with(tmp_path: Path) -> None:
    for number in range(3):
        with logfiles.RotatingFile(str(tmp_path / "log"), limit=20, backups=1) as file:
            file.write(b"line %04d\n" % number)
    assert (tmp_path / "log").read_text() == "line 0002\n"
    assert (tmp_path / "log.1").read_text() == "line 0000\nline 0001\n"


def test_a_line_longer_than_the_limit_stays_whole(tmp_path: Path) -> None:
    with logfiles.RotatingFile(str(tmp_path / "log"), limit=8, backups=3) as file:
        file.write(b"short\n")
        for piece in (b"a long line", b" in pieces", b"\nnext\n"):
            file.write(piece)
    assert (tmp_path / "log.2").read_text() == "short\n"
    assert (tmp_path / "log.1").read_text() == "a long line in pieces\n"
    assert (tmp_path / "log").read_text() == "next\n"


@given(
    lines=st.lists(st.binary(max_size=12).map(lambda text: text.replace(b"\n", b" ")), max_size=40),
    cut=st.integers(1, 17),
)
@settings(max_examples=60, deadline=None)
def test_nothing_is_lost_cut_or_swapped(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], cut: int) -> None:
    directory = tmp_path_factory.mktemp("rotated")
    text = b"".join(line + b"\n" for line in lines)
    with logfiles.RotatingFile(str(directory / "log"), limit=32, backups=100) as file:
        for start in range(0, len(text), cut):
            file.write(text[start : start + cut])
    numbers = sorted((int(name.partition(".")[2] or 0) for name in os.listdir(directory)), reverse=True)
    pieces = [(directory / (f"log.{number}" if number else "log")).read_bytes() for number in numbers]
    assert b"".join(pieces) == text
    assert all(piece.endswith(b"\n") for piece in pieces if piece)
    assert all(len(piece) <= 32 + 13 + cut for piece in pieces)


def test_what_is_no_plain_file_is_never_put_aside(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        with logfiles.RotatingFile(str(tmp_path / "pipe"), limit=8, backups=1) as file:
            for _ in range(4):
                file.write(b"a line\n")
        assert os.read(reader, 100) == b"a line\n" * 4
    finally:
        os.close(reader)
    assert names(tmp_path) == ["pipe"]


def test_a_full_disk_loses_lines_and_nothing_else(tmp_path: Path) -> None:
    full = tmp_path / "log"
    full.symlink_to("/dev/full")
    with logfiles.RotatingFile(str(full)) as file:
        file.write(b"lost\n")
        file.write(b"lost, too\n")


def test_where_no_new_file_can_be_had_the_old_one_grows_on_and_no_older_one_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        (tmp_path / f"log.{number}").write_text(f"precious {number}\n")
    real = os.open

    def refused(path: str, *more: int) -> int:
        if path.startswith(str(tmp_path)):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(path, *more)

    with logfiles.RotatingFile(str(tmp_path / "log"), limit=10, backups=2) as file:
        with monkeypatch.context() as context:
            context.setattr(os, "open", refused)
            for number in range(4):
                file.write(b"line %04d\n" % number)
        assert (tmp_path / "log").read_text() == "".join(f"line {number:04}\n" for number in range(4))
        assert [(tmp_path / f"log.{number}").read_text() for number in (1, 2)] == ["precious 1\n", "precious 2\n"]
        file.write(b"line 0004\n")
    assert names(tmp_path) == ["log", "log.1", "log.2"]
    assert (tmp_path / "log").read_text() == "line 0004\n"
    assert (tmp_path / "log.2").read_text() == "precious 1\n"


def test_a_file_that_can_not_be_put_aside_costs_no_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often that is tried: as where it may only be appended to (chattr +a)."""
    path = str(tmp_path / "log")
    for number in (1, 2, 3):
        Path(f"{path}.{number}").write_text(f"precious {number}\n")
    real = os.replace

    def refused(source: str, target: str) -> None:
        if source == path:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        real(source, target)

    monkeypatch.setattr(os, "replace", refused)
    with logfiles.RotatingFile(path, limit=10, backups=3) as file:
        for number in range(6):
            file.write(b"line %04d\n" % number)
    assert Path(path).read_text() == "".join(f"line {number:04}\n" for number in range(6))
    # One has made room, as for each that is put aside.
    assert names(tmp_path) == ["log", "log.2", "log.3"]
    assert [Path(f"{path}.{number}").read_text() for number in (2, 3)] == ["precious 1\n", "precious 2\n"]


def test_a_line_without_an_end_fills_no_disk(tmp_path: Path) -> None:
    with logfiles.RotatingFile(str(tmp_path / "log"), limit=10, backups=2) as file:
        for _ in range(1000):
            file.write(b"endless")
        file.write(b"\nlast\n")
    assert names(tmp_path) == ["log", "log.1", "log.2"]
    assert all((tmp_path / name).stat().st_size <= 10 * logfiles._STRETCH + 7 for name in names(tmp_path))
    assert (tmp_path / "log.1").read_text().endswith("endless\n")
    assert (tmp_path / "log").read_text() == "last\n"


def test_a_file_that_can_not_be_put_aside_grows_on(tmp_path: Path) -> None:
    # A directory that isn't empty is in its way.
    (tmp_path / "log.1" / "inside").mkdir(parents=True)
    with logfiles.RotatingFile(str(tmp_path / "log"), limit=10, backups=1) as file:
        for number in range(3):
            file.write(b"line %04d\n" % number)
    assert names(tmp_path) == ["log", "log.1"]
    assert (tmp_path / "log").read_text() == "line 0000\nline 0001\nline 0002\n"


def test_without_older_files_a_full_one_is_begun_anew(tmp_path: Path) -> None:
    with logfiles.RotatingFile(str(tmp_path / "log"), limit=10, backups=0) as file:
        for number in range(3):
            file.write(b"line %04d\n" % number)
    assert names(tmp_path) == ["log"]
    assert (tmp_path / "log").read_text() == "line 0002\n"
