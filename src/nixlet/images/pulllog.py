"""Pulls in the node's log: CRI has no channel for what a pull is doing, and tells clients of its end alone."""

import asyncio
import logging
import time

from nixlet import errors
from nixlet.images import pulls
from nixlet.store import paths
from nixlet.telemetry import progress

#: Seconds between two lines on one pull: most are over before the first.
_INTERVAL = 10.0

_log = logging.getLogger("nixlet.pulls")


class PullLog:
    """Writes what pulls do, and how they end.

    Args:
        interval: Seconds between two lines on one pull.
    """

    def __init__(self, interval: float = _INTERVAL) -> None:
        self._interval = interval
        #: When a pull was told of last, or begun, by its reference.
        self._told: dict[str, float] = {}

    def take(self, event: pulls.Event) -> None:
        """Hear of a pull; for ``pulls.Exchange.subscribed``."""
        # Whoever may create a pod writes it.
        reference = event.reference if event.reference.isprintable() else paths.shown(event.reference)
        if event.step is not None:
            self._step(reference, event.step)
            return
        self._told.pop(reference, None)
        if event.pulled is not None:
            self._end(reference, event.pulled)
        elif isinstance(event.error, errors.NixletError):
            _log.warning("%s can't be pulled: %s", reference, event.error, extra={"hint": event.error.hint})
        elif isinstance(event.error, asyncio.CancelledError):
            _log.info("the pull of %s was given up by its client", reference)

    def _step(self, reference: str, step: progress.Progress) -> None:
        now = time.monotonic()
        if now - self._told.setdefault(reference, now) < self._interval:
            return
        self._told[reference] = now
        of = f" of {step.total}" if step.total else ""
        amount = f" {step.done}{of} {step.unit}" if step.unit else ""
        _log.info("pulling %s: %s%s%s", reference, step.stage, amount, f" ({step.detail})" if step.detail else "")

    @staticmethod
    def _end(reference: str, pulled: pulls.Pulled) -> None:
        _log.info(
            "pulled %s in %d ms: %d store paths, %d of them fetched (%d bytes)",
            *(
                reference,
                pulled.duration_ms,
                pulled.closure_paths,
                pulled.took.fetched_paths,
                pulled.took.fetched_bytes,
            ),
        )
