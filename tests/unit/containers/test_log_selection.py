"""Which part of a log is wanted: --tail and --since."""

import datetime
import os
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.containers import logrecords, logs

NOW = datetime.datetime(2026, 3, 1, 12, 0, 0, tzinfo=datetime.UTC)
LOG = b"".join(
    b"2026-03-01T11:00:0%d.123456789Z stdout %s\n" % (number, text)
    for number, text in enumerate([b"F one", b"P two-", b"F three", b"F four", b"P five"])
)


def texts(path: Path, lines: int) -> list[bytes]:
    return [record.text for record in logs.records(str(path), lines=lines)]


def test_tails() -> None:
    said = {"all": None, "-1": None, "-12": None, "0": 0, "-0": 0, "12": 12}
    assert {text: logrecords.parse_tail(text) for text in said} == said
    for text in ("", "-", "--1", "-x", "1.5", "x", "9" * 20, "²"):
        with pytest.raises(errors.UsageError, match="--tail"):
            logrecords.parse_tail(text)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("10m", NOW - datetime.timedelta(minutes=10)),
        ("1h30m5s", NOW - datetime.timedelta(hours=1, minutes=30, seconds=5)),
        ("1.5h", NOW - datetime.timedelta(minutes=90)),
        ("250ms", NOW - datetime.timedelta(milliseconds=250)),
        ("2026-02-28T10:00:00Z", datetime.datetime(2026, 2, 28, 10, tzinfo=datetime.UTC)),
        ("2026-02-28T10:00:00.5+02:00", datetime.datetime(2026, 2, 28, 8, 0, 0, 500000, tzinfo=datetime.UTC)),
    ],
)
def test_since(text: str, moment: datetime.datetime) -> None:
    assert logrecords.parse_since(text, NOW) == moment


@pytest.mark.parametrize("text", ["m", "10", "10x", "yesterday", "-5m", "5m3h", "9" * 400 + "h"])
def test_what_is_no_moment(text: str) -> None:
    with pytest.raises(errors.UsageError, match="--since"):
        logrecords.parse_since(text, NOW)


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (0, b""),
        (1, b"five"),
        (2, b"four\nfive"),
        (3, b"two-three\nfour\nfive"),
        (4, b"one\ntwo-three\nfour\nfive"),
        (99, b"one\ntwo-three\nfour\nfive"),
    ],
)
def test_the_last_lines(tmp_path: Path, lines: int, text: bytes) -> None:
    path = tmp_path / "0.log"
    path.write_bytes(LOG)
    assert b"".join(texts(path, lines)) == text
    with logs.at(str(path)) as log:
        pieces = [each for each in logs.follow(log, lambda: True, lines=lines) if isinstance(each, bytes)]
    assert b"".join(record.text for piece in pieces for record in logrecords.parse(piece)) == text


def test_the_tail_of_a_log_that_is_not_there(tmp_path: Path) -> None:
    assert not texts(tmp_path / "0.log", 3)


def test_the_last_lines_are_found_from_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read = tmp_path / "0.log", []
    path.write_bytes(b"".join(b"2026-03-01T11:00:00Z stdout F %d\n" % number for number in range(100_000)))

    def counted(fd: int, size: int, offset: int) -> bytes:
        read.append(size)
        return real(fd, size, offset)

    real = os.pread
    monkeypatch.setattr(os, "pread", counted)
    for lines in (1, 5000):
        read.clear()
        assert texts(path, lines) == [b"%d\n" % number for number in range(100_000 - lines, 100_000)]
        assert 0 < sum(read) <= lines * 40 + (1 << 16)


def test_when_a_record_was_written() -> None:
    records = [logrecords.parse_line(line) for line in LOG.splitlines(keepends=True)]
    assert logrecords.written_at(records[3]) == datetime.datetime(2026, 3, 1, 11, 0, 3, 123456, tzinfo=datetime.UTC)
    assert logrecords.written_at(logrecords.Record("", "stdout", b"x")).year == 9999
