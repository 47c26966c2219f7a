"""A request that somebody else may give up."""

import contextlib
import socket
import threading

from nixlet import errors


class Call:
    """A request that another thread may give up: its socket is shut, and whoever waits for it wakes up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._cancelled = False
        self._waited = 0.0

    @property
    def cancelled(self) -> bool:
        """Whether it was given up."""
        return self._cancelled

    def begin(self, waited: float) -> None:
        """Say that its turn has come, after so many seconds, which are of its first request's time.

        Raises:
            CallCancelledError: The request was given up before.
        """
        self.check()
        self._waited = waited

    def until(self, now: float, seconds: float) -> float:
        """By when a request has to be done that begins now and may take so long."""
        waited, self._waited = self._waited, 0.0
        return now + seconds - waited

    def use(self, sock: socket.socket) -> None:
        """Say which socket is waited for from now on.

        Raises:
            CallCancelledError: The request was given up before.
        """
        with self._lock:
            self._socket = sock
            self.check()

    def release(self) -> None:
        """Say that no socket is waited for any more: the next request's is not to be shut."""
        with self._lock:
            self._socket = None

    def check(self) -> None:
        """Check that it is still wanted.

        Raises:
            CallCancelledError: It isn't.
        """
        if self._cancelled:
            raise errors.CallCancelledError("the request was given up")

    def cancel(self) -> None:
        """Give it up. Never waits."""
        with self._lock:
            self._cancelled = True
            if self._socket is not None:
                # The socket's own method, also under TLS: that one's would take the ground from under the thread that reads.
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
