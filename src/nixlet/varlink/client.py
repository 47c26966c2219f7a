"""A blocking Varlink client, as a command line needs it: one call at a time, replies as they come, descriptors handed over.

It imports nothing that takes time: no event loop, no parser of types, not even Python's own halves of modules whose other half is in
C. Replies are the JSON values that came; their parser is read while the service is at work.
"""

import os
import sys

from nixlet import errors
from nixlet.varlink import wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator, Mapping, Sequence
    from types import TracebackType
    from typing import Any, Self
else:
    # What socket is made of; the rest of that takes as long as all of ours.
    import _socket as socket

_CHUNK = 1 << 16

#: Bytes of a descriptor beside a message: an int of C (unix(7), SCM_RIGHTS).
_DESCRIPTOR = 4
_RIGHTS = socket.CMSG_SPACE(wire.MAX_DESCRIPTORS * _DESCRIPTOR)

Reply = dict[str, "Any"]


class Connection:
    """A connection to a service; a context manager. After an error in the middle of a call it is of no use any more."""

    def __init__(self, path: str, *, peer: str) -> None:
        """Connect.

        Args:
            path: The service's socket.
            peer: What the service is called in errors.

        Raises:
            UnavailableError: Nobody serves there.
            PermissionDeniedError: It isn't for us.
        """
        self.peer = peer
        self._splitter = wire.Splitter()
        self._replies: list[bytes] = []
        self._descriptors: list[int] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.connect(path)
        except PermissionError as error:
            self._socket.close()
            raise errors.PermissionDeniedError(
                f"{peer} is for its own user only", hint="run this as the user that the node runs as"
            ) from error
        except OSError as error:
            self._socket.close()
            raise errors.UnavailableError(f"{peer} can't be reached: {error.strerror or error}") from error

    def __enter__(self) -> "Self":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: "TracebackType | None"
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close it; what was asked for goes on or is given up, as the service sees fit."""
        self._socket.close()
        while self._descriptors:
            os.close(self._descriptors.pop())

    def fileno(self) -> int:
        """For waiting until a reply comes; see ``ready``."""
        return self._socket.fileno()

    def call(
        self, method: str, parameters: "Mapping[str, Any] | None" = None, descriptors: "Sequence[int]" = ()
    ) -> Reply:
        """Call a method that has one reply.

        Args:
            method: With its interface.
            parameters: What it is told.
            descriptors: Handed over with the call; they stay ours as well.

        Raises:
            UnavailableError: The service went away.
            NixletError: What the service says.
        """
        self.send(method, parameters, descriptors)
        reply, _ = self.receive()
        return reply

    def stream(
        self, method: str, parameters: "Mapping[str, Any] | None" = None, descriptors: "Sequence[int]" = ()
    ) -> "Iterator[Reply]":
        """Call a method that has several replies; as ``call``."""
        self.send(method, parameters, descriptors, more=True)
        goes_on = True
        while goes_on:
            reply, goes_on = self.receive()
            yield reply

    def send(
        self,
        method: str,
        parameters: "Mapping[str, Any] | None" = None,
        descriptors: "Sequence[int]" = (),
        *,
        more: bool = False,
    ) -> None:
        """Send a call, whose replies are to be received; see ``call``."""
        message: dict[str, Any] = {"method": method, "parameters": parameters or {}}
        if more:
            message["more"] = True
        data = wire.encoded(message)
        try:
            sent = 0
            if descriptors:
                rights = b"".join(each.to_bytes(_DESCRIPTOR, sys.byteorder) for each in descriptors)
                sent = self._socket.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            self._socket.sendall(data[sent:])
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self._gone() from error
        # Needed for the reply, and nobody waits for it now.
        import json  # noqa: F401, PLC0415 (see above)

    def descriptor(self) -> int:
        """The first descriptor of those that came with replies; it is the caller's from now on.

        Raises:
            NixletError: None came.
        """
        if not self._descriptors:
            raise errors.NixletError(f"{self.peer} handed no descriptor over")
        return self._descriptors.pop(0)

    def has_reply(self) -> bool:
        """Whether a whole reply has been read already, which no waiting for the socket would tell."""
        return bool(self._replies)

    def ready(self) -> bool:
        """Whether a whole reply is there: after the socket was readable once, without waiting for more of it."""
        if not self._replies:
            self._read()
        return bool(self._replies)

    def receive(self, timeout: float | None = None) -> "tuple[Reply, bool]":
        """Wait for the next reply; it, and whether more will follow.

        Args:
            timeout: Seconds without a sign of the service after which it is not waited for any more; None: for ever.

        Raises:
            TimeoutError: That was too long; it can be waited for again.
            UnavailableError: The service went away.
            NixletError: What the service says.
        """
        while not self._replies:
            self._read(timeout)
        import json  # noqa: PLC0415 (``send`` has read it)

        message = json.loads(self._replies.pop(0))
        if not isinstance(message, dict):
            raise errors.NixletError(f"{self.peer} sent what is no reply")
        parameters = message.get("parameters") or {}
        if name := message.get("error"):
            raise wire.error_of(str(name), parameters, self.peer)
        return parameters, bool(message.get("continues"))

    def _read(self, timeout: float | None = None) -> None:
        self._socket.settimeout(timeout)
        try:
            data, ancillary, _, _ = self._socket.recvmsg(_CHUNK, _RIGHTS, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError as error:
            raise self._gone() from error
        finally:
            self._socket.settimeout(None)
        for level, kind, rights in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                self._descriptors += (
                    int.from_bytes(rights[start : start + _DESCRIPTOR], sys.byteorder)
                    for start in range(0, len(rights) - len(rights) % _DESCRIPTOR, _DESCRIPTOR)
                )
        if not data:
            raise self._gone()
        self._replies += self._splitter.feed(data)

    def _gone(self) -> errors.NixletError:
        return errors.UnavailableError(f"{self.peer} went away", hint="look into the node's log, and start it again")
