"""The streams of a container's process, as CRI serves them: at a URL on the loopback interface, over a WebSocket (RFC 6455).

The sub-protocol is Kubernetes' ``v4.channel.k8s.io``: each message begins with the number of its channel. It is what containerd 1.6 to
2.4 have in common; none of them has v5, which could say that standard input has ended. Under v4 only the end of the connection says so.
"""

import contextlib
from collections.abc import AsyncIterator
from typing import Literal, NamedTuple

from websockets.asyncio import client
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI
from websockets.typing import Subprotocol

from nixlet import errors

_PROTOCOL = Subprotocol("v4.channel.k8s.io")
_STDIN, _STDOUT, _STDERR = 0, 1, 2

#: Seconds that the connection may take.
_OPEN_TIMEOUT = 10.0


class Output(NamedTuple):
    """A piece of what a process wrote."""

    stream: Literal["stdout", "stderr"]
    data: bytes


class Attachment:
    """A connection to a process's streams."""

    def __init__(self, socket: client.ClientConnection) -> None:
        self._socket = socket

    async def output(self) -> AsyncIterator[Output]:
        """What the process writes, until it ends or the connection does."""
        with contextlib.suppress(ConnectionClosed):
            async for message in self._socket:
                # Channel 3 tells how the stream ended. How the process did is CRI's to say.
                if isinstance(message, bytes) and len(message) > 1 and message[0] in {_STDOUT, _STDERR}:
                    yield Output("stderr" if message[0] == _STDERR else "stdout", message[1:])

    async def send(self, data: bytes) -> bool:
        """Write to the process's standard input; False when nobody reads it any more."""
        try:
            await self._socket.send(bytes([_STDIN]) + data)
        except ConnectionClosed:
            return False
        return True

    async def close(self) -> None:
        """End the connection once all that was sent has been taken; standard input ends as well, if the container was made so."""
        await self._socket.close()


@contextlib.asynccontextmanager
async def attached(url: str) -> AsyncIterator[Attachment]:
    """A connection to the streams that CRI named.

    Raises:
        UnavailableError: Nobody serves them (any more).
    """
    scheme, _, rest = url.partition("://")
    try:
        socket = await client.connect(
            f"{'wss' if scheme == 'https' else 'ws'}://{rest}",
            subprotocols=[_PROTOCOL],
            open_timeout=_OPEN_TIMEOUT,
            # What was sent must arrive, and a process may read its input as slowly as it likes: no limits, and no pings,
            # which the server doesn't answer while it waits for the process.
            close_timeout=None,
            ping_interval=None,
            max_size=None,
            compression=None,
            # Loopback is never reached through a proxy, whatever the environment says.
            proxy=None,
        )
    except (OSError, TimeoutError, InvalidHandshake, InvalidURI) as error:
        raise errors.UnavailableError(f"the container's streams can't be reached: {error}") from error
    try:
        yield Attachment(socket)
    finally:
        # Not a closing handshake: whoever wants one has made it.
        socket.transport.abort()
        await socket.wait_closed()
