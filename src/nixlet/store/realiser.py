"""Bringing closures into the store: one task for each closure, however many ask for it, and held while anyone uses it."""

import asyncio
import contextlib
import dataclasses
import functools
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from typing import Generic, TypeVar

from nixlet import errors
from nixlet.store import closures, interface, paths, policy
from nixlet.telemetry import progress

T = TypeVar("T")

#: Seconds for Nix to say what is there, where nothing is to be fetched: who asks for that has others waiting.
_ANSWER_TIMEOUT = 5.0

#: Seconds without a word from the store after which somebody who waits is told why.
_PATIENCE = 2.0


@dataclasses.dataclass(frozen=True, slots=True)
class RealisedClosure:
    """A closure that is in the store.

    Attributes:
        members: Its store paths, sorted.
        roots: Those whose GC roots keep all of it.
        took: What fetching took; nothing when all was there.
    """

    members: tuple[paths.StorePath, ...]
    roots: tuple[paths.StorePath, ...]
    took: interface.Realised


class _Shared(Generic[T]):
    """One piece of work with several users: it goes on while anyone waits for it, and stays open while anyone uses it."""

    def __init__(
        self, work: Callable[[progress.ProgressSink], contextlib.AbstractAsyncContextManager[T]], name: str
    ) -> None:
        self._sinks: list[progress.ProgressSink] = []
        self._left = asyncio.Event()
        self._result: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run(work), name=name)

    @property
    def ended(self) -> bool:
        """Whether it failed, or all who used it have left: who comes now is too late."""
        return self._left.is_set()

    @property
    def ready(self) -> bool:
        """Whether it succeeded and is still open."""
        return self._result.done() and not self.ended

    async def _run(self, work: Callable[[progress.ProgressSink], contextlib.AbstractAsyncContextManager[T]]) -> None:
        try:
            async with work(self._tell) as result:
                self._result.set_result(result)
                await self._left.wait()
        except BaseException as error:
            self._left.set()
            if isinstance(error, asyncio.CancelledError):
                self._result.cancel()
                raise
            if not self._result.done():
                self._result.set_exception(error)
                self._result.exception()  # what nobody waits for any more isn't worth a warning

    def _tell(self, step: progress.Progress) -> None:
        for sink in self._sinks:
            sink(step)

    @contextlib.asynccontextmanager
    async def used(self, sink: progress.ProgressSink) -> AsyncIterator[T]:
        """Wait for the result, and keep it for the time of the context."""
        self._sinks.append(sink)
        try:
            yield await asyncio.shield(self._result)
        finally:
            self._sinks.remove(sink)
            if not self._sinks:
                self._left.set()
                if not self._result.done():
                    self._task.cancel()
                await asyncio.wait([self._task])


class Realiser:
    """Realises closures in one store."""

    def __init__(
        self,
        store: interface.Store,
        rules: policy.Policy,
        *,
        observe: Callable[[interface.Realised], None] = lambda _: None,
    ) -> None:
        """Realise in ``store``, as ``rules`` allow; ``observe`` learns of all that was fetched."""
        self._observe = observe
        self._store = store
        self._policy = rules
        self._running: dict[tuple[str, bool], _Shared[RealisedClosure]] = {}

    @property
    def store_dir(self) -> str:
        """What its store's paths begin with."""
        return self._store.store_dir

    @contextlib.asynccontextmanager
    async def realised(
        self,
        reference: closures.ClosureReference,
        sink: progress.ProgressSink = progress.ignore,
        *,
        fetch: bool = True,
    ) -> AsyncIterator[RealisedClosure]:
        """Have a closure in the store, and keep the collector from it for the time of the context.

        What is to stay longer is rooted before the context ends. Callers who want the same closure share the work and
        the connection.

        Args:
            reference: The closure, as an image names it.
            sink: Gets the progress; callers who share the work all do.
            fetch: Whether what isn't in the store may be fetched or built. Where not, Nix has some seconds to answer.

        Raises:
            UnavailableError: Nix doesn't serve, or has not answered in time; the sentence says what it waits for.
            NotFoundError: A path can't be had.
            FailedPreconditionError: A path isn't there, and is not to be fetched; or it is valid, but not on the disk.
            InvalidArgumentError: The closureInfo does not list store paths, or lists strange ones.
            PermissionDeniedError: A policy refuses a path.
        """
        # Who wants no fetching doesn't wait for somebody else's either.
        key = (reference.identity, fetch)
        if not fetch and (fetched := self._running.get((reference.identity, True))) is not None and fetched.ready:
            key = (reference.identity, True)
        shared = self._running.get(key)
        if shared is None or shared.ended:

            @contextlib.asynccontextmanager
            async def work(tell: progress.ProgressSink) -> AsyncIterator[RealisedClosure]:
                async with contextlib.AsyncExitStack() as stack:
                    async with self._patiently(tell) as hear:
                        session = await stack.enter_async_context(self._store.session())
                        bring = (
                            functools.partial(self._bring, session, hear)
                            if fetch
                            else functools.partial(self._expect, session)
                        )
                        realised = await self._realise(session, reference, bring)
                    yield realised

            shared = self._running[key] = _Shared(work, f"realise {reference.identity}")
        try:
            async with contextlib.AsyncExitStack() as stack:
                async with self._answering(None if fetch else _ANSWER_TIMEOUT):
                    closure = await stack.enter_async_context(shared.used(sink))
                yield closure
        finally:
            if shared.ended and self._running.get(key) is shared:
                del self._running[key]

    @contextlib.asynccontextmanager
    async def _answering(self, seconds: float | None) -> AsyncIterator[None]:
        """Have the context end within some seconds, or with an error that says what Nix waits for."""
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError as error:
            who = await asyncio.to_thread(self._store.awaited)
            raise errors.UnavailableError(
                f"Nix does not answer{f': {who}' if who else ''}", hint="try again when it does: nix-store --version"
            ) from error

    @contextlib.asynccontextmanager
    async def holding(
        self, wanted: Collection[paths.StorePath], sink: progress.ProgressSink = progress.ignore
    ) -> AsyncIterator[interface.Realised]:
        """Have paths in the store, and keep the collector from them for the time of the context.

        Raises:
            NotFoundError: A path can't be had.
            FailedPreconditionError: A path is valid, but not on the disk.
            PermissionDeniedError: A policy refuses a path.
        """
        async with contextlib.AsyncExitStack() as stack:
            async with self._patiently(sink) as hear:
                session = await stack.enter_async_context(self._store.session())
                took = await self._bring(session, hear, wanted)
                await asyncio.to_thread(self._check_disk, wanted)
                if self._policy.restricts:
                    self._policy.check((await session.path_infos(wanted)).values())
            yield took

    @contextlib.asynccontextmanager
    async def _patiently(self, sink: progress.ProgressSink) -> AsyncIterator[progress.ProgressSink]:
        """Tell a sink when nothing is heard of the store for a while: it may be waiting for a garbage collection."""
        heard = asyncio.Event()

        def hear(step: progress.Progress) -> None:
            heard.set()
            sink(step)

        async def wait() -> None:
            while True:
                heard.clear()
                try:
                    async with asyncio.timeout(_PATIENCE):
                        await heard.wait()
                except TimeoutError:
                    if who := await asyncio.to_thread(self._store.awaited):
                        sink(progress.Progress("waiting for Nix", 0, 0, "", who))

        waiting = asyncio.create_task(wait(), name="waiting for the store")
        try:
            yield hear
        finally:
            waiting.cancel()
            await asyncio.wait([waiting])

    async def _bring(
        self, session: interface.StoreSession, sink: progress.ProgressSink, wanted: Collection[paths.StorePath]
    ) -> interface.Realised:
        took = await session.realise(wanted, sink)
        self._observe(took)
        return took

    @staticmethod
    async def _expect(session: interface.StoreSession, wanted: Collection[paths.StorePath]) -> interface.Realised:
        """Hold paths that are there already."""
        await session.hold(wanted)
        missing = sorted(set(wanted) - await session.present(wanted))
        if missing:
            raise errors.FailedPreconditionError(
                f"the store path {missing[0]} is not in the Nix store, and nothing is fetched here",
                hint=f"bring it here first: nix-store --realise {missing[0]}",
            )
        return interface.Realised()

    async def _realise(
        self,
        session: interface.StoreSession,
        reference: closures.ClosureReference,
        bring: Callable[[Collection[paths.StorePath]], Awaitable[interface.Realised]],
    ) -> RealisedClosure:
        named = (reference.closure_info,) if reference.closure_info is not None else reference.listed
        took = await bring(named)
        members, loose = named, set(named)
        if reference.closure_info is not None:
            await asyncio.to_thread(self._check_disk, named)
            members = await asyncio.to_thread(self._read_store_paths, reference.closure_info)
            loose = await self._loose(session, reference.closure_info, members)
            # What a valid path refers to is valid: only what it doesn't refer to has to be brought.
            if loose:
                took += await bring(sorted(loose))
        await asyncio.to_thread(self._check_disk, members)
        if self._policy.restricts:
            self._policy.check((await session.path_infos(members)).values())
        # A closureInfo keeps what it refers to; the older form is kept by those that nothing else refers to.
        infos = (reference.closure_info,) if reference.closure_info is not None else ()
        tops = interface.top_paths(await session.path_infos(sorted(loose)))
        return RealisedClosure(tuple(sorted(members)), (*infos, *tops), took)

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

    def _check_disk(self, members: Collection[paths.StorePath]) -> None:
        """Look whether paths that are valid are there: Nix asks its database, and never the disk."""
        for path in members:
            if not os.path.lexists(os.path.join(self._store.real_dir, path.name)):
                raise errors.FailedPreconditionError(
                    f"the store path {path} is missing from the disk, though Nix believes it valid",
                    hint=f"bring it back with: nix-store --repair-path {path}",
                )

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
