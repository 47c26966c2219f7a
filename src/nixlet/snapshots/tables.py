"""The snapshotter's tables in memory: what is recorded of snapshots and closures, for the event loop to read."""

import collections
import json
from collections.abc import Iterable
from typing import NamedTuple

from nixlet import errors
from nixlet.snapshots import model


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


class Tables:
    """All snapshots and closures.

    containerd asks for them all the time, of one thread, which a query of sqlite takes more time from than a look into a
    dictionary; and while others write, they would have to wait.
    """

    def __init__(self, rows: Iterable[Row], closures: Iterable[Closure]) -> None:
        """Tables with these snapshots and closures, in the order of their numbers."""
        # New ones have higher numbers than all before them: the order stays.
        self._rows = {row.id: row for row in rows}
        self._keys = {row.key: row for row in self._rows.values()}
        # Closures have most of their paths in common, whose names are kept once.
        self._names = _Names()
        self._closures = {closure.id: self._shared(closure) for closure in closures}

    # What is changed here is durable.

    def _put(self, row: Row) -> None:
        """Take in a snapshot, which may be there with another key."""
        before = self._rows.get(row.id)
        if before is not None:
            del self._keys[before.key]
        self._rows[row.id] = self._keys[row.key] = row

    def _drop(self, row: Row) -> None:
        """Leave out a snapshot."""
        del self._rows[row.id]
        del self._keys[row.key]

    def _put_closure(self, closure: Closure) -> None:
        """Take in a closure, or what it is rooted by now."""
        before = self._closures.get(closure.id)
        self._closures[closure.id] = self._shared(closure)
        self._let_go(before)

    def _drop_closure(self, number: int) -> None:
        """Leave out a closure, if it is there."""
        self._let_go(self._closures.pop(number, None))

    def _shared(self, closure: Closure) -> Closure:
        return closure._replace(names=self._names.take(closure.names), roots=self._names.take(closure.roots))

    def _let_go(self, closure: Closure | None) -> None:
        if closure is not None:
            self._names.leave(closure.names)
            self._names.leave(closure.roots)

    # Reading.

    def find(self, key: str) -> Row | None:
        """The snapshot of that key or name."""
        return self._keys.get(key)

    def get(self, key: str) -> Row:
        """The snapshot of that key or name.

        Raises:
            NotFoundError: There is none.
        """
        return existing(self.find(key), key)

    def named(self, name: str) -> Row | None:
        """The committed snapshot that a client of containerd knows by a name; containerd puts "<namespace>/<n>/" before it."""
        for row in self._rows.values():
            if row.kind is model.Kind.COMMITTED and (row.key == name or row.key.endswith(f"/{name}")):
                return row
        return None

    def chain(self, parent: int | None) -> list[Layer]:
        """A snapshot's committed ancestors, nearest first."""
        layers = []
        # Whoever asks may have waited, and all of them may be gone.
        while parent is not None and (row := self._rows.get(parent)) is not None:
            layers.append(Layer(row.id, row.closure))
            parent = row.parent
        return layers

    def rows(self) -> list[Row]:
        """All snapshots, by number."""
        return list(self._rows.values())

    def snapshot_ids(self) -> set[int]:
        """The numbers of all snapshots."""
        return set(self._rows)

    def counts(self) -> dict[model.Kind, int]:
        """How many snapshots there are of each kind."""
        counted = collections.Counter(row.kind for row in self._rows.values())
        return {kind: counted[kind] for kind in model.Kind}

    def closure(self, number: int) -> Closure:
        """A closure by number.

        Raises:
            NotFoundError: There is none; with the last snapshot that brought it along it is forgotten.
        """
        found = self._closures.get(number)
        if found is None:
            raise errors.NotFoundError(f"closure {number} does not exist any more: its snapshots were removed")
        return found

    def closure_named(self, identity: str) -> Closure | None:
        """A closure by identity."""
        return next((closure for closure in self._closures.values() if closure.identity == identity), None)

    def is_used(self, closure: int) -> bool:
        """Whether a snapshot brings a closure along."""
        return any(row.closure == closure for row in self._rows.values())

    def closures(self) -> list[Closure]:
        """All closures."""
        return list(self._closures.values())

    def unused_closures(self) -> list[Closure]:
        """Closures that no snapshot brings along any more."""
        used = {row.closure for row in self._rows.values()}
        return [closure for closure in self._closures.values() if closure.id not in used]


def existing(row: Row | None, key: str) -> Row:
    """A snapshot that was looked for by a key.

    Raises:
        NotFoundError: There is none.
    """
    if row is None:
        raise errors.NotFoundError(f"snapshot {key} does not exist")
    return row


class _Names:
    """Names of which many are the same: each is kept once, as long as it is used."""

    def __init__(self) -> None:
        self._kept: dict[str, str] = {}
        self._uses: collections.Counter[str] = collections.Counter()

    def __len__(self) -> int:
        return len(self._kept)

    def take(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The same names, used once more."""
        kept = tuple(self._kept.setdefault(name, name) for name in names)
        self._uses.update(kept)
        return kept

    def leave(self, names: tuple[str, ...]) -> None:
        """Use them once less."""
        self._uses.subtract(names)
        for name in names:
            if not self._uses[name]:
                del self._uses[name]
                self._kept.pop(name, None)
