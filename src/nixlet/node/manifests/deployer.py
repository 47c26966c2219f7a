"""Keeps a cluster as the manifests in a directory say: applied at start and when they change, told and tried again where they can't be.

The directory is looked at every few seconds, as the node's images are: manifests may be links into a Nix store, which come to lead
elsewhere without a write to anything that inotify would watch, and lie on file systems that it says nothing of. A look costs a stat
for each file.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from typing import NamedTuple

from nixlet import errors
from nixlet.host import files
from nixlet.node.manifests import applying, directory, kubectl, objects, resting
from nixlet.node.settings import trusted

#: Seconds between looks.
_INTERVAL = 2.0

#: Seconds until what failed is tried again: at first, and at most; each time it takes twice as long.
_FIRST_PAUSE, _LAST_PAUSE = 1.0, 60.0

#: A larger file is none that a person means (bytes); the largest sets of definitions have a few MiB.
_MAX_BYTES = 32 << 20

#: What is wrong with the whole, and not with one manifest.
_ALL = ""

#: Makes a manifest's text; it may raise NixletError, and is asked again then.
Maker = Callable[[], Awaitable[str]]

#: How manifests begin that we write, by which we know them again.
HEADER = "# Made by nixlet at each start, and changes are lost: a file of the same name with .skip behind it has this one left alone.\n"

_log = logging.getLogger("nixlet.manifests")


class _Failure:
    """What couldn't be done: why in words, and for how many seconds it isn't tried again."""

    def __init__(self, problem: str, before: "_Failure | None") -> None:
        self.problem = problem
        self.pause: float = _FIRST_PAUSE if before is None else min(2 * before.pause, _LAST_PAUSE)
        self._due = time.monotonic() + self.pause

    @property
    def is_due(self) -> bool:
        """Whether it is time for another try."""
        return time.monotonic() >= self._due


class _Named(NamedTuple):
    """What a manifest names, what the file was then, and the sum of what stood in it."""

    state: directory.State
    objects: frozenset[objects.Object]
    content: bytes


class _Waiting(NamedTuple):
    """A manifest that was applied, and what it no longer names is still there; what the file was then."""

    state: directory.State
    applied: applying.Applied


class Deployer:
    """Applies a directory's manifests.

    Args:
        path: The directory.
        through: kubectl for the cluster.
        disabled: What is disabled, as ``directory`` has it: what these manifests made is deleted. Ours are removed from the
            directory as well; those of others stay there, since nobody has a copy of them for sure.
        packaged: Manifests that the node brings, by their names, and who makes each; they are written to the directory once.
    """

    def __init__(
        self,
        path: str,
        through: kubectl.Kubectl,
        *,
        disabled: Collection[str] = (),
        packaged: Mapping[str, Maker] | None = None,
    ) -> None:
        self._path = path
        self._kubectl = through
        self._disabled = frozenset(disabled)
        self._packaged = packaged or {}
        #: Those of them that are yet to be written, or to be removed.
        self._unwritten = set(self._packaged)
        #: What was applied, and what the file was then.
        self._applied: dict[str, directory.State] = {}
        self._resting = resting.Resting(lambda name: self._content(name)[0])
        #: What manifests name that are there, as they were read last.
        self._named: dict[str, _Named] = {}
        #: Those of which the rest is to be deleted, once it is known what all others name.
        self._waiting: dict[str, _Waiting] = {}
        self._failures: dict[str, _Failure] = {}
        #: Manifests that are disabled, and whose objects are yet to be deleted; None: nobody has asked the cluster yet.
        self._withdrawing: set[str] | None = None if self._disabled else set()

    @property
    def problems(self) -> dict[str, str]:
        """Why the cluster isn't as the directory says, by the manifests' names; an empty name is for all of them."""
        failed = {name: failure.problem for name, failure in self._failures.items()}
        return dict(sorted({**dict.fromkeys(self._resting.late, resting.RESTLESS), **failed}.items()))

    @property
    def applied(self) -> tuple[str, ...]:
        """The manifests that were applied as they are now."""
        return tuple(sorted(self._applied))

    def remark(self) -> str:
        """The same on one line; empty where all is as it should be."""
        return "; ".join(f"{name}: {problem}" if name else problem for name, problem in self.problems.items())

    async def bring(self) -> None:
        """Make the directory, and write the manifests that the node brings, each as soon as it can be made.

        Those of an earlier start hold until then.
        """
        # People put files there, also where the node brings none.
        try:
            files.make_directory(self._path, mode=0o700)
        except errors.NixletError as error:
            self._failed(_ALL, error)
        while self._unwritten:
            for name in sorted(filter(self._is_due, self._unwritten)):
                await self._write_packaged(name)
            await asyncio.sleep(_INTERVAL)

    async def watch(self) -> None:
        """Apply what is there and what changes, for ever."""
        while True:
            if self._is_due(_ALL):
                await self.look()
            await asyncio.sleep(_INTERVAL)

    async def look(self) -> None:
        """Do now what is due; what can't be done is told."""
        try:
            await self._do()
        except Exception as error:  # noqa: BLE001 (it is logged, and the next look may go well)
            self._failed(_ALL, error)

    async def _do(self) -> None:
        """Do what is due.

        Raises:
            OSError: The directory can't be looked at.
            NixletError: The API server doesn't answer.
        """
        with files.refusing(f"the directory {self._path} can't be looked at"):
            found = await asyncio.to_thread(directory.scan, self._path, self._disabled)
        # What a file made that is gone stays, by k3s's rule.
        for known_of in (self._applied, self._named, self._waiting):
            for gone in known_of.keys() - found.wanted.keys():
                known_of.pop(gone)
        for gone in self._failures.keys() - found.wanted.keys() - {_ALL, *self._unwritten, *(self._withdrawing or ())}:
            del self._failures[gone]
        done = {**{name: waiting.state for name, waiting in self._waiting.items()}, **self._applied}
        changed = {name: state for name, state in found.wanted.items() if done.get(name) != state}
        ripe = {
            name: changed[name] for name in await self._resting.look(changed) if not self._is_applied(name, changed)
        }
        due = {name: ripe[name] for name in filter(self._is_due, ripe.keys() - self._unwritten)}
        if due or self._withdrawing is None or any(map(self._is_due, self._withdrawing)):
            known = await self._kubectl.records()
            await self._withdraw(known)
            await self._apply(due, known)
        await self._prune(found.wanted, due)
        self._failures.pop(_ALL, None)

    async def _withdraw(self, known: Mapping[str, objects.Record]) -> None:
        """Delete what disabled manifests made."""
        if self._withdrawing is None:
            self._withdrawing = {name for name in known if directory.is_disabled(name, self._disabled)}
        for name in sorted(filter(self._is_due, self._withdrawing)):
            try:
                if name in known:
                    await applying.withdraw(self._kubectl, known[name])
            except errors.UnavailableError:
                raise
            except Exception as error:  # noqa: BLE001 (as above)
                self._failed(name, error)
            else:
                self._withdrawing.remove(name)
                self._failures.pop(name, None)
                _log.info("%s is disabled: what it made is deleted", name)

    async def _apply(self, due: Mapping[str, directory.State], known: Mapping[str, objects.Record]) -> None:
        """Apply manifests; what they no longer name stays for now."""
        for name, state in sorted(due.items()):
            self._applied.pop(name, None)
            self._waiting.pop(name, None)
            try:
                content = await asyncio.to_thread(self._read, name, state)
                if content is not None:
                    written = await self._kubectl.read(content, name, directory.label(name))
                    named = frozenset(each.which for each in written)
                    self._named[name] = _Named(state, named, resting.sum_of(content))
                    applied = await applying.apply(self._kubectl, name, written, known.get(name))
                    self._waiting[name] = _Waiting(state, applied)
            except errors.UnavailableError:
                raise
            except Exception as error:  # noqa: BLE001 (as above)
                self._failed(name, error)

    async def _prune(self, wanted: Mapping[str, directory.State], fresh: Collection[str]) -> None:
        """Delete what manifests no longer name. What another one may name, now or when it can be read, isn't deleted.

        Args:
            wanted: The manifests that are there.
            fresh: Those that were applied just now.
        """
        unread = [
            name
            for name, state in sorted(wanted.items())
            if name not in self._unwritten and (name not in self._named or self._named[name].state != state)
        ]
        for name, (state, applied) in sorted(self._waiting.items()):
            if unread and applied.leaves_something:
                if name in fresh:
                    _log.info("what %s no longer names stays until %s can be read", name, ", ".join(unread[:3]))
                continue
            others = (named.objects for other, named in self._named.items() if other != name)
            elsewhere = objects.Named(itertools.chain.from_iterable(others))
            del self._waiting[name]
            try:
                await applying.prune(self._kubectl, applied, elsewhere)
            except errors.UnavailableError:
                raise
            except Exception as error:  # noqa: BLE001 (as above)
                self._failed(name, error)
            else:
                self._applied[name] = state
                self._failures.pop(name, None)
                _log.info("applied %s", name, extra={"objects": len(applied.living)})

    def _is_due(self, name: str) -> bool:
        failure = self._failures.get(name)
        return failure is None or failure.is_due

    def _is_applied(self, name: str, changed: Mapping[str, directory.State]) -> bool:
        """Whether a file was only touched since it was applied; then it is known by what it is now."""
        named, state = self._named.get(name), changed[name]
        if named is None or self._resting.content(name) != named.content:
            return False
        if not (name in self._applied or name in self._waiting):
            return False
        self._named[name] = named._replace(state=state)
        if name in self._applied:
            self._applied[name] = state
        if name in self._waiting:
            self._waiting[name] = self._waiting[name]._replace(state=state)
        return True

    def _read(self, name: str, state: directory.State) -> bytes | None:
        """What stands in a manifest; None where it is changing just now.

        Raises:
            NixletError: It can't be read, or somebody else could write it.
        """
        content, now = self._content(name)
        if now != state and resting.sum_of(content) != self._resting.content(name):
            return None
        if not content.strip():
            # Somebody who means that nothing is to be there says so; an empty file is most often one that couldn't be written.
            raise errors.InvalidArgumentError(
                f"the manifest {os.path.join(self._path, name)} is empty: what it made before stays",
                hint=f"have it deleted with --disable {os.path.splitext(os.path.basename(name))[0]}",
            )
        return content

    def _content(self, name: str) -> tuple[bytes, directory.State]:
        """What stands in a manifest, and what the file is.

        Raises:
            NixletError: It can't be read, or somebody else could write it.
        """
        path = os.path.join(self._path, name)
        with trusted.opened(path, "the manifest") as file:
            content, state = file.read(_MAX_BYTES + 1), directory.state_of(os.fstat(file.fileno()))
        if len(content) > _MAX_BYTES:
            raise errors.InvalidArgumentError(f"the manifest {path} is larger than {_MAX_BYTES >> 20} MiB")
        return content, state

    def _failed(self, name: str, error: Exception) -> None:
        """Tell why something can't be done, once, and try it again later."""
        known = isinstance(error, (errors.NixletError, OSError))
        problem = str(error) if known else f"a mistake of nixlet's: {type(error).__name__}"
        before = self._failures.get(name)
        self._failures[name] = _Failure(problem, before)
        if before is None or before.problem != problem:
            what = f"the manifest {name} is not applied" if name else f"the manifests in {self._path} are not applied"
            hint = error.hint if isinstance(error, errors.NixletError) else ""
            _log.error("%s: %s", what, problem, extra={"hint": hint}, exc_info=None if known else error)

    async def _write_packaged(self, name: str) -> None:
        """Have a manifest that the node brings in the directory, or not if it is disabled; one that is skipped is left as it is."""
        path = os.path.join(self._path, name)
        try:
            if directory.is_disabled(name, self._disabled):
                if is_ours(path):
                    os.unlink(path)
            elif not os.path.lexists(f"{path}.skip"):
                text = HEADER + await self._packaged[name]()
                self._resting.wrote(name, await asyncio.to_thread(_write, path, text))
        except Exception as error:  # noqa: BLE001 (as above)
            self._failed(name, error)
        else:
            self._unwritten.remove(name)
            self._failures.pop(name, None)


def _write(path: str, text: str) -> directory.State:
    files.make_directory(os.path.dirname(path), mode=0o700)
    files.write_atomically(path, text, mode=0o600)
    return directory.state_of(os.stat(path))


def is_ours(path: str) -> bool:
    """Whether a manifest is one that a node wrote."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.readline() == HEADER
    except OSError:
        return False


@contextlib.asynccontextmanager
async def deploying(deployer: Deployer) -> AsyncIterator[None]:
    """Keep a cluster as a directory's manifests say, for the time of the context."""
    tasks = [asyncio.create_task(each, name="manifests") for each in (deployer.bring(), deployer.watch())]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
