"""Bringing closures into the store: one task for each closure, however many ask for it; rooted before anything is fetched."""

import asyncio
import contextlib
import dataclasses
import os
import stat
from collections.abc import AsyncIterator, Callable, Collection, Coroutine
from typing import Any, Generic, ParamSpec, TypeVar

from nixlet import errors
from nixlet.store import closures, interface, paths, policy, roots
from nixlet.telemetry import progress

K = TypeVar("K")
P = ParamSpec("P")
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

    def __init__(self, work: Callable[[progress.ProgressSink], Coroutine[Any, Any, T]], name: str) -> None:
        self._sinks: list[progress.ProgressSink] = []
        self.task = asyncio.create_task(work(self._tell), name=name)

    def _tell(self, step: progress.Progress) -> None:
        for sink in self._sinks:
            sink(step)

    async def wait(self, sink: progress.ProgressSink) -> T:
        self._sinks.append(sink)
        try:
            return await asyncio.shield(self.task)
        finally:
            self._sinks.remove(sink)
            if not self._sinks:
                self.task.cancel()


class Realiser:
    """Realises closures in one store."""

    def __init__(
        self,
        store: interface.Store,
        gc_roots: roots.Roots,
        rules: policy.Policy,
        *,
        observe: Callable[[interface.Realised], None] = lambda _: None,
    ) -> None:
        """Realise in ``store``, as ``rules`` allow; ``observe`` learns of all that was fetched."""
        self._observe = observe
        self._store = store
        self._roots = gc_roots
        self._policy = rules
        self._running: dict[tuple[str, str | None], _Shared[RealisedClosure]] = {}
        self._running_paths: dict[frozenset[paths.StorePath], _Shared[interface.Realised]] = {}

    @property
    def store_dir(self) -> str:
        """What its store's paths begin with."""
        return self._store.store_dir

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
            root_name: Under which name to root it durably, or None for not at all. If this fails, a name that was
                new is gone again.
            sink: Gets the progress; callers who share the work all do.

        Raises:
            NotFoundError: A path can't be had.
            InvalidArgumentError: The closureInfo does not list store paths, or lists strange ones.
            PermissionDeniedError: A policy refuses a path.
        """

        async def work(tell: progress.ProgressSink) -> RealisedClosure:
            return await self._realise(reference, root_name, tell)

        return await _share(self._running, (reference.identity, root_name), work, sink)

    async def realise_paths(
        self, wanted: Collection[paths.StorePath], sink: progress.ProgressSink = progress.ignore
    ) -> interface.Realised:
        """Have paths in the store, unrooted; callers who want the same ones at the same time share the work.

        Raises:
            NotFoundError: A path can't be had.
        """

        async def work(tell: progress.ProgressSink) -> interface.Realised:
            async with self._store.session() as session:
                return await self._bring(session, wanted, tell)

        return await _share(self._running_paths, frozenset(wanted), work, sink)

    @contextlib.asynccontextmanager
    async def holding(
        self, wanted: Collection[paths.StorePath], sink: progress.ProgressSink = progress.ignore
    ) -> AsyncIterator[interface.Realised]:
        """Have paths in the store, and keep the collector from them for the time of the context.

        Raises:
            NotFoundError: A path can't be had.
            PermissionDeniedError: A policy refuses a path.
        """
        async with self._store.session() as session:
            took = await self._bring(session, wanted, sink)
            if self._policy.restricts:
                self._policy.check((await session.path_infos(wanted)).values())
            yield took

    async def _bring(
        self, session: interface.StoreSession, wanted: Collection[paths.StorePath], sink: progress.ProgressSink
    ) -> interface.Realised:
        took = await session.realise(wanted, sink)
        self._observe(took)
        return took

    async def _realise(
        self, reference: closures.ClosureReference, root_name: str | None, sink: progress.ProgressSink
    ) -> RealisedClosure:
        named = (reference.closure_info,) if reference.closure_info is not None else reference.listed
        async with self._store.session() as session, self._rooted(root_name, named) as root:
            took = await self._bring(session, named, sink)
            members, loose = named, set(named)
            if reference.closure_info is not None:
                members = await asyncio.to_thread(self._read_store_paths, reference.closure_info)
                loose = await self._loose(session, reference.closure_info, members)
                # What a valid path refers to is valid: only what it doesn't refer to has to be brought.
                if loose:
                    took += await self._bring(session, sorted(loose), sink)
            if self._policy.restricts:
                self._policy.check((await session.path_infos(members)).values())
            if root_name is not None:
                # A closureInfo keeps what it refers to; the older form is kept by those that nothing else refers to.
                infos = (reference.closure_info,) if reference.closure_info is not None else ()
                await root((*infos, *interface.top_paths(await session.path_infos(sorted(loose)))))
            return RealisedClosure(tuple(sorted(members)), took)

    @contextlib.asynccontextmanager
    async def _rooted(
        self, name: str | None, first: Collection[paths.StorePath]
    ) -> AsyncIterator[Callable[[Collection[paths.StorePath]], Coroutine[Any, Any, None]]]:
        """Root paths before they are fetched (Nix skips a root whose path isn't there yet); yields what roots others.

        What the name held before stays until something better takes its place, and after a failure.
        """

        async def root(rooted: Collection[paths.StorePath]) -> None:
            if name is not None:
                await _in_thread(self._roots.add, name, rooted)

        before = set() if name is None else set(await asyncio.to_thread(self._roots.paths, name))
        try:
            if not before:
                await root(first)
            yield root
        except BaseException:
            if name is not None and not before:
                await _in_thread(self._roots.remove, name)
            raise

    @staticmethod
    async def _loose(
        session: interface.StoreSession, closure_info: paths.StorePath, members: Collection[paths.StorePath]
    ) -> set[paths.StorePath]:
        """Members that a closureInfo doesn't refer to, as in one that was written by hand: they need their own roots.

        Raises:
            InvalidArgumentError: One of them isn't in the store; an image can't have arbitrary paths fetched this way.
        """
        infos = await session.path_infos([closure_info])
        loose = set(members) - infos[closure_info].references
        if loose:
            loose -= (await session.closure([closure_info])).keys()
        if loose:
            await session.hold(loose)
            strange = sorted(loose - await session.present(loose))
            if strange:
                raise errors.InvalidArgumentError(
                    f"{closure_info} lists {strange[0]}, which it does not refer to and which is not in the Nix store",
                    hint=f"make it with nixpkgs' closureInfo, or bring the path here: nix-store --realise {strange[0]}",
                )
        return loose

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


async def _share(
    running: dict[K, _Shared[T]],
    key: K,
    work: Callable[[progress.ProgressSink], Coroutine[Any, Any, T]],
    sink: progress.ProgressSink,
) -> T:
    """Wait for the work under a key, starting it where it isn't under way."""
    while (shared := running.get(key)) is not None and shared.task.cancelling():
        # All who wanted it gave up: it must have ended before it can begin again.
        await asyncio.wait([shared.task])
    if shared is None:
        shared = running[key] = _Shared(work, f"realise {key}")

        def forget(task: asyncio.Task[T]) -> None:
            del running[key]
            if not task.cancelled():
                task.exception()  # what nobody waits for any more isn't worth a warning

        shared.task.add_done_callback(forget)
    return await shared.wait(sink)


async def _in_thread(function: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
    """Run a function in a thread, to its end also when the caller is cancelled: what comes next relies on it."""
    running = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise
