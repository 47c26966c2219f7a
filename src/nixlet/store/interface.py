"""What nixlet asks of a Nix store, whoever keeps it."""

import contextlib
import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Protocol

from nixlet.store import paths
from nixlet.telemetry import progress


@dataclasses.dataclass(frozen=True, slots=True)
class PathInfo:
    """What a store knows of a valid path.

    Attributes:
        path: Which.
        deriver: The derivation that made it, or an empty string.
        nar_hash: sha256 of its archive, in hexadecimal.
        references: The store paths that its content names; may include itself.
        registration_time: Seconds since the epoch.
        nar_size: The size of its archive in bytes.
        ultimate: It was built here.
        signatures: Who vouches for it, "key:base64".
        content_address: How its content determines its name, or an empty string.
    """

    path: paths.StorePath
    deriver: str
    nar_hash: str
    references: frozenset[paths.StorePath]
    registration_time: int
    nar_size: int
    ultimate: bool = False
    signatures: frozenset[str] = frozenset()
    content_address: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What realising some paths would take.

    Attributes:
        will_build: Derivations to be built.
        will_substitute: Paths to be fetched, with all that they need.
        unknown: Paths that nobody has.
        download_size: Bytes to be fetched, compressed.
        nar_size: Bytes to be unpacked.
    """

    will_build: frozenset[paths.StorePath]
    will_substitute: frozenset[paths.StorePath]
    unknown: frozenset[paths.StorePath]
    download_size: int
    nar_size: int


@dataclasses.dataclass(frozen=True, slots=True)
class Realised:
    """What realising took: how many paths were fetched, and how many bytes (compressed, where the store knows them)."""

    fetched_paths: int = 0
    fetched_bytes: int = 0

    def __add__(self, other: "Realised") -> "Realised":
        return Realised(self.fetched_paths + other.fetched_paths, self.fetched_bytes + other.fetched_bytes)


class StoreSession(Protocol):
    """A connection to a store. Paths that it held or realised can't be collected while it is open."""

    @property
    def reused(self) -> bool:
        """Whether somebody else used the connection before: the store may remember what is no longer so."""
        ...

    @property
    def alive(self) -> bool:
        """Whether what it holds was held all the time, as far as is known."""
        ...

    async def present(self, wanted: Collection[paths.StorePath]) -> set[paths.StorePath]:
        """Those that are valid, in one request."""
        ...

    async def hold(self, wanted: Collection[paths.StorePath]) -> None:
        """Keep the garbage collector from paths, present or not, while the session is open."""
        ...

    async def add_indirect_roots(self, links: Iterable[str]) -> None:
        """Have the collector keep what symlinks lead to, as long as they do: absolute paths, as the store's keeper sees them."""
        ...

    async def realise(self, wanted: Collection[paths.StorePath], sink: progress.ProgressSink) -> Realised:
        """Have paths in the store, with all that they refer to.

        Raises:
            NotFoundError: Some can't be had; the sentence names up to three, and the store's reason.
        """
        ...

    async def path_infos(self, wanted: Iterable[paths.StorePath]) -> dict[paths.StorePath, PathInfo]:
        """What is known of valid paths.

        Raises:
            NotFoundError: One of them is not valid.
        """
        ...

    async def closure(self, wanted: Collection[paths.StorePath]) -> dict[paths.StorePath, PathInfo]:
        """Paths and all that they refer to, over any number of steps."""
        ...


class Store(Protocol):
    """A Nix store."""

    @property
    def store_dir(self) -> str:
        """The directory that its paths begin with."""
        ...

    @property
    def real_dir(self) -> str:
        """The directory on this host that holds its files."""
        ...

    def awaited(self) -> str:
        """Who keeps it from answering, in words, or an empty string; blocks."""
        ...

    def keeping(self) -> contextlib.AbstractAsyncContextManager[None]:
        """Keep connections for the next user, some seconds each, for the time of the context."""
        ...

    def session(self, *, anew: bool = False) -> contextlib.AbstractAsyncContextManager[StoreSession]:
        """A connection for one user; a new one, or one that was kept if that will do."""
        ...


def top_paths(infos: Mapping[paths.StorePath, PathInfo]) -> tuple[paths.StorePath, ...]:
    """The members of a set that keep all of it alive: rooting these is enough.

    Those that no other member refers to; where members refer to each other in a circle, one of the circle.
    """
    referred = {reference for path, info in infos.items() for reference in info.references if reference != path}
    tops = [path for path in sorted(infos) if path not in referred]
    reached: set[paths.StorePath] = set()
    _reach(tops, infos, reached)
    for path in sorted(infos.keys() - reached):
        if path not in reached:
            tops.append(path)
            _reach([path], infos, reached)
    return tuple(tops)


def _reach(
    start: Iterable[paths.StorePath], infos: Mapping[paths.StorePath, PathInfo], reached: set[paths.StorePath]
) -> None:
    pending = list(start)
    while pending:
        path = pending.pop()
        if path not in reached and path in infos:
            reached.add(path)
            pending.extend(infos[path].references)
