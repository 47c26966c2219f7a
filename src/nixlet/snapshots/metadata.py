"""What the snapshotter knows: its tables of snapshots and closures, with containerd's rules for changing them."""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from nixlet import errors
from nixlet.snapshots import database, model, refusals, schema, tables
from nixlet.snapshots import faults as faults_module

#: The tables whose rows' numbers are also the names of directories.
Numbered = Literal["snapshots", "closures"]
_NUMBERED: tuple[Numbered, ...] = get_args(Numbered)

_SELECT = "SELECT s.*, coalesce(p.key, '') FROM snapshots s LEFT JOIN snapshots p ON p.id = s.parent"

#: What a change does on the disk, in its transaction: it is given the snapshot, and a stack for callbacks that undo it.
Effect = Callable[[tables.Row, contextlib.ExitStack], None]


class Metadata(tables.Tables):
    """The tables; one instance for the life of the snapshotter, used in the event loop's thread only.

    What is asked of them is answered from what is durable: of a change that is being made nothing is seen, though it may have had its
    effect on the disk.
    """

    def __init__(
        self,
        path: str,
        faults: faults_module.Faults | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open or create them.

        Args:
            path: The database's file.
            faults: Where tests can have the process killed.
            clock: Seconds, for telling what takes long.

        Raises:
            FailedPreconditionError: It is damaged, foreign, or of a later nixlet.
            ResourceExhaustedError: The disk is full.
            UnavailableError: The disk has another trouble.
        """
        opened = database.Database(path, schema.MIGRATIONS, faults or faults_module.Faults(), clock)
        with contextlib.ExitStack() as stack:
            stack.callback(opened.close_unused)
            rows, closures = opened.read(f"{_SELECT} ORDER BY s.id"), opened.read("SELECT * FROM closures ORDER BY id")
            # The numbers that were given to a snapshot or closure are counted here as well: sqlite's own count goes back with a
            # transaction that fails, and a number that was seen on the disk once must never mean something else.
            self._last = dict.fromkeys(_NUMBERED, 0) | dict(opened.read("SELECT name, seq FROM sqlite_sequence"))
            try:
                super().__init__(map(_row, rows), map(_closure, closures))
            except (ValueError, TypeError, AttributeError) as error:
                raise refusals.unreadable(path, error) from error
            stack.pop_all()
        self._database = opened
        # For the changes, which mostly run in the writer's thread.
        self._run = opened.connection.execute
        self._write = opened.write
        self.close = opened.close
        self.close_unused = opened.close_unused
        self.check = opened.check

    def issued(self, table: Numbered) -> int:
        """The highest number that was given to a row of a table."""
        return self._last[table]

    def pass_over(self, table: Numbered, number: int) -> None:
        """Give none of the numbers up to this one to a row of a table: something on the disk has it."""
        self._last[table] = max(self._last[table], number)

    def _number(self, table: Numbered) -> int:
        self._last[table] += 1
        return self._last[table]

    async def settled(self) -> None:
        """Wait for what was asked for until now: afterwards what it has done on the disk is known, or undone.

        Raises:
            UnavailableError: It can't be undone yet, or the database is closed.
        """
        try:
            await self._write(lambda _effects: None)
        except errors.NixletError:
            # What shared a transaction with others, whose commit failed, is undone with them.
            self.check(math.inf)

    # Changes. Each is a transaction, durable when the call returns; it is made or not made also when the caller gives up.

    async def create_snapshot(
        self,
        key: str,
        kind: model.Kind,
        parent: str,
        labels: Mapping[str, str],
        *,
        strategy: str,
        closure: tables.NewClosure | None = None,
        effect: Effect = lambda _row, _undo: None,
    ) -> tables.Row:
        """Record a new active or view snapshot, and the closure that it brings along.

        Raises:
            AlreadyExistsError: The key is taken.
            NotFoundError: There is no such parent.
            InvalidArgumentError: The parent is not committed.
        """

        def change(effects: database.Effects) -> tables.Row:
            parent_id = None
            if parent:
                found = self._stored(parent)
                if found.kind is not model.Kind.COMMITTED:
                    raise errors.InvalidArgumentError(f"parent {parent} is not a committed snapshot")
                parent_id = found.id
            if self._look(key) is not None:
                raise errors.AlreadyExistsError(f"snapshot {key} exists already")
            number = None if closure is None else self._record(closure, effects)
            now, text = time.time_ns(), json.dumps(dict(labels))
            own = self._number("snapshots")
            self._run(
                "INSERT INTO snapshots (id, key, kind, parent, created, updated, labels, closure, strategy)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (own, key, int(kind), parent_id, now, now, text, number, strategy),
            )
            row = tables.Row(own, key, kind, parent_id, now, now, text, number, strategy, 0, 0, parent)
            effects.durable.append(lambda: self._put(row))
            effect(row, effects.undo)
            return row

        return await self._write(change)

    def _look(self, key: str) -> tables.Row | None:
        """The snapshot of that key or name as the transaction sees it."""
        row = self._run(f"{_SELECT} WHERE s.key = ?", (key,)).fetchone()
        return None if row is None else _row(row)

    def _stored(self, key: str) -> tables.Row:
        """The same; raises NotFoundError if there is none."""
        return tables.existing(self._look(key), key)

    def _stored_closure(self, number: int) -> tables.Closure:
        return _closure(self._run("SELECT * FROM closures WHERE id = ?", (number,)).fetchone())

    def _record(self, new: tables.NewClosure, effects: database.Effects) -> int:
        """The number of a closure, recorded now if it is new; with what it is rooted by now."""
        stored = self._run("SELECT * FROM closures WHERE identity = ?", (new.identity,)).fetchone()
        if stored is not None:
            closure = _closure(stored)._replace(roots=new.roots)
            self._run("UPDATE closures SET roots = ? WHERE id = ?", ("\n".join(new.roots), closure.id))
        else:
            closure = tables.Closure(self._number("closures"), *new)
            self._run(
                "INSERT INTO closures (id, identity, reference, paths, roots) VALUES (?, ?, ?, ?, ?)",
                (closure.id, new.identity, new.reference, "\n".join(new.names), "\n".join(new.roots)),
            )
        effects.durable.append(lambda: self._put_closure(closure))
        return closure.id

    async def commit_snapshot(
        self,
        name: str,
        key: str,
        labels: Mapping[str, str],
        measure: Callable[[], model.Usage | None],
        number: int | None = None,
    ) -> bool:
        """Turn an active snapshot into a committed one; its labels become those of the call, its closure stays.

        Args:
            name: Its name from then on.
            key: Its key until then.
            labels: Its labels.
            measure: Says in the transaction what it takes of the disk; None: that takes time, and nothing is changed.
            number: The number of the snapshot that is measured: the key may be another one's by now.

        Returns:
            Whether it was measured and is committed.

        Raises:
            NotFoundError: There is no such key; or it is another snapshot's now than the one that was measured.
            AlreadyExistsError: The name is taken.
            FailedPreconditionError: The snapshot is not active.
        """

        def change(effects: database.Effects) -> bool:
            if self._look(name) is not None:
                raise errors.AlreadyExistsError(f"snapshot {name} exists already")
            row = self._stored(key)
            if row.kind is not model.Kind.ACTIVE:
                raise errors.FailedPreconditionError(f"snapshot {key} is not active and can't be committed")
            if number is not None and row.id != number:
                raise errors.NotFoundError(f"snapshot {key} was removed while it was being committed")
            usage = measure()
            if usage is None:
                return False
            now, text = time.time_ns(), json.dumps(dict(labels))
            self._run(
                "UPDATE snapshots SET key = ?, kind = ?, created = ?, updated = ?, labels = ?, size = ?, inodes = ?"
                " WHERE id = ?",
                (name, int(model.Kind.COMMITTED), now, now, text, usage.size, usage.inodes, row.id),
            )
            changed = row._replace(key=name, kind=model.Kind.COMMITTED, created=now, updated=now, labels=text)
            effects.durable.append(lambda: self._put(changed._replace(size=usage.size, inodes=usage.inodes)))
            return True

        return await self._write(change)

    async def remove_snapshot(self, key: str) -> tables.Row:
        """Forget a snapshot.

        Raises:
            NotFoundError: There is no such key.
            FailedPreconditionError: Other snapshots stand on it.
        """
        return await self._write(lambda effects: self._forget(self._stored(key), effects))

    async def undo_creation(self, row: tables.Row) -> bool:
        """Forget a snapshot that nobody was told of, unless it has become a layer meanwhile; whether it is forgotten now.

        The key may be another snapshot's by now, which stays.
        """

        def change(effects: database.Effects) -> bool:
            now = self._look(row.key)
            if now is None or now.id != row.id or now.kind is model.Kind.COMMITTED:
                return False
            self._forget(now, effects)
            return True

        return await self._write(change)

    def _forget(self, row: tables.Row, effects: database.Effects) -> tables.Row:
        if self._run("SELECT 1 FROM snapshots WHERE parent = ? LIMIT 1", (row.id,)).fetchone():
            raise errors.FailedPreconditionError(f"cannot remove snapshot {row.key}: other snapshots have it as parent")
        self._run("DELETE FROM snapshots WHERE id = ?", (row.id,))
        effects.durable.append(lambda: self._drop(row))
        return row

    async def update_labels(
        self,
        name: str,
        change_labels: Callable[[Mapping[str, str]], Mapping[str, str]],
        closure: tables.NewClosure | None = None,
        number: int | None = None,
    ) -> tables.Row:
        """Change a snapshot's labels; a committed one that brings no closure along may be given one.

        Args:
            name: Its key or name.
            change_labels: The new labels, of those that it has when it is changed.
            closure: Its closure, if it is committed: recorded where it has none.
            number: The number of the snapshot that the closure fits: the name may be another one's by now.

        Raises:
            NotFoundError: There is no such snapshot; or it is another one now than the one that was looked at.
            FailedPreconditionError: It has a closure with other paths.
        """

        def change(effects: database.Effects) -> tables.Row:
            row = self._stored(name)
            if number is not None and row.id != number:
                raise errors.NotFoundError(f"snapshot {name} was removed while it was being updated")
            own = row.closure
            if closure is not None and row.kind is model.Kind.COMMITTED:
                if own is None:
                    own = self._record(closure, effects)
                elif set(closure.names) != set(self._stored_closure(own).names):
                    raise errors.FailedPreconditionError(f"the layer {name} has another closure already")
            text = json.dumps(dict(change_labels(json.loads(row.labels))))
            changed = row._replace(labels=text, updated=time.time_ns(), closure=own)
            self._run(
                "UPDATE snapshots SET labels = ?, updated = ?, closure = ? WHERE id = ?",
                (text, changed.updated, own, row.id),
            )
            effects.durable.append(lambda: self._put(changed))
            return changed

        return await self._write(change)

    async def delete_closure(self, closure: int) -> None:
        """Forget a closure that no snapshot brings along."""

        def change(effects: database.Effects) -> None:
            self._run("DELETE FROM closures WHERE id = ?", (closure,))
            effects.durable.append(lambda: self._drop_closure(closure))

        await self._write(change)


def _row(values: Sequence[Any]) -> tables.Row:
    return tables.Row(values[0], values[1], model.Kind(values[2]), *values[3:])


def _closure(values: Sequence[Any]) -> tables.Closure:
    names, roots = (tuple(text.split("\n")) if text else () for text in values[3:5])
    return tables.Closure(values[0], values[1], values[2], names, roots)


def database_path(root: str) -> str:
    """Where the snapshotter below ``root`` keeps its database."""
    return os.path.join(root, "nixlet.db")
