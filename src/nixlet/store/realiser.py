"""Bringing closures into the store: one task for each closure, however many ask for it; rooted before anything is fetched."""

import asyncio
import contextlib
import dataclasses
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Collection
from typing import Generic, TypeVar

from nixlet import errors
from nixlet.store import closures, interface, paths, policy, roots
from nixlet.telemetry import progress

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class RealisedClosure:
    """A closure that is in the store.

    Attributes:
        paths: Its store paths, sorted.
        took: What fetching took; nothing when all was there.
    """

    paths: tuple[paths.StorePath, ...]
    took: interface.Realised


class _Shared(Generic[T]):
    """One piece of work with several waiters: it goes on while anyone waits, and ends when the last one gives up."""

    def __init__(self, work: Awaitable[T], name: str) -> None:
        async def run() -> T:
            return await work

        self._task = asyncio.create_task(run(), name=name)
        self._waiters = 0

    async def wait(self) -> T:
        self._waiters += 1
        try:
            return await asyncio.shield(self._task)
        finally:
            self._waiters -= 1
            if not self._waiters and not self._task.done():
                self._task.cancel()


class Realiser:
    """Realises closures in one store."""

    def __init__(self, store: interface.Store, gc_roots: roots.Roots, rules: policy.Policy) -> None:
        self._store = store
        self._roots = gc_roots
        self._policy = rules
        self._running: dict[tuple[str, str | None], _Shared[RealisedClosure]] = {}
        self._sinks: dict[tuple[str, str | None], set[progress.ProgressSink]] = {}

    async def realise_closure(
        self,
        reference: closures.ClosureReference,
        *,
        root_name: str | None = None,
        sink: progress.ProgressSink = progress.ignore,
    ) -> RealisedClosure:
        """Have a closure in the store.

        Args:
            reference: The closure, as an image names it.
            root_name: Under which name to root it durably, or None for not at all.
            sink: Gets the progress; callers who share the work all do.

        Raises:
            NotFoundError: A path can't be had.
            InvalidArgumentError: The closureInfo does not list store paths.
            PermissionDeniedError: A policy refuses a path.
        """
        key = (reference.identity, root_name)
        sinks = self._sinks.setdefault(key, set())
        sinks.add(sink)
        shared = self._running.get(key)
        if shared is None:

            def tell(step: progress.Progress) -> None:
                for each in tuple(sinks):
                    each(step)

            shared = _Shared(self._realise(reference, root_name, tell), f"realise {reference.identity}")
            self._running[key] = shared
        try:
            return await shared.wait()
        finally:
            sinks.discard(sink)
            if self._running.get(key) is shared and not sinks:
                del self._running[key]
                del self._sinks[key]

    async def _realise(
        self, reference: closures.ClosureReference, root_name: str | None, sink: progress.ProgressSink
    ) -> RealisedClosure:
        named = (reference.closure_info,) if reference.closure_info is not None else reference.listed
        if root_name is not None:
            # Roots come before what they protect: Nix skips a root whose path isn't there yet.
            await asyncio.to_thread(self._roots.add, root_name, named)
        async with self._store.session() as session:
            took = await session.realise(named, sink)
            members = named
            if reference.closure_info is not None:
                members = await asyncio.to_thread(self._read_store_paths, reference.closure_info)
                took += await session.realise(members, sink)
            if self._policy.restricts:
                self._policy.check((await session.path_infos(members)).values())
            if root_name is not None:
                enough = await self._enough_roots(session, reference, members)
                if enough != named:
                    await asyncio.to_thread(self._roots.add, root_name, enough)
            return RealisedClosure(tuple(sorted(members)), took)

    @staticmethod
    async def _enough_roots(
        session: interface.StoreSession, reference: closures.ClosureReference, members: Collection[paths.StorePath]
    ) -> tuple[paths.StorePath, ...]:
        """The fewest roots that keep a closure alive: of a closureInfo itself, unless its list names more than it needs."""
        if reference.closure_info is None:
            return interface.top_paths(await session.path_infos(members))
        infos = await session.path_infos([reference.closure_info])
        loose = set(members) - infos[reference.closure_info].references
        return (reference.closure_info, *interface.top_paths(await session.path_infos(sorted(loose))))

    def _read_store_paths(self, closure_info: paths.StorePath) -> tuple[paths.StorePath, ...]:
        """The list of a closureInfo, read without following links: the path's content is foreign."""
        directory = os.path.join(self._store.real_dir, closure_info.name)
        try:
            with contextlib.ExitStack() as stack:
                parent = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
                stack.callback(os.close, parent)
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                file = stack.enter_context(os.fdopen(os.open(closures.STORE_PATHS_FILE, flags, dir_fd=parent), "rb"))
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise OSError
                text = file.read(closures.MAX_LIST_BYTES + 1)
        except OSError as error:
            raise errors.InvalidArgumentError(
                f"the image names {closure_info} as its closure, but that has no file {closures.STORE_PATHS_FILE}"
            ) from error
        return closures.parse_store_paths(text, self._store.store_dir)

    @contextlib.asynccontextmanager
    async def holding(
        self, wanted: Collection[paths.StorePath], sink: progress.ProgressSink = progress.ignore
    ) -> AsyncIterator[interface.Realised]:
        """Have paths in the store, and keep the collector from them for the time of the context."""
        async with self._store.session() as session:
            yield await session.realise(wanted, sink)
