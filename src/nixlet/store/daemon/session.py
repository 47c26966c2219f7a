"""What nixlet asks of a Nix daemon, over one connection."""

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import BinaryIO

from nixlet import errors
from nixlet.store import interface, nar, paths
from nixlet.store.daemon import activity, connection, wire
from nixlet.telemetry import progress

# Operations of the worker protocol (Nix: enum WorkerProto::Op).
_ADD_TO_STORE = 7
_BUILD_PATHS = 9
_ADD_TEMP_ROOT = 11
_ADD_INDIRECT_ROOT = 12
_SET_OPTIONS = 19
_QUERY_PATH_INFO = 26
_QUERY_VALID_PATHS = 31
_QUERY_MISSING = 40
_BUILD_PATHS_WITH_RESULTS = 46

#: How many downloads a daemon before 2.16 runs side by side: it takes the number of build jobs for that.
_JOBS = 16

#: How many of the paths that can't be had a sentence names.
_NAMED = 3


class DaemonSession:
    """A connection to a Nix daemon; implements ``interface.StoreSession``.

    Args:
        conn: The connection, whose handshake is done.
        store_dir: The directory that the store's paths begin with.
        overrides: Settings of Nix for the connection.
    """

    def __init__(self, conn: connection.Connection, store_dir: str, overrides: Mapping[str, str]) -> None:
        self.connection = conn
        self._store_dir = store_dir
        self._overrides = overrides
        #: Whether somebody else used the connection before.
        self.reused = False

    @property
    def alive(self) -> bool:
        """Whether what it holds was held all the time."""
        return self.connection.alive

    @property
    def requests(self) -> int:
        """How many requests went over the wire."""
        return self.connection.requests

    async def set_options(self) -> None:
        """Set the connection's options: go on after a failure, fetch in parallel, and settings by name."""
        numbers = (
            0,  # keep failed builds
            1,  # keep going
            0,  # build where fetching fails
            3,  # verbosity: info
            _JOBS,
            0,  # no limit to silence
            1,  # (obsolete)
            0,  # builds are quiet: level error
            0,  # (obsolete)
            0,  # (obsolete)
            0,  # all cores
            1,  # fetch
        )
        body = b"".join(map(wire.integer, numbers)) + wire.integer(len(self._overrides))
        for name, value in self._overrides.items():
            body += wire.string(name) + wire.string(value)
        await self.connection.request(_SET_OPTIONS, body, lambda _: None)

    async def present(self, wanted: Collection[paths.StorePath]) -> set[paths.StorePath]:
        """Those that are valid, in one request."""
        body = wire.strings(wanted) + wire.integer(0)
        return self._paths(await self.connection.request(_QUERY_VALID_PATHS, body, wire.Reader.strings))

    async def hold(self, wanted: Collection[paths.StorePath]) -> None:
        """Register temporary roots, which last as long as the connection."""
        await self._add_roots(_ADD_TEMP_ROOT, wanted)

    async def add_indirect_roots(self, links: Iterable[str]) -> None:
        """Have the collector keep what symlinks lead to."""
        await self._add_roots(_ADD_INDIRECT_ROOT, links)

    async def _add_roots(self, operation: int, roots: Iterable[str]) -> None:
        bodies = [wire.string(each) for each in roots]
        for reply in await self.connection.requests_in_a_row(operation, bodies, wire.Reader.integer):
            if isinstance(reply, connection.DaemonError):
                raise reply

    async def plan(self, wanted: Collection[paths.StorePath], sink: connection.LogSink | None = None) -> interface.Plan:
        """What realising would take."""

        def parse(reader: wire.Reader) -> interface.Plan:
            sets = [frozenset(self._paths(reader.strings())) for _ in range(3)]
            return interface.Plan(sets[0], sets[1], sets[2], reader.integer(), reader.integer())

        return await self.connection.request(_QUERY_MISSING, wire.strings(wanted), parse, sink)

    async def realise(
        self, wanted: Collection[paths.StorePath], sink: progress.ProgressSink = progress.ignore
    ) -> interface.Realised:
        """Have paths in the store.

        The paths are held first, present or not: whatever the collector does meanwhile, it must not delete what was
        found present. Asking for the plan before the work lets old daemons fetch all the narinfos side by side.
        """
        await self.hold(wanted)
        missing = set(wanted) - await self.present(wanted)
        if not missing:
            return interface.Realised()
        planning = activity.Activities(progress.ignore, "")
        fetched, download_size = len(missing), 0
        # A cache that doesn't answer can make the plan fail, and realising still succeed with another one.
        with contextlib.suppress(connection.DaemonError):
            plan = await self.plan(missing, planning)
            fetched, download_size = max(fetched, len(plan.will_substitute)), plan.download_size
        sink(progress.Progress("realising", 0, fetched, "paths"))
        activities = activity.Activities(sink, "realising")
        reasons = await self._build(missing, activities)
        left = sorted(missing - await self.present(missing))
        if left:
            # What the log says (no trusted signature, no answer) tells more than that there is no substituter.
            said = (log.said_about(left[0].hash_part) for log in (activities, planning))
            caches = dict.fromkeys((*planning.caches, *activities.caches))
            raise _unobtainable(left, next(filter(None, said), reasons.get(left[0], "")), tuple(caches))
        sink(progress.Progress("realising", fetched, fetched, "paths"))
        fetched_bytes = activities.fetched_bytes or download_size or activities.copied_bytes
        return interface.Realised(fetched, fetched_bytes)

    async def _build(self, missing: Collection[paths.StorePath], log: connection.LogSink) -> dict[str, str]:
        """Have the daemon realise paths; its reasons for those where it failed."""
        body = wire.strings(sorted(missing)) + wire.integer(0)
        try:
            if self.connection.minor < 34:
                await self.connection.request(_BUILD_PATHS, body, wire.Reader.integer, log)
                return {}
            results = await self.connection.request(_BUILD_PATHS_WITH_RESULTS, body, wire.Reader.build_results, log)
        except connection.DaemonError as error:
            return dict.fromkeys(missing, error.message)
        return {result.path: connection.plain(result.error) for result in results if result.error}

    async def add_program(self, name: str, file: BinaryIO, size: int) -> paths.StorePath:
        """Add a package with one program, as ``nix-store --add`` does; it is held while the session is open.

        Args:
            name: The name of both.
            file: The program, open at its beginning; it is ``bin/NAME`` in the package.
            size: How large it is (bytes).

        Raises:
            DaemonError: The daemon refuses.
            FailedPreconditionError: The file can't be read, or changes meanwhile.
        """
        # As its archive's SHA-256 has it, without references, and not again where it is there.
        body = wire.string(name) + wire.string("fixed:r:sha256") + wire.strings(()) + wire.integer(0)

        def parse(reader: wire.Reader) -> str:
            path = reader.string()
            self._parse_info(reader)
            return path

        path = await self.connection.upload(_ADD_TO_STORE, body, nar.of_program(name, file, size), parse)
        return paths.parse(path, self._store_dir)

    async def path_infos(self, wanted: Iterable[paths.StorePath]) -> dict[paths.StorePath, interface.PathInfo]:
        """What is known of valid paths; all requests are under way at once."""
        asked = list(wanted)
        bodies = [wire.string(path) for path in asked]
        replies = await self.connection.requests_in_a_row(_QUERY_PATH_INFO, bodies, self._parse_known_info)
        infos = {}
        for path, reply in zip(asked, replies, strict=True):
            if isinstance(reply, connection.DaemonError):
                raise reply
            if reply is None:
                raise errors.NotFoundError(
                    f"the store path {path} is not in the Nix store",
                    hint=f"bring it there with: nix-store --realise {path}",
                )
            infos[path] = reply(path)
        return infos

    async def closure(self, wanted: Collection[paths.StorePath]) -> dict[paths.StorePath, interface.PathInfo]:
        """Paths and all that they refer to."""
        infos: dict[paths.StorePath, interface.PathInfo] = {}
        pending = set(wanted)
        while pending:
            found = await self.path_infos(sorted(pending))
            infos |= found
            pending = {reference for info in found.values() for reference in info.references} - infos.keys()
        return infos

    def _paths(self, texts: Iterable[str]) -> set[paths.StorePath]:
        return {paths.parse(text, self._store_dir) for text in texts}

    def _parse_known_info(self, reader: wire.Reader) -> Callable[[paths.StorePath], interface.PathInfo] | None:
        return self._parse_info(reader) if reader.integer() else None

    def _parse_info(self, reader: wire.Reader) -> Callable[[paths.StorePath], interface.PathInfo]:
        """What the protocol says of a path whose name the asker knows."""
        deriver, nar_hash = reader.string(), reader.string()
        references = frozenset(self._paths(reader.strings()))
        time, size, ultimate = reader.integer(), reader.integer(), bool(reader.integer())
        signatures, address = frozenset(reader.strings()), reader.string()
        return lambda path: interface.PathInfo(
            path, deriver, nar_hash, references, time, size, ultimate, signatures, address
        )


def _unobtainable(left: Sequence[paths.StorePath], reason: str, caches: Sequence[str]) -> errors.NotFoundError:
    more = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
    which = f"paths {', '.join(left[:_NAMED])}{more} are" if len(left) > 1 else f"path {left[0]} is"
    why = f": {reason}" if reason else ""
    named = ", ".join(caches[:_NAMED]) + (f" and {len(caches) - _NAMED} more" if len(caches) > _NAMED else "")
    where = f" from {named}" if caches else ""
    return errors.NotFoundError(
        f"the store {which} not in the Nix store and can't be fetched{where}{why}",
        hint=f"see what Nix says (nix-store --realise {left[0]}), copy it here (nix copy --from STORE {left[0]}),"
        " or add a cache that has it to nix.conf's substituters",
    )
