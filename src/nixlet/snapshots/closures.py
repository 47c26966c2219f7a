"""The closures of a snapshotter: brought into the store, rooted, shown as views, and dropped with their last snapshot."""

import asyncio
import contextlib
import json
import logging
import os
import weakref
from collections.abc import AsyncIterator, Iterable, Sequence

from nixlet import errors
from nixlet.snapshots import faults as faults_module
from nixlet.snapshots import metadata as metadata_module
from nixlet.snapshots import model
from nixlet.snapshots import tasks as tasks_module
from nixlet.snapshots import views as views_module
from nixlet.store import closures as closure_references
from nixlet.store import realiser, roots

_log = logging.getLogger("nixlet.snapshots")


class Closures:
    """Keeps in step what the database says of closures, the store's GC roots, and the views."""

    def __init__(
        self,
        database: metadata_module.Metadata,
        views: views_module.Views,
        *,
        store_dir: str,
        real_store_dir: str,
        realise: realiser.Realiser,
        gc_roots: roots.Roots,
        tasks: tasks_module.Tasks,
        faults: faults_module.Faults,
    ) -> None:
        self._faults = faults
        self._tasks = tasks
        self._db = database
        self._views = views
        self._store_dir = store_dir
        self._real_store_dir = real_store_dir
        self._realiser = realise
        self._roots = gc_roots
        # A lock lives as long as somebody holds or awaits it.
        self._locks: weakref.WeakValueDictionary[int | str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._pins: dict[str, int] = {}
        # Closures to the mtime of the store's directory (ns) when all of their paths were last seen in it.
        self._complete: dict[int, int] = {}

    @contextlib.asynccontextmanager
    async def realised(
        self, reference: closure_references.ClosureReference
    ) -> AsyncIterator[metadata_module.NewClosure]:
        """Have a closure in the store and rooted for the time of the context.

        Yields what is to be recorded of it with a snapshot; without a snapshot that refers to it the root is dropped
        again afterwards, in the background.
        """
        identity = reference.identity
        # Not while the same closure is just being dropped.
        async with self._lock(identity):
            self._pins[identity] = self._pins.get(identity, 0) + 1
        try:
            realised = await self._realiser.realise_closure(reference, root_name=identity)
            names = tuple(path.name for path in realised.paths)
            annotations = json.dumps(reference.annotations())
            self._faults.reach("closure-realised")
            yield metadata_module.NewClosure(identity, annotations, names)
        finally:
            self._pins[identity] -= 1
            if not self._pins[identity]:
                del self._pins[identity]
                self._tasks.background(self.drop_unused((identity,)), f"dropping the roots of {identity}")

    async def ensure_shown(self, number: int, strategy: model.Strategy) -> str:
        """The layer that shows a closure: it can be mounted, and all of the closure's paths are in the store.

        Raises:
            FailedPreconditionError: A path is missing and can't be realised again, or the view can't be mounted.
        """
        layer = self._views.layer_path(number, strategy)
        # Whatever adds or deletes a store path changes the mtime of the store's directory: the look at each path is
        # needed once per such change, and three stat calls suffice otherwise.
        if self._views.is_ready(number, strategy) and self._store_mtime() == self._complete.get(number):
            return layer
        async with self._lock(number):
            closure = self._db.closure(number)
            mtime = self._store_mtime()
            missing = await asyncio.to_thread(self._missing, closure.names)
            if missing:
                _log.warning("%d store paths of closure %d are missing; realising them again", len(missing), number)
                await self._realise_again(closure, missing[0])
                # overlayfs caches what it has looked up: a view from before would still show the path as empty. Its
                # metadata stays, since running containers' clones of the view need it.
                await asyncio.to_thread(self._views.unmount, number)
                mtime = self._store_mtime()
            await asyncio.to_thread(self._views.ensure, number, closure.names, strategy)
            self._complete[number] = mtime
        return layer

    def _lock(self, closure: int | str) -> asyncio.Lock:
        """The lock for what is done to a closure's view (by number), or to its record and roots (by identity)."""
        return self._locks.setdefault(closure, asyncio.Lock())

    def _store_mtime(self) -> int:
        return os.stat(self._real_store_dir).st_mtime_ns

    def _missing(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if not os.path.lexists(os.path.join(self._real_store_dir, name))]

    async def _realise_again(self, closure: metadata_module.Closure, example: str) -> None:
        reference = closure_references.parse_annotations(json.loads(closure.reference), self._store_dir)
        assert reference is not None, "only closures that an annotation named are recorded"
        try:
            await self._realiser.realise_closure(reference, root_name=closure.identity)
        except errors.NixletError as error:
            raise views_module.missing_path(f"{self._store_dir}/{example}") from error

    async def drop_unused(self, identities: Iterable[str] = ()) -> None:
        """Drop closures that no snapshot needs, with their views and roots, and the given roots if nothing records them."""
        unused = {closure.identity: closure.id for closure in self._db.unused_closures()}
        for identity in {*identities, *unused}:
            async with self._lock(identity):
                if identity not in self._pins:
                    await self._drop(identity)

    async def _drop(self, identity: str) -> None:
        """Drop a closure, unless a snapshot needs it; nobody takes it up meanwhile."""
        closure = self._db.closure_named(identity)
        if closure is not None:
            if self._db.is_used(closure.id):
                return
            async with self._lock(closure.id):
                await asyncio.to_thread(self._views.remove, closure.id)
                self._faults.reach("view-removed")
                self._complete.pop(closure.id, None)
                await self._db.delete_closure(closure.id)
                self._faults.reach("closure-forgotten")
        await asyncio.to_thread(self._roots.remove, identity)
        self._faults.reach("root-removed")

    async def discard_unfinished(self) -> None:
        """Remove what a crash left half-made; before anything else is done."""
        await asyncio.to_thread(self._roots.discard_unfinished)

    async def sweep(self) -> list[str]:
        """Remove views and roots that the database doesn't know; what was removed, in words."""
        await self.drop_unused()
        # Looked at before the database is: what is made meanwhile is known there, and not seen here.
        numbers = await asyncio.to_thread(self._views.numbers)
        swept = []
        for number in numbers - {closure.id for closure in self._db.closures()}:
            await asyncio.to_thread(self._views.remove, number)
            swept.append(f"view {number}")
        names = set(await asyncio.to_thread(self._roots.names))
        for name in names - {closure.identity for closure in self._db.closures()} - self._pins.keys():
            await self.drop_unused([name])
            swept.append(f"GC root {name}")
        return swept
