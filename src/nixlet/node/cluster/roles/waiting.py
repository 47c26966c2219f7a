"""Waiting for a cluster that isn't up yet: nodes are started in any order, and a machine's end doesn't end the others'."""

import asyncio
import logging
from collections.abc import Callable

from nixlet import errors
from nixlet.kubeclient import failures

#: Seconds before the cluster is asked again, ever longer.
_PAUSE, _LONGEST_PAUSE = 1.0, 10.0

#: Seconds after which the same is said again.
_AGAIN = 300.0

_log = logging.getLogger("nixlet.cluster")


class Patience:
    """Who waits, says why, and asks again."""

    def __init__(self, what: str, tell: Callable[[str], None]) -> None:
        """Begin to wait.

        Args:
            what: Says so.
            tell: Learns it each time that the cluster didn't answer, in a line: what else is told meanwhile takes its place.
        """
        self._what, self._tell = what, tell
        self._pause = _PAUSE
        self._said, self._said_at = "", 0.0

    async def pause(self, error: errors.NixletError) -> None:
        """Wait until the cluster may be asked again, which didn't answer because of this."""
        now = asyncio.get_running_loop().time()
        if error.message != self._said or now - self._said_at >= _AGAIN:
            _log.warning("%s, which is asked again and again: %s", self._what, error, extra={"hint": error.hint})
            self._said, self._said_at = error.message, now
        self._tell(failures.words(f"{self._what}: {error}"))
        await asyncio.sleep(self._pause)
        self._pause = min(self._pause * 2, _LONGEST_PAUSE)
