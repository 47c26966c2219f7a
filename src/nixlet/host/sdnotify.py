"""Telling systemd how we do (sd_notify(3)): one datagram to the socket that NOTIFY_SOCKET names."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Mapping, MutableMapping

#: The first descriptor that a service manager hands over (SD_LISTEN_FDS_START).
_FIRST_FD = 3

#: What our socket is called in the manager's store.
_FD_NAME = "nixlet"

#: Seconds that a message may wait for room in the manager's queue.
_PATIENCE = 0.2


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
                # A manager that doesn't listen must not hold us up.
                sock.settimeout(_PATIENCE)
                sock.sendto(state.encode(), self._address)

    def keep(self, sock: socket.socket, *, anew: bool) -> bool:
        """Give a listening socket to the manager, which hands it to our next start; whether there is one to take it.

        It needs ``FileDescriptorStoreMax=`` in the unit, else the manager closes it again without a word.

        Args:
            sock: The socket.
            anew: Whether it is another one than the manager has, which then must go to make room.
        """
        if not self._address:
            return False
        if anew:
            self.tell(f"FDSTOREREMOVE=1\nFDNAME={_FD_NAME}")
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager,
        ):
            manager.settimeout(_PATIENCE)
            manager.connect(self._address)
            socket.send_fds(manager, [f"FDSTORE=1\nFDNAME={_FD_NAME}".encode()], [sock.fileno()])
            return True
        return False

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


def inherited_sockets(environment: MutableMapping[str, str]) -> list[socket.socket]:
    """The sockets that a service manager hands to this process (sd_listen_fds(3)); children don't hear of them any more."""
    count, owner = environment.pop("LISTEN_FDS", ""), environment.pop("LISTEN_PID", "")
    environment.pop("LISTEN_FDNAMES", None)
    if owner != str(os.getpid()) or not count.isdecimal():
        return []
    sockets = [socket.socket(fileno=fd) for fd in range(_FIRST_FD, _FIRST_FD + int(count))]
    for sock in sockets:
        sock.set_inheritable(False)
        sock.setblocking(False)
    return sockets
