"""The snapshotter's database while it is being written: who waits for a commit, who doesn't, and what is seen meanwhile."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.snapshots import faults, metadata, model, tables


class Gate(faults.Faults):
    """Holds up the commits of other threads than the event loop's, as a slow disk does, while it is closed."""

    def __init__(self) -> None:
        super().__init__()
        self._open = threading.Event()
        self._open.set()
        self._loop = threading.get_ident()
        self.reached = threading.Event()
        self.fails = False

    def reach(self, step: faults.Step) -> None:
        if step == "changes-made" and threading.get_ident() != self._loop:
            self.reached.set()
            assert self._open.wait(60)
            if self.fails:
                raise OSError(5, "Input/output error")

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        """Commits wait inside of this context."""
        self._open.clear()
        self.reached.clear()
        try:
            yield
        finally:
            self._open.set()


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
async def database(tmp_path: Path, gate: Gate) -> AsyncIterator[metadata.Metadata]:
    # No transaction is slow by this clock.
    made = metadata.Metadata(str(tmp_path / "nixlet.db"), gate, clock=lambda: 0.0)
    yield made
    await made.close()


def insert(
    db: metadata.Metadata, key: str, effect: metadata.Effect = lambda _row, _undo: None
) -> "asyncio.Task[tables.Row]":
    making = db.create_snapshot(key, model.Kind.ACTIVE, "", {"k": "v"}, strategy="view", effect=effect)
    return asyncio.create_task(making)


async def reached(gate: Gate) -> None:
    assert await asyncio.to_thread(gate.reached.wait, 60)


async def test_reading_goes_on_during_a_commit_and_sees_what_is_durable(
    database: metadata.Metadata, gate: Gate, tmp_path: Path
) -> None:
    await insert(database, "before")
    with gate.closed():
        changes = [insert(database, "a"), asyncio.create_task(database.remove_snapshot("before"))]
        await reached(gate)
        # The loop runs, and nobody has been told of what the disk doesn't have.
        assert database.get("before").info().labels == {"k": "v"}
        assert database.find("a") is None
        assert [row.key for row in database.rows()] == ["before"]
        assert not any(change.done() for change in changes)
    await asyncio.gather(*changes)
    assert [row.key for row in database.rows()] == ["a"]


async def test_an_answer_is_seen_by_whoever_asks_next(database: metadata.Metadata) -> None:
    async def life(number: int) -> None:
        for _ in range(5):
            key, name = f"a{number}", f"c{number}"
            await database.create_snapshot(key, model.Kind.ACTIVE, "", {}, strategy="view")
            assert database.get(key).kind is model.Kind.ACTIVE
            await database.commit_snapshot(name, key, {"done": "yes"}, lambda: model.Usage(4096, 1))
            assert database.find(key) is None
            assert (database.get(name).size, database.get(name).info().labels) == (4096, {"done": "yes"})
            await database.update_labels(name, lambda labels: {**labels, "more": "yes"})
            assert database.get(name).info().labels == {"done": "yes", "more": "yes"}
            await database.remove_snapshot(name)
            assert database.find(name) is None

    await asyncio.gather(*(life(number) for number in range(16)))
    assert database.rows() == []


async def test_what_comes_during_a_commit_shares_the_next_one(database: metadata.Metadata, gate: Gate) -> None:
    statements: list[str] = []
    database._database.connection.set_trace_callback(statements.append)
    with gate.closed():
        changes = [insert(database, "first"), insert(database, "with it")]
        await reached(gate)
        for number in range(14):
            changes.append(insert(database, f"later {number}"))
            await asyncio.sleep(0)
    rows = await asyncio.gather(*changes)
    assert statements.count("COMMIT") == 2
    assert [row.id for row in rows] == list(range(1, 17))


async def test_one_client_goes_to_no_other_thread(database: metadata.Metadata) -> None:
    threads: list[int] = []

    def effect(_row: tables.Row, _undo: contextlib.ExitStack) -> None:
        threads.append(threading.get_ident())

    for number in range(5):
        await insert(database, f"a{number}", effect)
    assert threads[2:] == [threading.get_ident()] * 3
    threads.clear()
    await asyncio.gather(*(insert(database, f"b{number}", effect) for number in range(2)))
    assert threading.get_ident() not in threads


async def test_a_commit_that_fails_is_seen_by_nobody(database: metadata.Metadata, gate: Gate, tmp_path: Path) -> None:
    undone: list[str] = []

    def effect(row: tables.Row, undo: contextlib.ExitStack) -> None:
        undo.callback(undone.append, row.key)

    gate.fails = True
    told = await asyncio.gather(insert(database, "a", effect), insert(database, "b", effect), return_exceptions=True)
    assert [type(each) for each in told] == [OSError, OSError]
    assert undone == ["b", "a"]
    assert database.rows() == []
    gate.fails = False
    await asyncio.gather(insert(database, "a"), insert(database, "b"))
    assert [row.key for row in database.rows()] == ["a", "b"]


async def test_a_change_whose_undoing_fails_is_told_all_the_same(database: metadata.Metadata) -> None:
    def effect(_row: tables.Row, undo: contextlib.ExitStack) -> None:
        undo.callback(int, "no number")
        raise errors.UnavailableError("no")

    async with asyncio.timeout(60):
        told = await asyncio.gather(insert(database, "a", effect), insert(database, "b"), return_exceptions=True)
        await asyncio.gather(insert(database, "c"), insert(database, "d"))
    assert isinstance(told[0], errors.UnavailableError)
    assert {row.key for row in database.rows()} == {"b", "c", "d"}


async def test_settled_waits_for_what_may_have_had_its_effect_already(database: metadata.Metadata, gate: Gate) -> None:
    """A sweep takes nothing for a crash's that is being made."""
    made: list[int] = []

    def effect(row: tables.Row, _undo: contextlib.ExitStack) -> None:
        made.append(row.id)

    with gate.closed():
        changes = [insert(database, "a", effect), insert(database, "b", effect)]
        await reached(gate)
        assert set(made) - database.snapshot_ids() == {1, 2}
        settled = asyncio.create_task(database.settled())
        await asyncio.sleep(0)
        assert not settled.done()
    await settled
    assert set(made) - database.snapshot_ids() == set()
    await asyncio.gather(*changes)


async def test_closing_finishes_what_is_under_way_and_what_waits(tmp_path: Path, gate: Gate) -> None:
    first = metadata.Metadata(str(tmp_path / "nixlet.db"), gate)
    with gate.closed():
        changes = [insert(first, "a"), insert(first, "b")]
        await reached(gate)
        changes.append(insert(first, "c"))
        await asyncio.sleep(0)
    await first.close()
    assert {row.key for row in await asyncio.gather(*changes)} == {"a", "b", "c"}
    second = metadata.Metadata(str(tmp_path / "nixlet.db"))
    assert [row.key for row in second.rows()] == ["a", "b", "c"]
    await second.close()


async def test_what_is_known_is_what_is_stored(database: metadata.Metadata, tmp_path: Path) -> None:
    closure = tables.NewClosure("c", "{}", ("x", "y"), ("x",))
    await database.create_snapshot("a", model.Kind.ACTIVE, "", {}, strategy="view", closure=closure)
    await database.commit_snapshot("layer", "a", {"done": "yes"}, lambda: model.Usage(4096, 7))
    await asyncio.gather(*(insert(database, f"k{number}") for number in range(4)))
    await database.create_snapshot(
        "view", model.Kind.VIEW, "layer", {}, strategy="bind", closure=closure._replace(roots=("y",))
    )
    await database.commit_snapshot("plain", "k0", {}, lambda: model.Usage(1, 1))
    await database.update_labels("plain", lambda _: {"new": "label"}, closure._replace(identity="d"))
    await asyncio.gather(database.remove_snapshot("k1"), database.remove_snapshot("view"), insert(database, "k9"))
    assert not await database.commit_snapshot("large", "k2", {}, lambda: None)
    known = (database.rows(), database.closures())
    await database.close()
    again = metadata.Metadata(str(tmp_path / "nixlet.db"))
    assert (again.rows(), again.closures()) == known
    assert [each.identity for each in again.closures()] == ["c", "d"]
    await again.close()


async def test_a_commit_waits_for_the_disk(database: metadata.Metadata) -> None:
    """The log is synced at each commit (synchronous=FULL), of which sqlite tells after that."""
    run = database._database.connection.execute
    assert run("PRAGMA synchronous").fetchone() == (2,)
    assert run("PRAGMA journal_mode").fetchone() == ("wal",)
