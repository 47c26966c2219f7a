"""The snapshotter's database when the disk, or what is asked of it, fails: who is told what, and what stays undone."""

import asyncio
import contextlib
import ctypes
import os
import platform
import shutil
import sqlite3
import struct
import threading
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from nixlet import errors
from nixlet.snapshots import database as database_module
from nixlet.snapshots import faults, metadata, model, tables

#: The numbers of the system calls fsync and fdatasync.
_SYNCS = {"x86_64": (74, 75), "aarch64": (82, 83)}[platform.machine()]


class Broken(faults.Faults):
    """Fails transactions before their commit."""

    fails = False

    def reach(self, step: faults.Step) -> None:
        if step == "changes-made" and self.fails:
            raise OSError(5, "Input/output error")


@pytest.fixture
def broken() -> Broken:
    return Broken()


@pytest.fixture
async def database(tmp_path: Path, broken: Broken) -> AsyncIterator[metadata.Metadata]:
    made = metadata.Metadata(str(tmp_path / "nixlet.db"), broken)
    yield made
    await made.close()


def insert(
    db: metadata.Metadata, key: str, parent: str = "", effect: metadata.Effect = lambda _row, _undo: None
) -> "asyncio.Task[tables.Row]":
    making = db.create_snapshot(key, model.Kind.ACTIVE, parent, {}, strategy="view", effect=effect)
    return asyncio.create_task(making)


async def ended(*tasks: "asyncio.Future[Any]") -> list[Any]:
    """What tasks return, or raise."""
    async with asyncio.timeout(60):
        return [*await asyncio.gather(*tasks, return_exceptions=True)]


def refuse_syncs() -> None:
    """Have the kernel answer this thread's fsync and fdatasync with EIO from now on (seccomp)."""
    eio = 0x00050000 | 5
    jump, load, answer = 0x15, 0x20, 0x06
    program = [(load, 0, 0, 0), (jump, 1, 0, _SYNCS[0]), (jump, 0, 1, _SYNCS[1]), (answer, 0, 0, eio)]
    program.append((answer, 0, 0, 0x7FFF0000))
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in program))
    of_filters = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(filters)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    for arguments in ((38, 1, 0, 0, 0), (22, 2, of_filters, 0, 0)):
        assert prctl(*arguments) == 0, os.strerror(ctypes.get_errno())


def copied(directory: Path, name: str) -> Path:
    """The database's files as they are now, as after a SIGKILL."""
    copy = directory / name
    copy.mkdir()
    for file in directory.glob("nixlet.db*"):
        shutil.copy(file, copy)
    return copy


def keys(copy: Path) -> list[str]:
    """What a next start finds."""
    opened = metadata.Metadata(str(copy / "nixlet.db"))
    try:
        return [row.key for row in opened.rows()]
    finally:
        opened.close_unused()


async def test_a_change_whose_commit_failed_is_written_over_before_it_can_come_true(tmp_path: Path) -> None:
    database = metadata.Metadata(str(tmp_path / "nixlet.db"))
    undone: list[str] = []

    def effect(row: tables.Row, undo: contextlib.ExitStack) -> None:
        undo.callback(undone.append, row.key)

    def effect_of_last(row: tables.Row, undo: contextlib.ExitStack) -> None:
        effect(row, undo)
        refuse_syncs()

    copies: list[Path] = []

    def look(statement: str) -> None:
        if statement.startswith("PRAGMA user_version"):
            copies.append(copied(tmp_path, f"then {len(copies)}"))

    await ended(insert(database, "kept"), insert(database, "kept, too"))
    database._database.connection.set_trace_callback(look)
    told = await ended(insert(database, "a", effect=effect), insert(database, "b", effect=effect_of_last))
    for each in told:
        assert isinstance(each, errors.UnavailableError)
        assert each.message.endswith("can't be used: Input/output error; the next start may find the change made")
    # It would have: the frames were in the log. What is written over them isn't known to be on the disk yet.
    assert keys(copies[0]) == ["kept", "kept, too", "a", "b"]
    assert keys(copied(tmp_path, "later")) == ["kept", "kept, too"]
    assert undone == []
    with pytest.raises(errors.UnavailableError, match="since a commit failed"):
        database.check()
    refused = await ended(insert(database, "c"), asyncio.create_task(database.settled()))
    assert [type(each) for each in refused] == [errors.UnavailableError] * 2
    assert [row.key for row in database.rows()] == ["kept", "kept, too"]
    # This thread's calls are answered as ever: for it the disk is there again.
    assert database._database._write_over()
    assert undone == ["b", "a"]
    database.check()
    assert keys(copied(tmp_path, "certain")) == ["kept", "kept, too"]
    await database.close()


class Failing:
    """A connection on which statements fail while it is told so."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.failing: set[str] = set()
        self.tried: list[str] = []

    def execute(self, statement: str, *arguments: Any) -> sqlite3.Cursor:
        word = statement.split(maxsplit=1)[0]
        self.tried.append(word)
        if word in self.failing:
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR
            raise error
        return self._connection.execute(statement, *arguments)

    def __getattr__(self, name: str) -> object:
        return getattr(self._connection, name)


async def test_nothing_is_changed_until_a_failed_commit_is_written_over_which_is_tried_again(
    database: metadata.Metadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "_AGAIN", 0.01)
    inner = database._database
    connection = Failing(inner.connection)
    monkeypatch.setattr(inner, "connection", connection)
    undone = threading.Event()
    connection.failing = {"COMMIT", "PRAGMA"}

    def effect(_row: tables.Row, undo: contextlib.ExitStack) -> None:
        undo.callback(undone.set)

    told = await ended(insert(database, "a", effect=effect))
    assert isinstance(told[0], errors.UnavailableError)
    connection.failing = {"PRAGMA"}
    begun = connection.tried.count("BEGIN")
    told = await ended(insert(database, "b"))
    assert isinstance(told[0], errors.UnavailableError)
    assert "Input/output error" in told[0].message
    assert connection.tried.count("BEGIN") == begun
    assert not undone.is_set()
    connection.failing = set()
    # Without anybody's asking for anything.
    assert await asyncio.to_thread(undone.wait, 60)
    assert [each.key for each in await asyncio.gather(insert(database, "b"), insert(database, "c"))] == ["b", "c"]


async def test_a_refusal_is_ones_own_only_if_its_reason_is_not_undone(
    database: metadata.Metadata, broken: Broken
) -> None:
    await insert(database, "r")
    broken.fails = True
    told = await ended(
        asyncio.create_task(database.remove_snapshot("unknown")),
        asyncio.create_task(database.remove_snapshot("r")),
        asyncio.create_task(database.remove_snapshot("r")),
        insert(database, "k"),
        insert(database, "k"),
    )
    assert [type(each) for each in told] == [errors.NotFoundError, OSError, OSError, OSError, OSError]
    assert [row.key for row in database.rows()] == ["r"]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class SlowDisk(faults.Faults):
    """Makes commits take some time by a clock, and says in which threads they are made; with a gate for each."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock
        self.takes = 0.0
        self.threads: list[int] = []
        self.open = threading.Event()
        self.open.set()

    def reach(self, step: faults.Step) -> None:
        if step == "changes-made":
            self.threads.append(threading.get_ident())
            assert self.open.wait(60)
            self._clock.now += self.takes


async def test_a_slow_disk_holds_the_loop_up_once(tmp_path: Path) -> None:
    clock = Clock()
    disk = SlowDisk(clock)
    database = metadata.Metadata(str(tmp_path / "nixlet.db"), disk, clock)
    loop = threading.get_ident()

    async def makes(count: int) -> list[bool]:
        """For each of some changes, one after the other: whether it is made in the loop's thread."""
        disk.threads.clear()
        for _ in range(count):
            await insert(database, f"k{database.issued('snapshots')}")
        return [thread == loop for thread in disk.threads]

    assert await makes(4) == [False, True, True, True]
    disk.takes = 0.006
    assert await makes(4) == [True, False, False, False]
    # As when it hangs: the loop goes on.
    disk.open.clear()
    waiting = insert(database, "waiting")
    while len(disk.threads) < 5:
        await asyncio.sleep(0)
    assert database.find("k0") is not None
    assert not waiting.done()
    disk.open.set()
    await waiting
    # Quick again: after some time, and a commit that was seen to be quick.
    disk.takes = 0
    clock.now += 9.9
    assert await makes(2) == [False, False]
    clock.now += 0.2
    assert await makes(3) == [False, True, True]
    await database.close()


async def test_a_change_that_waits_long_is_told(tmp_path: Path) -> None:
    clock = Clock()
    disk = SlowDisk(clock)
    database = metadata.Metadata(str(tmp_path / "nixlet.db"), disk, clock)
    disk.open.clear()
    changes = [insert(database, "a"), insert(database, "b")]
    await asyncio.sleep(0)
    clock.now += 4
    database.check()
    clock.now += 2
    with pytest.raises(errors.UnavailableError, match="has a change waiting for 6 seconds"):
        database.check()
    disk.open.set()
    await asyncio.gather(*changes)
    database.check()
    await database.close()


class Unforeseen(BaseException):
    pass


@pytest.mark.parametrize("raised", [Unforeseen, StopIteration])
async def test_whatever_a_change_raises_everybody_is_told(
    database: metadata.Metadata, raised: type[BaseException]
) -> None:
    def effect(_row: tables.Row, _undo: contextlib.ExitStack) -> None:
        raise raised

    for _ in range(2):
        told = await ended(insert(database, "a"), insert(database, "b", effect=effect))
        assert isinstance(told[1], errors.UnavailableError)
        assert raised.__name__ in told[1].message
    # And alone, in whichever thread.
    for _ in range(3):
        (told_alone,) = await ended(insert(database, "b", effect=effect))
        assert isinstance(told_alone, errors.UnavailableError)
    database.check()
    await asyncio.gather(insert(database, "c"), insert(database, "d"))


async def test_when_memory_is_not_what_is_stored_everybody_is_told_and_nothing_is_changed_any_more(
    database: metadata.Metadata, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(effects: database_module.Effects) -> None:
        effects.durable.append(lambda: dict[str, int]()["no"])

    told = await ended(asyncio.create_task(database._write(wrong)), insert(database, "c"), insert(database, "d"))
    assert isinstance(told[0], errors.UnavailableError)
    assert [type(each) for each in told[1:]] == [tables.Row, tables.Row]
    with pytest.raises(errors.UnavailableError, match="what is stored is not what is known in memory"):
        await insert(database, "e")
    with pytest.raises(errors.UnavailableError, match="a restart is needed"):
        database.check()
    assert "KeyError" in caplog.text


async def test_a_writer_that_ends_leaves_nobody_waiting(
    database: metadata.Metadata, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def flush(_pending: object) -> list[object]:
        begun.set()
        assert go_on.wait(60)
        raise Unforeseen

    monkeypatch.setattr(database._database, "_flush", flush)
    changes = [insert(database, "a"), insert(database, "b")]
    assert await asyncio.to_thread(begun.wait, 60)
    changes.append(insert(database, "c"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    go_on.set()
    told = await ended(*changes)
    assert [type(each) for each in told] == [errors.UnavailableError] * 3
    with pytest.raises(errors.UnavailableError, match="its writer has ended"):
        await insert(database, "d")
    with pytest.raises(errors.UnavailableError, match="its writer has ended"):
        database.check()
    assert "Unforeseen" in caplog.text


async def test_who_gives_up_a_change_goes_on_when_it_is_made_or_refused(tmp_path: Path) -> None:
    """So what is held for a change is held until then."""
    disk = SlowDisk(Clock())
    database = metadata.Metadata(str(tmp_path / "nixlet.db"), disk)
    disk.open.clear()
    known: list[bool] = []

    async def hold() -> None:
        try:
            await insert_here()
        finally:
            known.append(database.find("a") is not None)

    async def insert_here() -> None:
        await database.create_snapshot("a", model.Kind.ACTIVE, "", {}, strategy="view")

    holding = asyncio.create_task(hold())
    while not disk.threads:
        await asyncio.sleep(0)
    for _ in range(3):
        holding.cancel()
        await asyncio.sleep(0)
    assert known == []
    disk.open.set()
    with pytest.raises(asyncio.CancelledError):
        await holding
    assert known == [True]
    await database.close()


async def test_a_closed_database_refuses_changes(database: metadata.Metadata) -> None:
    await insert(database, "a")
    await database.close()
    for _ in range(3):
        with pytest.raises(errors.UnavailableError, match=r"nixlet\.db is closed"):
            await database.remove_snapshot("a")


async def test_closing_holds_nobody_up(tmp_path: Path) -> None:
    disk = SlowDisk(Clock())
    database = metadata.Metadata(str(tmp_path / "nixlet.db"), disk)
    disk.open.clear()
    changes = [insert(database, "a"), insert(database, "b")]
    while not disk.threads:
        await asyncio.sleep(0)
    closing = asyncio.create_task(database.close())
    for _ in range(100):
        await asyncio.sleep(0)
    assert not closing.done()
    disk.open.set()
    await closing
    assert [row.key for row in await asyncio.gather(*changes)] == ["a", "b"]


@pytest.mark.parametrize("value", ["9", "X'ff'"])
async def test_a_row_that_cannot_be_read_is_told_and_the_database_closed(tmp_path: Path, value: str) -> None:
    path = tmp_path / "nixlet.db"
    database = metadata.Metadata(str(path))
    await insert(database, "a")
    await database.close()
    column = "kind" if value == "9" else "key"
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute(f"UPDATE snapshots SET {column} = CAST({value} AS {'INTEGER' if value == '9' else 'TEXT'})")
        other.commit()
    threads = threading.active_count()
    # It isn't locked by the first attempt.
    for _ in range(2):
        with pytest.raises(errors.FailedPreconditionError, match=r"nixlet\.db can't be read") as caught:
            metadata.Metadata(str(path))
        assert "from a backup" in caught.value.hint
    assert threading.active_count() == threads


async def test_of_two_closures_at_once_the_second_is_refused(database: metadata.Metadata) -> None:
    await insert(database, "a")
    await database.commit_snapshot("layer", "a", {}, lambda: model.Usage(1, 1))
    number = database.get("layer").id
    first, second = (tables.NewClosure(name, "{}", (name,), (name,)) for name in "xy")
    again = first._replace(identity="z")

    def update(closure: tables.NewClosure) -> "asyncio.Task[tables.Row]":
        def change(labels: Mapping[str, str]) -> Mapping[str, str]:
            return {**labels, closure.identity: "yes"}

        return asyncio.create_task(database.update_labels("layer", change, closure, number))

    told = await ended(*map(update, (first, second, again)))
    assert isinstance(told[1], errors.FailedPreconditionError)
    assert told[1].message == "the layer layer has another closure already"
    row = database.get("layer")
    assert row.info().labels == {"x": "yes", "z": "yes"}
    assert [closure.identity for closure in database.closures()] == ["x"]


async def test_names_are_kept_once_and_while_they_are_used(database: metadata.Metadata) -> None:
    def closure(identity: str) -> tables.NewClosure:
        # Strings of their own, as they come from a wire.
        names = tuple(f"{'common' * 10}-{number}" for number in range(5))
        return tables.NewClosure(identity, "{}", (*names, f"own-{identity}"), names[:1])

    for identity in "abab":
        key = f"{identity}{database.issued('snapshots')}"
        await database.create_snapshot(key, model.Kind.ACTIVE, "", {}, strategy="view", closure=closure(identity))
    a, b = database.closures()
    assert all(one is other for one, other in zip(a.names[:5], b.names[:5], strict=True))
    assert a.roots[0] is a.names[0]
    assert len(database._names) == 7
    for row in database.rows():
        await database.remove_snapshot(row.key)
    await database.delete_closure(a.id)
    assert len(database._names) == 6
    await database.delete_closure(b.id)
    assert len(database._names) == 0
