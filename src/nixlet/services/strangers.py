"""What those may do whom nobody knows yet: how often they guess, and how much they cause in the log."""

import collections
import ipaddress
import logging
import time
from collections.abc import Callable

from nixlet import errors

#: How often one address may show a wrong token in so many seconds, and how many addresses are remembered.
_GUESSES, _GUESSES_WITHIN, _MAX_GUESSERS = 10, 60.0, 1024

#: How many lines they cause in so many seconds, all of them together.
_LINES, _LINES_WITHIN = 20, 60.0

#: Addresses of IPv6 are given to one customer by networks of this prefix.
_PREFIX = 64


def network(address: str) -> str:
    """The network of a peer, as people have them."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if parsed.version == 6:
        return str(ipaddress.ip_network((parsed, _PREFIX), strict=False))
    return address


class Guesses:
    """Who has shown wrong tokens lately, by networks."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._made: collections.OrderedDict[str, collections.deque[float]] = collections.OrderedDict()

    def check(self, address: str) -> None:
        """Check that an address may try once more.

        Raises:
            PermissionDeniedError: It has tried too often.
        """
        made = self._made.get(network(address), ())
        if sum(self._clock() - each < _GUESSES_WITHIN for each in made) >= _GUESSES:
            raise errors.PermissionDeniedError(
                "too many wrong tokens came from this address", hint=f"wait for {_GUESSES_WITHIN:g} s"
            )

    def note(self, address: str) -> None:
        """Note that it has shown a wrong one."""
        theirs = network(address)
        self._made.setdefault(theirs, collections.deque(maxlen=_GUESSES)).append(self._clock())
        self._made.move_to_end(theirs)
        while len(self._made) > _MAX_GUESSERS:
            self._made.popitem(last=False)


class Lines:
    """The log, for what strangers cause: they don't fill it. How many lines were left out is told with the next one."""

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._begun = clock()
        self._written = self._left = 0

    def write(self, message: str, *given: object, trace: bool = False) -> None:
        """Write a line, perhaps; ``trace``: with the exception that is being handled."""
        now = self._clock()
        if now - self._begun >= _LINES_WITHIN:
            if self._left:
                self._log.warning("%d more lines about strangers were left out", self._left)
            self._begun, self._written, self._left = now, 0, 0
        if self._written >= _LINES:
            self._left += 1
            return
        self._written += 1
        self._log.warning(message, *given, exc_info=trace)
