"""The snapshotter's database: grouped commits, semantics of each change, refusals."""

import asyncio
import contextlib
import resource
import shutil
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.snapshots import faults, metadata, model, tables


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[metadata.Metadata]:
    db = metadata.Metadata(str(tmp_path / "nixlet.db"))
    yield db
    await db.close()


async def insert(db: metadata.Metadata, key: str, parent: str = "", kind: model.Kind = model.Kind.ACTIVE) -> tables.Row:
    return await db.create_snapshot(key, kind, parent, {"k": "v"}, strategy="view")


async def commit(db: metadata.Metadata, name: str, key: str) -> None:
    await db.commit_snapshot(name, key, {"done": "yes"}, lambda: model.Usage(4096, 1))


async def test_commit_replaces_labels_and_times(database: metadata.Metadata) -> None:
    row = await insert(database, "a")
    await commit(database, "layer", "a")
    info = database.get("layer").info()
    assert info.kind is model.Kind.COMMITTED
    assert info.labels == {"done": "yes"}
    assert info.created == info.updated > row.created
    with pytest.raises(errors.NotFoundError):
        database.get("a")


async def test_chain_is_nearest_first(database: metadata.Metadata) -> None:
    parent = ""
    for number in range(5):
        await insert(database, f"a{number}", parent)
        await commit(database, f"c{number}", f"a{number}")
        parent = f"c{number}"
    row = await insert(database, "top", parent)
    ids = [layer.id for layer in database.chain(row.parent)]
    assert ids == [database.get(f"c{number}").id for number in reversed(range(5))]


async def test_refusals_undo_only_their_own_change(database: metadata.Metadata) -> None:
    await insert(database, "a")
    results = await asyncio.gather(
        insert(database, "b"),
        insert(database, "a"),
        insert(database, "c", "missing"),
        insert(database, "d", "a"),
        insert(database, "e"),
        return_exceptions=True,
    )
    kinds = [type(result) for result in results]
    assert kinds == [
        tables.Row,
        errors.AlreadyExistsError,
        errors.NotFoundError,
        errors.InvalidArgumentError,
        tables.Row,
    ]
    assert {row.key for row in database.rows()} == {"a", "b", "e"}


async def test_changes_of_one_turn_share_one_transaction(database: metadata.Metadata) -> None:
    statements: list[str] = []
    database._database.connection.set_trace_callback(statements.append)
    await asyncio.gather(*(insert(database, f"k{number}") for number in range(16)))
    assert statements.count("COMMIT") == 1
    assert len(database.rows()) == 16


async def test_a_cancelled_caller_does_not_undo_the_change(database: metadata.Metadata) -> None:
    task = asyncio.create_task(insert(database, "a"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await database.settled()
    assert database.find("a") is not None


async def test_a_parent_is_not_removed(database: metadata.Metadata) -> None:
    await insert(database, "a")
    await commit(database, "layer", "a")
    await insert(database, "child", "layer")
    with pytest.raises(errors.FailedPreconditionError, match="cannot remove"):
        await database.remove_snapshot("layer")


async def test_numbers_are_never_used_again(database: metadata.Metadata) -> None:
    first = await insert(database, "a")
    await database.remove_snapshot("a")
    second = await insert(database, "a")
    assert second.id > first.id


async def test_a_full_disk_undoes_what_was_done_and_no_number_comes_twice(database: metadata.Metadata) -> None:
    made: list[int] = []
    undone: list[int] = []

    def effect(row: tables.Row, undo: contextlib.ExitStack) -> None:
        made.append(row.id)
        undo.callback(undone.append, row.id)

    async def create(key: str, size: int) -> tables.Row:
        labels = {"l": "x" * size}
        return await database.create_snapshot(key, model.Kind.ACTIVE, "", labels, strategy="view", effect=effect)

    await create("before", 1)
    (pages,) = database._database.connection.execute("PRAGMA page_count").fetchone()
    database._database.connection.execute(f"PRAGMA max_page_count = {pages}")
    # The second doesn't fit, and sqlite undoes the whole transaction; the first has a reason of its own.
    results = await asyncio.gather(
        create("before", 1), create("small", 1), create("large", 100_000), create("other", 1), return_exceptions=True
    )
    assert [type(result) for result in results] == [errors.AlreadyExistsError, *[errors.ResourceExhaustedError] * 3]
    assert str(results[2]).endswith("/nixlet.db can't be written: No space left on device")
    assert undone == made[1:]
    assert undone
    assert {row.key for row in database.rows()} == {"before"}
    database._database.connection.execute(f"PRAGMA max_page_count = {pages + 100}")
    for key in ("small", "large", "other"):
        await create(key, 1)
    assert len({*made}) == len(made)
    assert undone == made[1:-3]


async def test_a_write_that_the_system_refuses_is_told_and_all_goes_on(database: metadata.Metadata) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file may grow beyond this: for sqlite a disk that can't be written to.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(errors.UnavailableError, match=r"/nixlet\.db can't be used: Input/output error") as caught:
            await database.create_snapshot("a", model.Kind.ACTIVE, "", {"l": "x" * (2 << 20)}, strategy="view")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert isinstance(caught.value.__cause__, sqlite3.OperationalError)
    assert (await insert(database, "a")).id == 2


async def test_a_transaction_that_fails_at_its_end_undoes_every_change(database: metadata.Metadata) -> None:
    undone: list[int] = []

    def effect(row: tables.Row, undo: contextlib.ExitStack) -> None:
        undo.callback(undone.append, row.id)

    # What sqlite checks at the COMMIT alone can be broken by a change: here a row without the parent that it names.
    def orphan(row: tables.Row, undo: contextlib.ExitStack) -> None:
        effect(row, undo)
        database._database.connection.execute("PRAGMA defer_foreign_keys = ON")
        database._database.connection.execute("UPDATE snapshots SET parent = 999 WHERE id = ?", (row.id,))

    results = await asyncio.gather(
        database.create_snapshot("a", model.Kind.ACTIVE, "", {}, strategy="view", effect=effect),
        database.create_snapshot("b", model.Kind.ACTIVE, "", {}, strategy="view", effect=orphan),
        return_exceptions=True,
    )
    assert all("FOREIGN KEY constraint failed" in str(result) for result in results)
    assert undone == [2, 1]
    assert (await insert(database, "a")).id == 3


async def test_what_was_acknowledged_is_there_after_a_reopening(tmp_path: Path) -> None:
    first = metadata.Metadata(str(tmp_path / "nixlet.db"))
    await insert(first, "a")
    # The files as they are without a closing, as after a SIGKILL.
    (tmp_path / "later").mkdir()
    for file in tmp_path.glob("nixlet.db*"):
        shutil.copy(file, tmp_path / "later")
    second = metadata.Metadata(str(tmp_path / "later" / "nixlet.db"))
    assert second.get("a").key == "a"
    await second.close()
    await first.close()


def test_a_damaged_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "nixlet.db"
    path.write_bytes(b"not a database at all" * 1000)
    with pytest.raises(errors.FailedPreconditionError, match=r"nixlet\.db can't be read") as caught:
        metadata.Metadata(str(path))
    assert caught.value.hint


def test_a_foreign_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "nixlet.db"
    with sqlite3.connect(path) as other:
        other.execute("PRAGMA user_version = 1")
    other.close()
    with pytest.raises(errors.FailedPreconditionError, match="not a database of nixlet"):
        metadata.Metadata(str(path))


def test_a_database_of_a_later_nixlet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "nixlet.db"
    metadata.Metadata(str(path)).close_unused()
    with sqlite3.connect(path) as later:
        later.execute("PRAGMA user_version = 99")
    later.close()
    with pytest.raises(errors.FailedPreconditionError, match="later nixlet"):
        metadata.Metadata(str(path))


async def test_an_earlier_schema_is_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "nixlet.db"
    with contextlib.closing(sqlite3.connect(path)) as old:
        # As the first version wrote it.
        old.executescript(
            "CREATE TABLE closures (id INTEGER PRIMARY KEY AUTOINCREMENT, identity TEXT NOT NULL UNIQUE,"
            " reference TEXT NOT NULL, paths TEXT NOT NULL, store_mtime INTEGER NOT NULL DEFAULT 0) STRICT;"
            "CREATE TABLE snapshots (id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL UNIQUE, kind INTEGER NOT NULL,"
            " parent INTEGER REFERENCES snapshots (id), created INTEGER NOT NULL, updated INTEGER NOT NULL,"
            " labels TEXT NOT NULL, closure INTEGER REFERENCES closures (id), strategy TEXT NOT NULL DEFAULT '',"
            " size INTEGER NOT NULL DEFAULT 0, inodes INTEGER NOT NULL DEFAULT 0) STRICT;"
            "INSERT INTO closures VALUES (3, 'c', '{}', 'a\nb', 7);"
            "INSERT INTO snapshots VALUES (5, 'layer', 3, NULL, 1, 2, '{}', 3, 'view', 4096, 1);"
            f"PRAGMA application_id = {0x6E69786C}; PRAGMA user_version = 1;"
        )
    database = metadata.Metadata(str(path))
    assert database.closure(3) == tables.Closure(3, "c", "{}", ("a", "b"), ())
    assert database.get("layer").closure == 3
    await insert(database, "a", "layer")
    await database.close()


async def test_what_a_closure_is_rooted_by_is_recorded_each_time(database: metadata.Metadata) -> None:
    for key, rooted in (("a", ("x",)), ("b", ("x", "y"))):
        closure = tables.NewClosure("c", "{}", ("x", "y"), rooted)
        row = await database.create_snapshot(key, model.Kind.ACTIVE, "", {}, strategy="view", closure=closure)
        assert row.closure == 1
        assert database.closure(1) == tables.Closure(1, "c", "{}", ("x", "y"), rooted)


def test_a_closure_that_is_forgotten_is_not_found(database: metadata.Metadata) -> None:
    with pytest.raises(errors.NotFoundError, match="closure 7 does not exist any more"):
        database.closure(7)


async def test_on_a_broken_disk_everybody_is_answered(
    database: metadata.Metadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    def fail(_row: tables.Row, _undo: contextlib.ExitStack) -> None:
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR
        raise error

    monkeypatch.setattr("os.statvfs", broken)
    failing = database.create_snapshot("a", model.Kind.ACTIVE, "", {}, strategy="view", effect=fail)
    async with asyncio.timeout(10):
        told, made = await asyncio.gather(failing, insert(database, "b"), return_exceptions=True)
    assert isinstance(told, errors.UnavailableError)
    assert "Input/output error" in told.message
    assert isinstance(made, tables.Row)


async def test_an_unforeseen_failure_of_a_transaction_is_told_to_everybody(tmp_path: Path) -> None:
    class Failing(faults.Faults):
        def reach(self, step: faults.Step) -> None:
            if step == "changes-made":
                raise MemoryError

    database = metadata.Metadata(str(tmp_path / "nixlet.db"), Failing())
    undone: list[str] = []

    def effect(row: tables.Row, undo: contextlib.ExitStack) -> None:
        undo.callback(undone.append, row.key)

    making = [database.create_snapshot(key, model.Kind.ACTIVE, "", {}, strategy="view", effect=effect) for key in "ab"]
    async with asyncio.timeout(10):
        told = await asyncio.gather(*making, return_exceptions=True)
    assert [type(each) for each in told] == [MemoryError, MemoryError]
    assert undone == ["b", "a"]
    assert database.find("a") is None
    await database.close()


async def test_a_closure_is_given_to_no_other_snapshot_than_the_one_that_it_fits(database: metadata.Metadata) -> None:
    before = await insert(database, "a")
    await commit(database, "layer", "a")
    await database.remove_snapshot("layer")
    await insert(database, "a")
    await commit(database, "layer", "a")
    closure = tables.NewClosure("c", "{}", ("x",), ("x",))
    with pytest.raises(errors.NotFoundError, match="snapshot layer was removed while it was being updated"):
        await database.update_labels("layer", lambda _: {"new": "label"}, closure, before.id)
    assert (database.get("layer").closure, database.get("layer").info().labels) == (None, {"done": "yes"})
    assert list(database.closures()) == []
