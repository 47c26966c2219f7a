"""The snapshotter's database: sqlite, written in the event loop, commits grouped.

All changes that arrive in one turn of the loop share a transaction, each in a savepoint of its own, so that sixteen clients
wait for one fsync and not for sixteen. Write-ahead log with ``synchronous=FULL``: what was acknowledged survives a power cut.
"""

import asyncio
import contextlib
import errno
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from nixlet import errors
from nixlet.host import files
from nixlet.snapshots import faults as faults_module
from nixlet.snapshots import model

T = TypeVar("T")

#: "nixl", so that a database of another program is recognised (sqlite's PRAGMA application_id).
_APPLICATION_ID = 0x6E69786C

#: The write-ahead log's length (bytes): the 1,000 pages after which sqlite makes a checkpoint, with their headers.
_LOG_SIZE = 1_000 * (4096 + 24) + 32

#: The schema's steps; a database at version N has had the first N applied.
_MIGRATIONS = (
    """
    CREATE TABLE closures (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        identity TEXT NOT NULL UNIQUE,
        reference TEXT NOT NULL,
        paths TEXT NOT NULL,
        store_mtime INTEGER NOT NULL DEFAULT 0
    ) STRICT;
    CREATE TABLE snapshots (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        key TEXT NOT NULL UNIQUE,
        kind INTEGER NOT NULL,
        parent INTEGER REFERENCES snapshots (id),
        created INTEGER NOT NULL,
        updated INTEGER NOT NULL,
        labels TEXT NOT NULL,
        closure INTEGER REFERENCES closures (id),
        strategy TEXT NOT NULL DEFAULT '',
        size INTEGER NOT NULL DEFAULT 0,
        inodes INTEGER NOT NULL DEFAULT 0
    ) STRICT;
    CREATE INDEX snapshots_parent ON snapshots (parent);
    CREATE INDEX snapshots_closure ON snapshots (closure);
    """,
    # When all paths of a closure were last seen is known in memory only.
    "ALTER TABLE closures DROP COLUMN store_mtime;",
)


_SELECT = "SELECT s.*, coalesce(p.key, '') FROM snapshots s LEFT JOIN snapshots p ON p.id = s.parent"


class Row(NamedTuple):
    """A snapshot as stored, and the name of its parent."""

    id: int
    key: str
    kind: model.Kind
    parent: int | None
    created: int
    updated: int
    labels: str
    closure: int | None
    strategy: str
    size: int
    inodes: int
    parent_key: str

    def info(self) -> model.Info:
        """The snapshot as clients see it."""
        labels = json.loads(self.labels)
        return model.Info(self.key, self.parent_key, self.kind, self.created, self.updated, labels)


class Layer(NamedTuple):
    """One committed ancestor of a snapshot: its directory's number, and the closure that it brings along."""

    id: int
    closure: int | None


class Closure(NamedTuple):
    """A closure that some layer brings along.

    Attributes:
        id: Its number; its view has the same.
        identity: What tells closures apart.
        reference: How the image named it, for realising it again.
        names: The base names of its store paths.
    """

    id: int
    identity: str
    reference: str
    names: tuple[str, ...]


class Metadata:
    """The database; one instance for the life of the snapshotter, used in the event loop's thread only."""

    def __init__(self, path: str, faults: faults_module.Faults | None = None) -> None:
        """Open or create it.

        Args:
            path: The file.
            faults: Where tests can have the process killed.

        Raises:
            FailedPreconditionError: It is damaged, foreign, or of a later nixlet, or the disk is full.
        """
        self._path = path
        self._faults = faults or faults_module.Faults()
        self._pending: list[tuple[Callable[[sqlite3.Connection], Any], asyncio.Future[Any]]] = []
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=True)
            self._prepare_database()
        except OSError as error:
            raise files.refused(f"the snapshotter's database {path} can't be written", error) from error
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                raise files.refused(f"the snapshotter's database {path} can't be written", full) from error
            raise errors.FailedPreconditionError(
                f"the snapshotter's database {path} can't be read: {error}",
                hint="restore it from a backup, or move the snapshotter's whole directory away and load the images again",
            ) from error

    def _prepare_database(self) -> None:
        run = self._db.execute
        version = run("PRAGMA user_version").fetchone()[0]
        application = run("PRAGMA application_id").fetchone()[0]
        if (version or application) and application != _APPLICATION_ID:
            raise errors.FailedPreconditionError(
                f"{self._path} is not a database of nixlet", hint="choose another root for the snapshotter"
            )
        if version > len(_MIGRATIONS):
            raise errors.FailedPreconditionError(
                f"{self._path} was written by a later nixlet (schema {version}, this one knows {len(_MIGRATIONS)})",
                hint="run that nixlet, or choose another root for the snapshotter",
            )
        # Nobody else opens it: no locks are taken for each statement, and there is no shared memory beside it.
        run("PRAGMA locking_mode = EXCLUSIVE")
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = FULL")
        run("PRAGMA foreign_keys = ON")
        for number, script in enumerate(_MIGRATIONS[version:], start=version + 1):
            self._db.executescript(
                f"BEGIN; {script} PRAGMA application_id = {_APPLICATION_ID}; PRAGMA user_version = {number}; COMMIT;"
            )
        # A write, so that the log is there.
        run(f"PRAGMA user_version = {len(_MIGRATIONS)}")
        _extend(f"{self._path}-wal")

    def close(self) -> None:
        """Write what is pending and close."""
        self._flush()
        self._db.close()

    async def write(self, change: Callable[[sqlite3.Connection], T]) -> T:
        """Run a change in a transaction and wait until it is durable.

        An exception of ``change`` undoes that change alone, and is raised here.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        if not self._pending:
            loop.call_soon(self._flush)
        self._pending.append((change, future))
        # A caller that is cancelled here loses the answer, never the change.
        return await future

    def _flush(self) -> None:
        pending, self._pending = self._pending, []
        if not pending:
            return
        results: list[tuple[asyncio.Future[Any], Any, BaseException | None]] = []
        db = self._db
        try:
            db.execute("BEGIN IMMEDIATE")
            for change, future in pending:
                db.execute("SAVEPOINT change")
                try:
                    results.append((future, change(db), None))
                except Exception as error:  # noqa: BLE001 (handed to the caller, whose change it was)
                    db.execute("ROLLBACK TO change")
                    results.append((future, None, error))
                db.execute("RELEASE change")
            self._faults.reach("changes-made")
            db.execute("COMMIT")
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):
                db.execute("ROLLBACK")
            failure = errors.FailedPreconditionError(
                f"the snapshotter's database {self._path} can't be written: {error}"
            )
            failure.__cause__ = error
            results = [(future, None, failure) for _, future in pending]
        for future, result, problem in results:
            if future.cancelled():
                continue
            if problem is None:
                future.set_result(result)
            else:
                future.set_exception(problem)

    # Reading. These see what is committed, and inside a change what it has written.

    def find(self, key: str) -> Row | None:
        """The snapshot of that key or name."""
        row = self._db.execute(f"{_SELECT} WHERE s.key = ?", (key,)).fetchone()
        return None if row is None else _row(row)

    def get(self, key: str) -> Row:
        """The snapshot of that key or name.

        Raises:
            NotFoundError: There is none.
        """
        row = self.find(key)
        if row is None:
            raise errors.NotFoundError(f"snapshot {key} does not exist")
        return row

    def named(self, name: str) -> Row | None:
        """The committed snapshot that a client of containerd knows by a name; containerd puts "<namespace>/<n>/" before it."""
        row = self._db.execute(
            f"{_SELECT} WHERE s.kind = ? AND (s.key = ? OR substr(s.key, -length(?) - 1) = '/' || ?) LIMIT 1",
            (int(model.Kind.COMMITTED), name, name, name),
        ).fetchone()
        return None if row is None else _row(row)

    def chain(self, parent: int | None) -> list[Layer]:
        """A snapshot's committed ancestors, nearest first."""
        rows = self._db.execute(
            "WITH RECURSIVE chain (id, parent, closure, depth) AS ("
            " SELECT id, parent, closure, 0 FROM snapshots WHERE id = ?"
            " UNION ALL SELECT s.id, s.parent, s.closure, depth + 1 FROM snapshots s JOIN chain ON s.id = chain.parent)"
            " SELECT id, closure FROM chain ORDER BY depth",
            (parent,),
        )
        return [Layer(*row) for row in rows]

    def page(self, after: int, limit: int) -> list[Row]:
        """Snapshots by number, for listing in pages."""
        rows = self._db.execute(f"{_SELECT} WHERE s.id > ? ORDER BY s.id LIMIT ?", (after, limit))
        return [_row(row) for row in rows]

    def rows(self) -> Iterator[Row]:
        """All snapshots."""
        return map(_row, self._db.execute(f"{_SELECT} ORDER BY s.id").fetchall())

    def snapshot_ids(self) -> set[int]:
        """The numbers of all snapshots."""
        return {row[0] for row in self._db.execute("SELECT id FROM snapshots")}

    def counts(self) -> dict[model.Kind, int]:
        """How many snapshots there are of each kind."""
        counted = dict(self._db.execute("SELECT kind, count(*) FROM snapshots GROUP BY kind"))
        return {kind: counted.get(kind, 0) for kind in model.Kind}

    def closure(self, number: int) -> Closure:
        """A closure by number."""
        row = self._db.execute("SELECT * FROM closures WHERE id = ?", (number,)).fetchone()
        return _closure(row)

    def closure_named(self, identity: str) -> Closure | None:
        """A closure by identity."""
        row = self._db.execute("SELECT * FROM closures WHERE identity = ?", (identity,)).fetchone()
        return None if row is None else _closure(row)

    def is_used(self, closure: int) -> bool:
        """Whether a snapshot brings a closure along."""
        return bool(self._db.execute("SELECT 1 FROM snapshots WHERE closure = ? LIMIT 1", (closure,)).fetchone())

    def closures(self) -> Iterator[Closure]:
        """All closures."""
        return map(_closure, self._db.execute("SELECT * FROM closures ORDER BY id").fetchall())

    def unused_closures(self) -> list[Closure]:
        """Closures that no snapshot brings along any more."""
        rows = self._db.execute(
            "SELECT * FROM closures c WHERE NOT EXISTS (SELECT 1 FROM snapshots s WHERE s.closure = c.id)"
        )
        return [_closure(row) for row in rows]

    # Changes, for use inside write().

    def insert_closure(self, identity: str, reference: str, names: Sequence[str]) -> int:
        """The number of a closure, recorded now if it is new."""
        row = self._db.execute("SELECT id FROM closures WHERE identity = ?", (identity,)).fetchone()
        if row is not None:
            return int(row[0])
        cursor = self._db.execute(
            "INSERT INTO closures (identity, reference, paths) VALUES (?, ?, ?)",
            (identity, reference, "\n".join(names)),
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def insert_snapshot(
        self, key: str, kind: model.Kind, parent: str, labels: Mapping[str, str], closure: int | None, strategy: str
    ) -> Row:
        """Record a new active or view snapshot.

        Raises:
            AlreadyExistsError: The key is taken.
            NotFoundError: There is no such parent.
            InvalidArgumentError: The parent is not committed.
        """
        parent_id = None
        if parent:
            row = self.get(parent)
            if row.kind is not model.Kind.COMMITTED:
                raise errors.InvalidArgumentError(f"parent {parent} is not a committed snapshot")
            parent_id = row.id
        if self.find(key) is not None:
            raise errors.AlreadyExistsError(f"snapshot {key} exists already")
        now, text = time.time_ns(), json.dumps(dict(labels))
        cursor = self._db.execute(
            "INSERT INTO snapshots (key, kind, parent, created, updated, labels, closure, strategy)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (key, int(kind), parent_id, now, now, text, closure, strategy),
        )
        assert cursor.lastrowid is not None
        return Row(cursor.lastrowid, key, kind, parent_id, now, now, text, closure, strategy, 0, 0, parent)

    def commit_snapshot(self, name: str, key: str, labels: Mapping[str, str], usage: model.Usage) -> None:
        """Turn an active snapshot into a committed one; its labels become those of the call, its closure stays.

        Raises:
            NotFoundError: There is no such key.
            AlreadyExistsError: The name is taken.
            FailedPreconditionError: The snapshot is not active.
        """
        if self.find(name) is not None:
            raise errors.AlreadyExistsError(f"snapshot {name} exists already")
        row = self.get(key)
        if row.kind is not model.Kind.ACTIVE:
            raise errors.FailedPreconditionError(f"snapshot {key} is not active and can't be committed")
        now = time.time_ns()
        self._db.execute(
            "UPDATE snapshots SET key = ?, kind = ?, created = ?, updated = ?, labels = ?, size = ?, inodes = ?"
            " WHERE id = ?",
            (name, int(model.Kind.COMMITTED), now, now, json.dumps(dict(labels)), usage.size, usage.inodes, row.id),
        )

    def remove_snapshot(self, key: str) -> Row:
        """Forget a snapshot.

        Raises:
            NotFoundError: There is no such key.
            FailedPreconditionError: Other snapshots stand on it.
        """
        row = self.get(key)
        if self._db.execute("SELECT 1 FROM snapshots WHERE parent = ? LIMIT 1", (row.id,)).fetchone():
            raise errors.FailedPreconditionError(f"cannot remove snapshot {key}: other snapshots have it as parent")
        self._db.execute("DELETE FROM snapshots WHERE id = ?", (row.id,))
        return row

    def set_labels(self, row: Row, labels: Mapping[str, str]) -> None:
        """Replace a snapshot's labels."""
        self._db.execute(
            "UPDATE snapshots SET labels = ?, updated = ? WHERE id = ?",
            (json.dumps(dict(labels)), time.time_ns(), row.id),
        )

    def set_closure(self, row: Row, closure: int) -> None:
        """Let a committed snapshot bring a closure along."""
        self._db.execute("UPDATE snapshots SET closure = ? WHERE id = ?", (closure, row.id))

    def delete_closure(self, closure: int) -> None:
        """Forget a closure that no snapshot brings along."""
        self._db.execute("DELETE FROM closures WHERE id = ?", (closure,))


def _extend(log: str) -> None:
    """Let the write-ahead log have the length from the start to which it grows before it is used again from its beginning.

    A commit that makes a file longer costs the file system a commit of its own journal; one that writes over what is there
    doesn't. What stands behind the last valid frame is ignored (https://www.sqlite.org/fileformat2.html, 4.4).
    """
    with open(log, "ab") as file:
        file.write(bytes(max(0, _LOG_SIZE - file.tell())))
        file.flush()
        os.fsync(file.fileno())


def _row(row: Sequence[Any]) -> Row:
    return Row(row[0], row[1], model.Kind(row[2]), *row[3:])


def _closure(row: Sequence[Any]) -> Closure:
    return Closure(row[0], row[1], row[2], tuple(row[3].split("\n")) if row[3] else ())


def database_path(root: str) -> str:
    """Where the snapshotter below ``root`` keeps its database."""
    return os.path.join(root, "nixlet.db")
