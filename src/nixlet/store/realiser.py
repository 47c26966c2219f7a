"""Bringing closures into the store: one task for each wish, however many have it, and held while anyone uses it."""

import asyncio
import contextlib
import dataclasses
import functools
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from typing import NamedTuple, TypeVar

from nixlet import errors
from nixlet.store import closures, interface, paths, policy, sharing
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
        session: The connection that holds it until it is rooted.
    """

    members: tuple[paths.StorePath, ...]
    roots: tuple[paths.StorePath, ...]
    took: interface.Realised
    session: interface.StoreSession = dataclasses.field(repr=False, compare=False)

    def check_held(self) -> None:
        """Check that the collector was kept from it until now, as for what has just been rooted.

        Raises:
            UnavailableError: The store's daemon ended meanwhile, and what it held with it.
        """
        if not self.session.alive:
            raise errors.UnavailableError(
                "the Nix daemon ended before the closure's GC roots were made", hint="try again"
            )


@dataclasses.dataclass(frozen=True, slots=True)
class Held:
    """Paths that are in the store.

    Attributes:
        infos: What is known of them.
        took: What fetching took; nothing when all was there.
    """

    infos: Mapping[paths.StorePath, interface.PathInfo]
    took: interface.Realised


class _MissingFromDiskError(errors.FailedPreconditionError):
    """A path that Nix believes valid isn't there."""


#: What is said against a wish by what Nix tells of paths.
_REFUSALS = (
    errors.NotFoundError,
    errors.FailedPreconditionError,
    errors.InvalidArgumentError,
    errors.PermissionDeniedError,
)


class _OutdatedError(errors.FailedPreconditionError):
    """A refusal by what Nix may only remember: over one connection it doesn't look again at what it found, or told, before."""


class _Wanted(NamedTuple):
    """What somebody wants: closures, by their identities, and whether they may be fetched."""

    identities: frozenset[str]
    fetch: bool


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
        self._running: dict[_Wanted, sharing.Shared[Mapping[str, RealisedClosure]]] = {}

    @property
    def store_dir(self) -> str:
        """What its store's paths begin with."""
        return self._store.store_dir

    async def keep(self, links: Collection[str]) -> None:
        """Have the collector keep what symlinks lead to."""
        async with self._store.session() as session:
            await session.add_indirect_roots(links)

    async def on_disk(self, references: Collection[closures.ClosureReference]) -> frozenset[paths.StorePath] | None:
        """The members of closures that are on the disk; None where one isn't, or where a policy has to ask Nix first.

        For closures that are rooted: nothing is fetched, and Nix isn't asked.
        """
        if self._policy.restricts:
            return None

        def look() -> frozenset[paths.StorePath] | None:
            members: set[paths.StorePath] = set()
            try:
                for each in references:
                    info = each.closure_info
                    members.update(each.listed if info is None else self._read_store_paths(info))
                self._check_disk(members)
            except (_MissingFromDiskError, errors.InvalidArgumentError):
                return None
            return frozenset(members)

        return await asyncio.to_thread(look)

    @contextlib.asynccontextmanager
    async def realised(
        self,
        reference: closures.ClosureReference,
        sink: progress.ProgressSink = progress.ignore,
        *,
        fetch: bool = True,
    ) -> AsyncIterator[RealisedClosure]:
        """``all_realised`` for one closure."""
        async with self.all_realised([reference], sink, fetch=fetch) as closures_by_identity:
            yield closures_by_identity[reference.identity]

    @contextlib.asynccontextmanager
    async def all_realised(
        self,
        references: Collection[closures.ClosureReference],
        sink: progress.ProgressSink = progress.ignore,
        *,
        fetch: bool = True,
    ) -> AsyncIterator[Mapping[str, RealisedClosure]]:
        """Have closures in the store, and keep the collector from them for the time of the context; by their identities.

        What is to stay longer is rooted before the context ends. One connection holds them all. Callers who want the same
        closures share the work and the connection, as do those who want some of what is held already.

        Args:
            references: The closures, as images name them.
            sink: Gets the progress; callers who share the work all do.
            fetch: Whether what isn't in the store may be fetched or built. Where not, Nix has some seconds to answer.

        Raises:
            UnavailableError: Nix doesn't serve, or has not answered in time; the sentence says what it waits for.
            NotFoundError: A path can't be had.
            FailedPreconditionError: A path isn't there, and is not to be fetched; or it is valid, but not on the disk.
            InvalidArgumentError: A closureInfo does not list store paths, or lists strange ones.
            PermissionDeniedError: A policy refuses a path.
        """
        wanted = _Wanted(frozenset(reference.identity for reference in references), fetch)
        key = self._open_to(wanted)
        shared = self._running.get(key)
        if shared is None or shared.ended:
            work = functools.partial(self._realising, references, fetch)
            shared = self._running[key] = sharing.Shared(work, f"realise {', '.join(sorted(wanted.identities))}")
        try:
            async with contextlib.AsyncExitStack() as stack:
                async with self._answering(None if fetch else _ANSWER_TIMEOUT):
                    found = await stack.enter_async_context(shared.used(sink))
                yield found
        finally:
            if shared.ended and self._running.get(key) is shared:
                del self._running[key]

    def _open_to(self, wanted: "_Wanted") -> "_Wanted":
        """The work that somebody can share who wants some closures: what is held, or is being done for the same wish.

        Who wants no fetching doesn't wait for somebody else's either. Nor does who wants less than others are at: these may be
        cut off in the middle of what concerns them alone, and their connection with them.
        """
        for key, shared in self._running.items():
            if shared.ready and wanted.identities <= key.identities:
                return key
        return wanted

    @contextlib.asynccontextmanager
    async def _realising(
        self, references: Collection[closures.ClosureReference], fetch: bool, sink: progress.ProgressSink
    ) -> AsyncIterator[Mapping[str, RealisedClosure]]:
        """Realise closures, and hold them for the time of the context."""
        distinct = {reference.identity: reference for reference in references}

        async def bring_all(
            session: interface.StoreSession, hear: progress.ProgressSink
        ) -> Mapping[str, RealisedClosure]:
            bring = functools.partial(self._bring, session, hear) if fetch else functools.partial(self._expect, session)
            return {identity: await self._realise(session, each, bring) for identity, each in distinct.items()}

        async with self._held(bring_all, sink) as found:
            yield found

    @contextlib.asynccontextmanager
    async def _held(
        self,
        work: Callable[[interface.StoreSession, progress.ProgressSink], Awaitable[T]],
        sink: progress.ProgressSink,
    ) -> AsyncIterator[T]:
        """Do something on a connection, which then holds what it held for the time of the context."""
        async with contextlib.AsyncExitStack() as stack:
            async with self._patiently(sink) as hear:
                try:
                    done = await self._begun(stack, work, hear, anew=False)
                except _OutdatedError:
                    done = await self._begun(stack, work, hear, anew=True)
            yield done

    async def _begun(
        self,
        held: contextlib.AsyncExitStack,
        work: Callable[[interface.StoreSession, progress.ProgressSink], Awaitable[T]],
        sink: progress.ProgressSink,
        *,
        anew: bool,
    ) -> T:
        async with contextlib.AsyncExitStack() as stack:
            session = await stack.enter_async_context(self._store.session(anew=anew))
            try:
                done = await work(session, sink)
            except _REFUSALS as error:
                if session.reused:
                    raise _OutdatedError(error.message, hint=error.hint) from error
                raise
            held.push_async_exit(stack.pop_all())
            return done

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
    ) -> AsyncIterator[Held]:
        """Have paths in the store, and keep the collector from them for the time of the context.

        Raises:
            NotFoundError: A path can't be had.
            FailedPreconditionError: A path is valid, but not on the disk.
            PermissionDeniedError: A policy refuses a path.
        """

        async def hold(session: interface.StoreSession, hear: progress.ProgressSink) -> Held:
            took = await self._bring(session, hear, wanted)
            await asyncio.to_thread(self._check_disk, wanted)
            infos = await session.path_infos(wanted)
            if self._policy.restricts:
                self._policy.check(infos.values())
            return Held(infos, took)

        async with self._held(hold, sink) as held:
            yield held

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
        return RealisedClosure(tuple(sorted(members)), (*infos, *tops), took, session)

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
                raise _MissingFromDiskError(
                    f"the store path {path} is missing from the disk, though Nix believes it valid",
                    hint=f"bring it back with: nix-store --repair-path {path}",
                )

    def _read_store_paths(self, closure_info: paths.StorePath) -> tuple[paths.StorePath, ...]:
        """The list of a closureInfo, read without following links: the path's content is foreign."""
        self._check_disk([closure_info])
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
