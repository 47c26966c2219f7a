"""The closures of a snapshotter: brought into the store, rooted, shown as views, and dropped with their last snapshot."""

import asyncio
import contextlib
import json
import logging
import os
import time
import weakref
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import NamedTuple

from nixlet import errors
from nixlet.host import files, uncut
from nixlet.snapshots import faults as faults_module
from nixlet.snapshots import metadata as metadata_module
from nixlet.snapshots import model, tables
from nixlet.snapshots import tasks as tasks_module
from nixlet.snapshots import views as views_module
from nixlet.store import closures as closure_references
from nixlet.store import paths, realiser, roots

#: The coarsest step in which a file system that can hold a store counts time (ns).
_TICK = 2_000_000_000

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
        # Closures to the state of the store's directory in which all of their paths were last seen in it.
        self._complete: dict[tuple[int, model.Strategy], _StoreState] = {}

    @contextlib.asynccontextmanager
    async def realised(
        self, reference: closure_references.ClosureReference, *, fetch: bool = True
    ) -> AsyncIterator[tables.NewClosure]:
        """Have a closure in the store and rooted for the time of the context; without ``fetch`` it has to be there.

        Yields what is to be recorded of it with a snapshot; without a snapshot that refers to it the root is dropped
        again afterwards, in the background.
        """
        identity = reference.identity
        # Not while the same closure is just being dropped.
        async with self._lock(identity):
            self._pins[identity] = self._pins.get(identity, 0) + 1
        try:
            async with self._realiser.realised(reference, fetch=fetch) as realised:
                await self._root(identity, realised)
                names = tuple(path.name for path in realised.members)
                annotations = json.dumps(reference.annotations())
                self._faults.reach("closure-realised")
                rooted = tuple(path.name for path in realised.roots)
                yield tables.NewClosure(identity, annotations, names, rooted)
        finally:
            self._pins[identity] -= 1
            if not self._pins[identity]:
                del self._pins[identity]
                self._tasks.background(self.drop_unused((identity,)), f"dropping the roots of {identity}")

    async def _root(self, identity: str, realised: realiser.RealisedClosure) -> None:
        """Have what keeps a closure on the disk before anything relies on it, and know that the closure was held until then."""
        await uncut.to_its_end(asyncio.to_thread(self._roots.set, identity, realised.roots))
        if self._roots.indirect:
            await realised.session.add_indirect_roots(await asyncio.to_thread(self._roots.links, identity))
        realised.check_held()

    async def ensure_shown(self, number: int, strategy: model.Strategy) -> str:
        """The layer that shows a closure: it can be mounted, and all of the closure's paths are in the store.

        Raises:
            FailedPreconditionError: A path is missing and can't be realised again, or the view can't be mounted.
        """
        # Whatever adds, deletes or replaces a store path changes the store's directory: the look at each path is needed
        # once per such change, and three stat calls suffice otherwise.
        layer = self._views.layer(number, strategy)
        if layer is not None and self._store_state() == self._complete.get((number, strategy)):
            return layer
        async with self._lock(number):
            closure = self._db.closure(number)
            state = self._store_state()
            seen, missing = await self._look(closure)
            if missing:
                _log.warning("%d store paths of closure %d are missing; realising them again", len(missing), number)
                await self._realise_again(closure, missing[0])
                state = self._store_state()
                seen, missing = await self._look(closure)
                if missing:
                    raise views_module.missing_path(f"{self._store_dir}/{missing[0]}")
            layer = await asyncio.to_thread(self._views.show, number, seen, strategy)
            if state.settled:
                self._complete[number, strategy] = state
            else:
                self._complete.pop((number, strategy), None)
        return layer

    async def ensure_pieces(self, number: int) -> views_module.Pieces:
        """Over what a closure's view is mounted: all of its paths are in the store, as in ``ensure_shown``."""
        await self.ensure_shown(number, model.Strategy.VIEW)
        return self._views.pieces(number)

    def _lock(self, closure: int | str) -> asyncio.Lock:
        """The lock for what is done to a closure's view (by number), or to its record and roots (by identity)."""
        return self._locks.setdefault(closure, asyncio.Lock())

    async def _look(self, closure: tables.Closure) -> tuple[dict[str, views_module.Seen], list[str]]:
        with self._refusing():
            return await asyncio.to_thread(self._views.look, closure.names)

    def _refusing(self) -> contextlib.AbstractContextManager[None]:
        """Tell what the store's file system refuses as its refusal, and not as one of ours."""
        return files.refusing(f"the Nix store {self._real_store_dir} can't be used")

    def _store_state(self) -> "_StoreState":
        with self._refusing():
            status = os.stat(self._real_store_dir)
        return _StoreState(status.st_dev, status.st_ino, status.st_ctime_ns)

    async def _realise_again(self, closure: tables.Closure, example: str) -> None:
        reference = closure_references.parse_annotations(json.loads(closure.reference), self._store_dir)
        assert reference is not None, "only closures that an annotation named are recorded"
        try:
            async with self._realiser.realised(reference) as realised:
                await self._root(closure.identity, realised)
        except errors.FailedPreconditionError:
            raise  # Nix believes it valid: the error says so
        except errors.NixletError as error:
            raise views_module.missing_path(f"{self._store_dir}/{example}") from error

    async def drop_unused(self, identities: Iterable[str] = ()) -> None:
        """Drop closures that no snapshot needs, with their views and roots, and the given roots if nothing records them.

        What can't be dropped stays, with a warning, for the next sweep.
        """
        unused = {closure.identity: closure.id for closure in self._db.unused_closures()}
        for identity in {*identities, *unused}:
            async with self._lock(identity):
                if identity not in self._pins:
                    with _going_on(f"the closure {identity}, which nothing needs, stays"):
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
                for strategy in model.Strategy:
                    self._complete.pop((closure.id, strategy), None)
                await self._db.delete_closure(closure.id)
                self._faults.reach("closure-forgotten")
        await asyncio.to_thread(self._roots.remove, identity)
        self._faults.reach("root-removed")

    async def sweep(self) -> list[str]:
        """Remove views and roots that the database doesn't know, and make roots again that are lost.

        What can't be done for one of them is told in the log, and keeps nothing from being done for the others.

        Returns:
            What was done, in words.
        """
        await self.drop_unused()
        # Looked at before the database is: what is made meanwhile is known there, and not seen here.
        numbers = await asyncio.to_thread(self._views.numbers)
        swept = []
        for number in numbers - {closure.id for closure in self._db.closures()}:
            with _going_on(f"the view {number}, which nothing needs, stays"):
                await asyncio.to_thread(self._views.remove, number)
                swept.append(f"view {number}")
        with _going_on("GC roots that nothing needs stay"):
            names = set(await asyncio.to_thread(self._roots.names))
            names -= {closure.identity for closure in self._db.closures()} | self._pins.keys()
            await self.drop_unused(names)
            swept += [f"GC root {name}" for name in sorted(names - {*await asyncio.to_thread(self._roots.names)})]
        for closure in self._db.closures():
            async with self._lock(closure.identity):
                if self._db.closure_named(closure.identity) == closure:
                    with _going_on(f"the garbage collector may take paths of the closure {closure.identity}"):
                        if await asyncio.to_thread(self._root_again, closure):
                            swept.append(f"the lost GC root {closure.identity}, made again")
        if self._roots.indirect:
            # Nix may take its time.
            self._tasks.background(self._announce(), "telling Nix of GC roots")
        return swept

    async def _announce(self) -> None:
        """Have Nix know of the roots that it doesn't find by itself: it may have forgotten them, as of a disk that was away."""
        with _going_on("the garbage collector may not know of this snapshotter's roots"):
            for closure in self._db.closures():
                await self._realiser.keep(await asyncio.to_thread(self._roots.links, closure.identity))

    def _root_again(self, closure: tables.Closure) -> bool:
        """Root a closure whose roots are lost, or a part of them, as by a power cut; whether they were.

        All of its paths are rooted then: which of them keep the others now only Nix knows, who may not answer.
        """
        reference = closure_references.parse_annotations(json.loads(closure.reference), self._store_dir)
        assert reference is not None, "only closures that an annotation named are recorded"
        info = reference.closure_info
        names = closure.names if info is None else (info.name, *closure.names)
        if set(self._roots.paths(closure.identity)) >= set(closure.roots or names):
            return False
        self._roots.set(closure.identity, [paths.from_name(name, self._store_dir) for name in names])
        return True


@contextlib.contextmanager
def _going_on(what: str) -> Iterator[None]:
    """Tell in the log what fails, and go on: it is tried again by the next sweep."""
    try:
        yield
    except (errors.NixletError, OSError) as error:
        _log.warning("%s: %s", what, error)


class _StoreState(NamedTuple):
    """What the store's directory was when it was looked at: another one, or its last change (ns), tells that it changed."""

    device: int
    inode: int
    changed: int

    @property
    def settled(self) -> bool:
        """Whether it has not changed for so long that no later change can have the same time (file systems count in steps)."""
        return abs(time.time_ns() - self.changed) > _TICK
