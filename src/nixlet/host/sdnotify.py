"""Telling systemd how we do (sd_notify(3)): one datagram to the socket that NOTIFY_SOCKET names."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Mapping


class Notifier:
    """Tells the service manager what it wants to know; silent where there is none."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Take the address from an environment; a leading "@" is an abstract socket's."""
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        # The manager wants to hear from its main process, not from whoever inherited the variables.
        for_us = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        watchdog = environment.get("WATCHDOG_USEC", "")
        #: Seconds after which the manager gives us up; 0: it doesn't watch.
        self.watchdog = int(watchdog) / 1e6 if for_us and watchdog.isdecimal() else 0.0

    def tell(self, state: str) -> None:
        """Send a state: "READY=1", "STOPPING=1", "WATCHDOG=1", "STATUS=…"."""
        if self._address:
            with (
                contextlib.suppress(OSError),
                socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
            ):
                sock.sendto(state.encode(), self._address)

    @contextlib.asynccontextmanager
    async def ready(self) -> AsyncIterator[None]:
        """Be ready for the time of the context, and alive: the event loop that turns sends the watchdog its signs."""
        self.tell("READY=1")
        beating = asyncio.create_task(self._beat(), name="watchdog") if self.watchdog else None
        try:
            yield
        finally:
            self.tell("STOPPING=1")
            if beating is not None:
                beating.cancel()

    async def _beat(self) -> None:
        while True:
            self.tell("WATCHDOG=1")
            # Half of the time that the manager allows, as its documentation advises.
            await asyncio.sleep(self.watchdog / 2)
