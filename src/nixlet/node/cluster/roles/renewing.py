"""Certificates of a node that runs for longer than they last.

Whoever has them reads them anew by itself: the API server and the kubelet (1.31 and later) what they show, a second or a minute after it was
written; etcd with each handshake; and all of client-go's, the kubelet, the proxy and the controllers among them, whom they are, within five minutes.
So nothing is started anew for it, and no pod notices.
"""

import asyncio
import datetime
import logging
from collections.abc import Awaitable, Callable

from nixlet import errors

#: Seconds after which it is looked again at the latest: clocks are set, machines sleep, and files are changed by others.
_LOOK = 600.0

#: Seconds before it is tried again, ever longer.
_PAUSE, _LONGEST_PAUSE = 60.0, 3600.0

_log = logging.getLogger("nixlet.cluster")


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


async def keep(
    due: Callable[[datetime.datetime], datetime.datetime | None],
    renew: Callable[[], Awaitable[object]],
    now: Callable[[], datetime.datetime] = _now,
) -> None:
    """Have certificates renewed when their time has come, until it is cancelled; what fails is told, and tried again.

    Args:
        due: When that is, as far as is known at a moment; None: never. It waits, for threads.
        renew: Renews them.
        now: The time.
    """
    pause, owed = _PAUSE, False
    while True:
        try:
            left = await _left(due, now)
            if left > 0 and not owed:
                pause = _PAUSE
                await asyncio.sleep(min(left, _LOOK))
                continue
            # Until all of it is done: what has failed may be behind the certificates, which by then are as they should be.
            owed = True
            await renew()
            owed = False
            if await _left(due, now) > 0:
                _log.info("certificates were renewed")
                continue
            _log.warning("certificates were renewed, and are no better; it is tried again in %g s", pause)
        except errors.NixletError as error:
            _log.warning(
                "certificates can't be renewed; it is tried again in %g s: %s", pause, error, extra={"hint": error.hint}
            )
        except Exception:  # noqa: BLE001 (it is told, and tried again)
            # In a year nobody would know that it had ended.
            _log.exception("certificates can't be renewed because of a mistake in nixlet; it is tried again")
        await asyncio.sleep(pause)
        pause = min(pause * 2, _LONGEST_PAUSE)


async def _left(
    due: Callable[[datetime.datetime], datetime.datetime | None], now: Callable[[], datetime.datetime]
) -> float:
    """Seconds until the next renewal, at most those until the next look."""
    moment = now()
    at = await asyncio.to_thread(due, moment)
    return _LOOK if at is None else (at - moment).total_seconds()
