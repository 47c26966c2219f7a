"""Containers' logs as the node writes them."""

import os
import resource
import signal
from pathlib import Path

import pytest

from nixlet.containers import logs, logwriter


def text(path: Path, stream: str = "stdout") -> bytes:
    return b"".join(each.text for each in logs.records(str(path)) if each.stream == stream)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    writer = logwriter.LogWriter(str(path))
    for stream, data in (("stdout", b"a\n\nb"), ("stderr", b"x\r\n"), ("stdout", b"c\n"), ("stdout", b"\x00 end")):
        writer.write(stream, data)
    assert text(path) == b"a\n\nbc\n\x00 end"
    assert text(path, "stderr") == b"x\r\n"
    tags = [line.split(b" ")[2] for line in path.read_bytes().splitlines()]
    assert tags == [b"F", b"F", b"P", b"F", b"F", b"P"]
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_log_that_was_put_aside_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    writer = logwriter.LogWriter(str(path))
    writer.write("stdout", b"old\n")
    path.rename(tmp_path / "aside")
    writer.write("stdout", b"new\n")
    assert (text(tmp_path / "aside"), text(path)) == (b"old\n", b"new\n")


def test_a_log_that_went_with_its_container_is_written_no_more(tmp_path: Path) -> None:
    writer = logwriter.LogWriter(str(tmp_path / "gone" / "0.log"))
    writer.write("stdout", b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_gap_is_counted_and_stands_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    writer = logwriter.LogWriter(str(path))
    writer.write("stdout", b"begun, ")
    path.rename(tmp_path / "kept")
    path.symlink_to("/dev/full")
    for _ in range(3):
        with pytest.raises(OSError, match="No space left"):
            writer.write("stdout", b"lost\n")
    path.unlink()
    os.rename(tmp_path / "kept", path)
    writer.write("stderr", b"other\n")
    writer.write("stdout", b"found\n")
    writer.write("stdout", b"again\n")
    told = b"nixlet: 15 bytes are missing here: the log could not be written\n"
    assert text(path) == b"begun, \n" + told + b"found\nagain\n"
    assert text(path, "stderr") == b"other\n"


def test_whole_records_stay_where_the_room_ends(tmp_path: Path) -> None:
    """Whoever follows the log may have shown them."""
    path = tmp_path / "0.log"
    writer = logwriter.LogWriter(str(path))
    writer.write("stdout", b"begun, ")
    data = b"".join(b"%d\n" % number for number in range(1000))
    limit = path.stat().st_size + 10_000
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        with pytest.raises(OSError, match="File too large"):
            writer.write("stdout", data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    written = path.read_bytes()
    assert limit - 100 < len(written) <= limit
    assert written.endswith(b"\n")
    kept = text(path).removeprefix(b"begun, ")
    assert data.startswith(kept)
    assert len(kept) > 100
    writer.write("stdout", b"found\n")
    told = b"nixlet: %d bytes are missing here: the log could not be written\n" % (len(data) - len(kept))
    assert text(path) == b"begun, " + kept + told + b"found\n"


@pytest.mark.parametrize("length", [0, 1, 20, 300_000])
def test_half_a_record_goes_that_a_writer_left_who_was_killed(tmp_path: Path, length: int) -> None:
    """What it was writing is still in the pipe, and is written again."""
    path = tmp_path / "0.log"
    logwriter.LogWriter(str(path)).write("stdout", b"first\n")
    whole = path.stat().st_size
    logwriter.LogWriter(str(path)).write("stdout", b"s" * 300_000 + b"\n")
    os.truncate(path, whole + length)
    next_one = logwriter.LogWriter(str(path))
    next_one.write("stdout", b"second\n")
    next_one.write("stdout", b"third\n")
    assert text(path) == b"first\nsecond\nthird\n"
    assert [line.split(b" ")[1:3] for line in path.read_bytes().splitlines()] == [[b"stdout", b"F"]] * 3


def test_a_log_that_is_half_a_record_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    path.write_bytes(b"2026-01-01T00:00:00Z stdo")
    logwriter.LogWriter(str(path)).write("stdout", b"first\n")
    assert text(path) == b"first\n"


@pytest.mark.parametrize("other", [b"", b"more\n"])
def test_a_gap_is_told_although_its_stream_says_no_more(tmp_path: Path, other: bytes) -> None:
    path = tmp_path / "0.log"
    writer = logwriter.LogWriter(str(path))
    path.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        writer.write("stderr", b"lost")
    with pytest.raises(OSError, match="No space left"):
        writer.tell_gaps()
    path.unlink()
    if other:
        writer.write("stdout", other)
    else:
        writer.tell_gaps()
    assert text(path, "stderr") == b"nixlet: 4 bytes are missing here: the log could not be written\n"
    assert text(path) == other
    assert not writer.has_gaps
