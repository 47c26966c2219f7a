"""Which manifests nobody is writing, as it seems: half of one would have the other half deleted.

A file rests when it was changed last a while ago, or when the same stands in it for as long: some programs write a file anew all the time, or touch it,
and change nothing. One whose content changes without an end is told.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from nixlet import errors
from nixlet.node.manifests import directory

#: Seconds for which a file has to rest before it is applied, and after which it is told that it doesn't.
_REST, _PATIENCE = 2.0, 30.0

#: What there is to say of such a file.
RESTLESS = "it is written again and again, and applied as soon as what stands in it rests for a moment"

_log = logging.getLogger("nixlet.manifests")


class _Restless(NamedTuple):
    """A file that was changed a moment ago.

    Attributes:
        content: The sum of what stands in it; empty: it can't be read.
        since: The time (``time.monotonic``) since which that stands there.
        begun: The time since which that hasn't rested.
        is_late: That is long ago.
    """

    content: bytes
    since: float
    begun: float
    is_late: bool


class Resting:
    """Knows which files rest.

    Args:
        read: What stands in a file, by its name; it may raise NixletError.
    """

    def __init__(self, read: Callable[[str], bytes]) -> None:
        self._read = read
        #: What those files are that we wrote ourselves, which appear whole.
        self._written: dict[str, directory.State] = {}
        self._restless: dict[str, _Restless] = {}

    def wrote(self, name: str, state: directory.State) -> None:
        """Know what a file is that we wrote ourselves."""
        self._written[name] = state

    def content(self, name: str) -> bytes:
        """The sum (``sum_of``) of what rests in a file that was changed a moment ago; empty: it wasn't, or nothing is known of it."""
        return self._restless[name].content if name in self._restless else b""

    @property
    def late(self) -> list[str]:
        """The files that don't rest, for long."""
        return [name for name, each in self._restless.items() if each.is_late]

    async def look(self, changed: Mapping[str, directory.State]) -> list[str]:
        """Those that rest, of all files that are there and yet to be applied, with what they are."""
        found = [name for name, state in changed.items() if self._has_rested(name, state)]
        restless = [name for name in changed if name not in found]
        sums = await asyncio.to_thread(self._sums, restless)
        now, before = time.monotonic(), self._restless
        self._restless = {name: _still(before.get(name), sums[name], now) for name in restless}
        for name, each in self._restless.items():
            if each.content and now - each.since >= _REST:
                found.append(name)
            if each.is_late and not (name in before and before[name].is_late):
                _log.warning("the manifest %s is not applied: %s", name, RESTLESS)
        return found

    def _has_rested(self, name: str, state: directory.State) -> bool:
        # The time of its last change is none that others can set. One in the future says that the clock was changed.
        return self._written.get(name) == state or abs(time.time() - state.ctime_ns / 1e9) >= _REST

    def _sums(self, names: Collection[str]) -> dict[str, bytes]:
        found = {}
        for name in names:
            try:
                found[name] = sum_of(self._read(name))
            except errors.NixletError:
                # (which is told when it rests)
                found[name] = b""
        return found


def _still(before: _Restless | None, content: bytes, now: float) -> _Restless:
    """What there is to know of a file that still doesn't rest."""
    if before is None:
        return _Restless(content, now, now, is_late=False)
    since = before.since if before.content == content else now
    begun = now if content and now - since >= _REST else before.begun
    return _Restless(content, since, begun, is_late=now - begun >= _PATIENCE)


def sum_of(content: bytes) -> bytes:
    """What tells one content from another."""
    return hashlib.sha256(content).digest()
