"""What the snapshotter knows: its tables of snapshots and closures, with containerd's rules for changing them."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

from nixlet import errors
from nixlet.snapshots import database, model, schema
from nixlet.snapshots import faults as faults_module

#: The tables whose rows' numbers are also the names of directories.
Numbered = Literal["snapshots", "closures"]
_NUMBERED: tuple[Numbered, ...] = get_args(Numbered)

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
        roots: The base names of those whose GC roots keep all of it; none where nobody knows.
    """

    id: int
    identity: str
    reference: str
    names: tuple[str, ...]
    roots: tuple[str, ...]


class NewClosure(NamedTuple):
    """What is recorded of a closure, together with a snapshot that brings it along; as in ``Closure``."""

    identity: str
    reference: str
    names: tuple[str, ...]
    roots: tuple[str, ...] = ()


#: What a change does on the disk, in its transaction: it is given the snapshot, and a stack for callbacks that undo it.
Effect = Callable[[Row, contextlib.ExitStack], None]


class Metadata:
    """The tables; one instance for the life of the snapshotter, used in the event loop's thread only."""

    def __init__(self, path: str, faults: faults_module.Faults | None = None) -> None:
        """Open or create them.

        Args:
            path: The database's file.
            faults: Where tests can have the process killed.

        Raises:
            FailedPreconditionError: It is damaged, foreign, or of a later nixlet.
            ResourceExhaustedError: The disk is full.
            UnavailableError: The disk has another trouble.
        """
        opened = database.Database(path, schema.MIGRATIONS, faults or faults_module.Faults())
        self._db = opened.connection
        self._write = opened.write
        self.close = opened.close
        # The numbers that were given to a snapshot or closure are counted here as well: sqlite's own count goes back with a
        # transaction that fails, and a number that was seen on the disk once must never mean something else.
        self._last = dict.fromkeys(_NUMBERED, 0)
        for table, number in self._db.execute("SELECT name, seq FROM sqlite_sequence"):
            self._last[table] = number

    def issued(self, table: Numbered) -> int:
        """The highest number that was given to a row of a table."""
        return self._last[table]

    def pass_over(self, table: Numbered, number: int) -> None:
        """Give none of the numbers up to this one to a row of a table: something on the disk has it."""
        self._last[table] = max(self._last[table], number)

    def _number(self, table: Numbered) -> int:
        self._last[table] += 1
        return self._last[table]

    # Reading. These see what is committed: a transaction begins and ends in one turn of the event loop.

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
        if parent is None:
            return []
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
        """A closure by number.

        Raises:
            NotFoundError: There is none; with the last snapshot that brought it along it is forgotten.
        """
        row = self._db.execute("SELECT * FROM closures WHERE id = ?", (number,)).fetchone()
        if row is None:
            raise errors.NotFoundError(f"closure {number} does not exist any more: its snapshots were removed")
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

    # Changes. Each is a transaction, durable when the call returns; it is made or not made also when the caller gives up.

    async def create_snapshot(
        self,
        key: str,
        kind: model.Kind,
        parent: str,
        labels: Mapping[str, str],
        *,
        strategy: str,
        closure: NewClosure | None = None,
        effect: Effect = lambda _row, _undo: None,
    ) -> Row:
        """Record a new active or view snapshot, and the closure that it brings along.

        Raises:
            AlreadyExistsError: The key is taken.
            NotFoundError: There is no such parent.
            InvalidArgumentError: The parent is not committed.
        """

        def change(undo: contextlib.ExitStack) -> Row:
            parent_id = None
            if parent:
                found = self.get(parent)
                if found.kind is not model.Kind.COMMITTED:
                    raise errors.InvalidArgumentError(f"parent {parent} is not a committed snapshot")
                parent_id = found.id
            if self.find(key) is not None:
                raise errors.AlreadyExistsError(f"snapshot {key} exists already")
            number = None if closure is None else self._record(closure)
            now, text = time.time_ns(), json.dumps(dict(labels))
            own = self._number("snapshots")
            self._db.execute(
                "INSERT INTO snapshots (id, key, kind, parent, created, updated, labels, closure, strategy)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (own, key, int(kind), parent_id, now, now, text, number, strategy),
            )
            row = Row(own, key, kind, parent_id, now, now, text, number, strategy, 0, 0, parent)
            effect(row, undo)
            return row

        return await self._write(change)

    def _record(self, closure: NewClosure) -> int:
        """The number of a closure, recorded now if it is new; with what it is rooted by now."""
        roots = "\n".join(closure.roots)
        row = self._db.execute("SELECT id FROM closures WHERE identity = ?", (closure.identity,)).fetchone()
        if row is not None:
            self._db.execute("UPDATE closures SET roots = ? WHERE id = ? AND roots != ?", (roots, row[0], roots))
            return int(row[0])
        number = self._number("closures")
        self._db.execute(
            "INSERT INTO closures (id, identity, reference, paths, roots) VALUES (?, ?, ?, ?, ?)",
            (number, closure.identity, closure.reference, "\n".join(closure.names), roots),
        )
        return number

    async def commit_snapshot(
        self, name: str, key: str, labels: Mapping[str, str], usage: model.Usage, number: int | None = None
    ) -> None:
        """Turn an active snapshot into a committed one; its labels become those of the call, its closure stays.

        Args:
            name: Its name from then on.
            key: Its key until then.
            labels: Its labels.
            usage: What it takes of the disk.
            number: The number of the snapshot that was measured: the key may be another one's by now.

        Raises:
            NotFoundError: There is no such key; or it is another snapshot's now than the one that was measured.
            AlreadyExistsError: The name is taken.
            FailedPreconditionError: The snapshot is not active.
        """

        def change(_: contextlib.ExitStack) -> None:
            if self.find(name) is not None:
                raise errors.AlreadyExistsError(f"snapshot {name} exists already")
            row = self.get(key)
            if row.kind is not model.Kind.ACTIVE:
                raise errors.FailedPreconditionError(f"snapshot {key} is not active and can't be committed")
            if number is not None and row.id != number:
                raise errors.NotFoundError(f"snapshot {key} was removed while it was being committed")
            now = time.time_ns()
            self._db.execute(
                "UPDATE snapshots SET key = ?, kind = ?, created = ?, updated = ?, labels = ?, size = ?, inodes = ?"
                " WHERE id = ?",
                (name, int(model.Kind.COMMITTED), now, now, json.dumps(dict(labels)), usage.size, usage.inodes, row.id),
            )

        await self._write(change)

    async def remove_snapshot(self, key: str) -> Row:
        """Forget a snapshot.

        Raises:
            NotFoundError: There is no such key.
            FailedPreconditionError: Other snapshots stand on it.
        """
        return await self._write(lambda _: self._forget(self.get(key)))

    async def undo_creation(self, row: Row) -> bool:
        """Forget a snapshot that nobody was told of, unless it has become a layer meanwhile; whether it is forgotten now.

        The key may be another snapshot's by now, which stays.
        """

        def change(_: contextlib.ExitStack) -> bool:
            now = self.find(row.key)
            if now is None or now.id != row.id or now.kind is model.Kind.COMMITTED:
                return False
            self._forget(now)
            return True

        return await self._write(change)

    def _forget(self, row: Row) -> Row:
        if self._db.execute("SELECT 1 FROM snapshots WHERE parent = ? LIMIT 1", (row.id,)).fetchone():
            raise errors.FailedPreconditionError(f"cannot remove snapshot {row.key}: other snapshots have it as parent")
        self._db.execute("DELETE FROM snapshots WHERE id = ?", (row.id,))
        return row

    async def update_labels(
        self,
        name: str,
        change_labels: Callable[[Mapping[str, str]], Mapping[str, str]],
        closure: NewClosure | None = None,
        number: int | None = None,
    ) -> Row:
        """Change a snapshot's labels; a committed one that brings no closure along may be given one.

        Args:
            name: Its key or name.
            change_labels: The new labels, of those that it has when it is changed.
            closure: Its closure from now on, if it is committed and has none.
            number: The number of the snapshot that the closure fits: the name may be another one's by now.

        Raises:
            NotFoundError: There is no such snapshot; or it is another one now than the one that was looked at.
        """

        def change(_: contextlib.ExitStack) -> Row:
            row = self.get(name)
            if number is not None and row.id != number:
                raise errors.NotFoundError(f"snapshot {name} was removed while it was being updated")
            if closure is not None and row.kind is model.Kind.COMMITTED and row.closure is None:
                self._db.execute("UPDATE snapshots SET closure = ? WHERE id = ?", (self._record(closure), row.id))
            labels = change_labels(json.loads(row.labels))
            self._db.execute(
                "UPDATE snapshots SET labels = ?, updated = ? WHERE id = ?",
                (json.dumps(dict(labels)), time.time_ns(), row.id),
            )
            return self.get(name)

        return await self._write(change)

    async def delete_closure(self, closure: int) -> None:
        """Forget a closure that no snapshot brings along."""

        def change(_: contextlib.ExitStack) -> None:
            self._db.execute("DELETE FROM closures WHERE id = ?", (closure,))

        await self._write(change)


def _row(values: Sequence[Any]) -> Row:
    return Row(values[0], values[1], model.Kind(values[2]), *values[3:])


def _closure(values: Sequence[Any]) -> Closure:
    names, roots = (tuple(text.split("\n")) if text else () for text in values[3:5])
    return Closure(values[0], values[1], values[2], names, roots)


def database_path(root: str) -> str:
    """Where the snapshotter below ``root`` keeps its database."""
    return os.path.join(root, "nixlet.db")
