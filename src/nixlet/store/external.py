"""A store whose missing paths another program brings: nix-snapshotter's ``external_builder``."""

import contextlib
import os
import tempfile
from collections.abc import AsyncIterator, Collection, Iterable

from nixlet import errors
from nixlet.host import process
from nixlet.store import interface, paths
from nixlet.telemetry import progress


class ExternalBuilderStore:
    """A store that asks a program for what is missing: ``PROGRAM OUT_LINK STORE_PATH``, once for each path.

    The program makes the path valid and leaves a link to it at OUT_LINK, which is only needed until the path is rooted.
    """

    def __init__(self, store: interface.Store, program: str) -> None:
        self._store = store
        self._program = program

    @property
    def store_dir(self) -> str:
        """The directory that its paths begin with."""
        return self._store.store_dir

    @property
    def real_dir(self) -> str:
        """The directory on this host that holds its files."""
        return self._store.real_dir

    def awaited(self) -> str:
        """Who keeps it from answering, in words, or an empty string; blocks."""
        return self._store.awaited()

    def keeping(self) -> contextlib.AbstractAsyncContextManager[None]:
        """Keep connections for the next user, some seconds each, for the time of the context."""
        return self._store.keeping()

    @contextlib.asynccontextmanager
    async def session(self, *, anew: bool = False) -> AsyncIterator["_Session"]:
        """A connection for one user; a new one, or one that was kept if that will do."""
        async with self._store.session(anew=anew) as session:
            yield _Session(session, self._program)


class _Session:
    def __init__(self, session: interface.StoreSession, program: str) -> None:
        self._session = session
        self._program = program

    @property
    def reused(self) -> bool:
        return self._session.reused

    @property
    def alive(self) -> bool:
        return self._session.alive

    async def realise(
        self, wanted: Collection[paths.StorePath], sink: progress.ProgressSink = progress.ignore
    ) -> interface.Realised:
        await self._session.hold(wanted)
        missing = sorted(set(wanted) - await self._session.present(wanted))
        with tempfile.TemporaryDirectory(prefix="nixlet-") as directory:
            for number, path in enumerate(missing):
                sink(progress.Progress("realising", number, len(missing), "paths", path.name))
                link = os.path.join(directory, path.name)
                (await process.run([self._program, link, path])).check()
            left = set(missing) - await self._session.present(missing)
        if left:
            raise errors.NotFoundError(
                f"{self._program} did not bring the store path {min(left)}, though it ended well"
            )
        return interface.Realised(len(missing), 0)

    async def present(self, wanted: Collection[paths.StorePath]) -> set[paths.StorePath]:
        return await self._session.present(wanted)

    async def hold(self, wanted: Collection[paths.StorePath]) -> None:
        await self._session.hold(wanted)

    async def add_indirect_roots(self, links: Iterable[str]) -> None:
        await self._session.add_indirect_roots(links)

    async def path_infos(self, wanted: Iterable[paths.StorePath]) -> dict[paths.StorePath, interface.PathInfo]:
        return await self._session.path_infos(wanted)

    async def closure(self, wanted: Collection[paths.StorePath]) -> dict[paths.StorePath, interface.PathInfo]:
        return await self._session.closure(wanted)
