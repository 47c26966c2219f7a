"""The files of containers' logs: following one that grows, moves and shrinks."""

import asyncio
import contextlib
import datetime
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from nixlet.containers import logrecords, logs

TIME = "2026-01-02T03:04:05.123456789Z"


def entry(text: str, tag: str = "F", stream: str = "stdout") -> str:
    return f"{TIME} {stream} {tag} {text}\n"


class Follower:
    """Follows a log; what came is awaited piece by piece, so that no test depends on time."""

    def __init__(self, path: Path, lines: int | None = None) -> None:
        self.over = False
        self._held = contextlib.ExitStack()
        log = self._held.enter_context(logs.at(str(path)))
        self._pieces = logs.follow(log, lambda: self.over, lines=lines)
        self._records = self._read()

    async def _read(self) -> AsyncIterator[logrecords.Record]:
        for piece in self._pieces:
            if isinstance(piece, float):
                await asyncio.sleep(piece)
            else:
                for record in logrecords.parse(piece):
                    yield record

    async def texts(self, count: int) -> list[bytes]:
        async with asyncio.timeout(5):
            return [(await anext(self._records)).text for _ in range(count)]

    async def rest(self) -> list[bytes]:
        self.over = True
        async with asyncio.timeout(5):
            return [record.text async for record in self._records]

    async def close(self) -> None:
        assert hasattr(self._records, "aclose")
        await self._records.aclose()
        self._pieces.close()
        self._held.close()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "0.log"


@pytest.fixture
async def follower(log: Path) -> AsyncIterator[Follower]:
    made = Follower(log)
    yield made
    await made.close()


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


async def nothing_comes(follower: Follower, meanwhile: str, log: Path) -> list[bytes]:
    """Write when the follower has had its looks at the log, and see what it says then."""
    waiting = asyncio.create_task(follower.texts(1))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    append(log, meanwhile)
    return await waiting


async def test_what_was_written_before_the_end_is_read(log: Path, follower: Follower) -> None:
    log.write_text("".join(entry(f"line {number}") for number in range(5000)))
    assert await follower.rest() == [f"line {number}\n".encode() for number in range(5000)]


async def test_lines_come_as_they_are_written(log: Path, follower: Follower) -> None:
    log.write_text(entry("one"))
    assert await follower.texts(1) == [b"one\n"]
    assert await nothing_comes(follower, entry("two"), log) == [b"two\n"]
    append(log, entry("three"))
    assert await follower.rest() == [b"three\n"]


async def test_a_line_that_is_half_written_is_waited_for(log: Path, follower: Follower) -> None:
    whole = entry("a line in two pieces")
    log.write_text(whole[:50])
    assert await nothing_comes(follower, whole[50:], log) == [b"a line in two pieces\n"]
    assert await follower.rest() == []


async def test_partial_records_have_no_newline(log: Path, follower: Follower) -> None:
    log.write_text(entry("one, ", "P") + entry("two, ", "P") + entry("three"))
    assert b"".join(await follower.rest()) == b"one, two, three\n"


async def test_a_last_line_without_a_newline(log: Path, follower: Follower) -> None:
    log.write_text(entry("one") + entry("cut off").rstrip("\n"))
    assert await follower.rest() == [b"one\n", b"cut off\n"]


async def test_a_log_that_appears_later(log: Path, follower: Follower) -> None:
    assert await nothing_comes(follower, entry("at last"), log) == [b"at last\n"]
    assert await follower.rest() == []


async def test_a_log_that_never_appears(follower: Follower) -> None:
    assert await follower.rest() == []


async def test_rotation(log: Path, follower: Follower) -> None:
    log.write_text(entry("one"))
    assert await follower.texts(1) == [b"one\n"]
    # Written, rotated and written again between two looks: nothing of it may be missed.
    append(log, entry("two"))
    log.rename(log.with_suffix(".1"))
    append(log, entry("three"))
    assert await follower.texts(2) == [b"two\n", b"three\n"]
    append(log, entry("four"))
    assert await follower.rest() == [b"four\n"]


async def test_rotation_just_before_the_end(log: Path, follower: Follower) -> None:
    log.write_text(entry("one"))
    assert await follower.texts(1) == [b"one\n"]
    append(log, entry("two").rstrip("\n"))
    log.rename(log.with_suffix(".1"))
    append(log, entry("three"))
    assert await follower.rest() == [b"two\n", b"three\n"]


async def test_what_is_written_while_the_log_is_being_rotated(
    log: Path, follower: Follower, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.write_text(entry("one"))
    assert await follower.texts(1) == [b"one\n"]
    look = logs._replaced

    def rotate_then_look(*args: Any) -> bool:
        # The writer's last word in the old file falls between the follower's reading and its looking.
        monkeypatch.undo()
        append(log, entry("two"))
        log.rename(log.with_suffix(".1"))
        append(log, entry("three"))
        return look(*args)

    monkeypatch.setattr(logs, "_replaced", rotate_then_look)
    assert await follower.texts(2) == [b"two\n", b"three\n"]


async def test_a_log_that_is_moved_away_is_read_on_until_another_takes_its_name(log: Path, follower: Follower) -> None:
    log.write_text(entry("one"))
    assert await follower.texts(1) == [b"one\n"]
    moved = log.with_suffix(".1")
    log.rename(moved)
    assert await nothing_comes(follower, entry("two"), moved) == [b"two\n"]
    append(log, entry("three"))
    assert await follower.rest() == [b"three\n"]


async def test_truncation(log: Path, follower: Follower) -> None:
    log.write_text(entry("one") + entry("two"))
    assert await follower.texts(2) == [b"one\n", b"two\n"]
    os.truncate(log, 0)
    append(log, entry("three"))
    assert await follower.texts(1) == [b"three\n"]
    assert await follower.rest() == []


@pytest.mark.parametrize("half", [10, 200_000])
async def test_half_a_record_that_is_taken_away_again_makes_nothing_come_twice(
    log: Path, follower: Follower, half: int
) -> None:
    append(log, entry("one") + entry("two"))
    assert await follower.texts(2) == [b"one\n", b"two\n"]
    whole = log.stat().st_size
    append(log, entry("x" * half)[: half // 2])

    async def take_away() -> list[bytes]:
        waiting = asyncio.create_task(follower.texts(1))
        # It has seen the half.
        await asyncio.sleep(0.05)
        os.truncate(log, whole)
        await asyncio.sleep(0.05)
        append(log, entry("three"))
        return await waiting

    assert await take_away() == [b"three\n"]
    assert await follower.rest() == []


async def test_a_follower_that_is_given_up_holds_no_file(log: Path) -> None:
    log.write_text(entry("one"))
    follower = Follower(log)
    assert await follower.texts(1) == [b"one\n"]
    assert str(log) in open_files()
    await follower.close()
    assert str(log) not in open_files()


def open_files() -> set[str]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(f"/proc/self/fd/{name}"))
    return found


def aside(log: Path, second: int) -> Path:
    return Path(logs.aside(str(log), datetime.datetime(2026, 1, 1, 0, 0, second, tzinfo=datetime.UTC)))


async def test_a_log_of_many_files_is_one(log: Path) -> None:
    for second, text in enumerate(("one", "two", "three")):
        log.write_text(entry(text))
        log.rename(aside(log, second))
    log.write_text(entry("four") + entry("five"))
    log.with_name(f"{log.name}.gz").write_text("nothing of ours")
    files = [aside(log, second).name for second in range(3)]
    with logs.at(str(log)) as opened:
        assert opened.names() == [*files, log.name]
    texts = [b"one\n", b"two\n", b"three\n", b"four\n", b"five\n"]
    for lines in (None, 0, 1, 2, 3, 5, 50):
        wanted = texts[-min(lines, 5) :] if lines else texts if lines is None else []
        assert [record.text for record in logs.records(str(log), lines=lines)] == wanted
        follower = Follower(log, lines)
        assert await follower.rest() == wanted
        await follower.close()


@pytest.mark.parametrize("lines", [2, 3])
async def test_the_last_lines_stay_those_that_were_counted(log: Path, lines: int) -> None:
    """Of a log that grows and is put aside while it is read, and whose oldest file goes meanwhile."""

    def grow() -> None:
        append(log, entry("four"))
        log.rename(aside(log, 1))
        append(log, entry("five"))
        aside(log, 0).unlink()

    def begin() -> None:
        for second in range(2):
            aside(log, second).unlink(missing_ok=True)
        log.write_text(entry("one"))
        log.rename(aside(log, 0))
        log.write_text(entry("two") + entry("three"))

    wanted = [b"one\n", b"two\n", b"three\n"][-lines:]
    begin()
    with logs.at(str(log)) as opened:
        pieces = logs.there(opened, lines=lines)
        begun = next(pieces)
        grow()
        assert b"".join(record.text for record in logrecords.parse(begun + b"".join(pieces))) == b"".join(wanted)
    begin()
    follower = Follower(log, lines)
    assert await follower.texts(1) == wanted[:1]
    grow()
    assert await follower.rest() == [*wanted[1:], b"four\n", b"five\n"]
    await follower.close()


@pytest.mark.parametrize("gone", [True, False])
async def test_rotation_between_the_look_for_the_next_file_and_its_opening(
    log: Path, follower: Follower, monkeypatch: pytest.MonkeyPatch, *, gone: bool
) -> None:
    log.write_text(entry("one"))
    assert await follower.texts(1) == [b"one\n"]
    log.rename(aside(log, 0))
    append(log, entry("two"))
    if gone:
        # Two is the oldest that is left, and goes as well.
        log.rename(aside(log, 1))
        append(log, entry("three"))
    look = logs._next

    def look_then_rotate(*args: Any) -> str:
        monkeypatch.undo()
        found = look(*args)
        if gone:
            aside(log, 0).unlink()
            aside(log, 1).unlink()
        else:
            log.rename(aside(log, 1))
            append(log, entry("three"))
        return found

    monkeypatch.setattr(logs, "_next", look_then_rotate)
    assert await follower.rest() == ([b"three\n"] if gone else [b"two\n", b"three\n"])


async def test_a_log_whose_name_is_gone_at_its_end(log: Path, follower: Follower) -> None:
    log.write_text(entry("one"))
    assert await follower.texts(1) == [b"one\n"]
    log.rename(aside(log, 0))
    append(log, entry("two"))
    log.rename(aside(log, 1))
    assert await follower.rest() == [b"two\n"]


async def test_a_follower_that_is_files_behind_misses_none(log: Path, follower: Follower) -> None:
    log.write_text(entry("one"))
    assert await follower.texts(1) == [b"one\n"]
    for second, text in enumerate(("two", "three", "four")):
        append(log, entry(text))
        log.rename(aside(log, second))
    append(log, entry("five"))
    assert await follower.rest() == [b"two\n", b"three\n", b"four\n", b"five\n"]
