"""Calling other programs, most of them over unix sockets; their errors become ours."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

from grpclib import client, protocol
from grpclib.exceptions import GRPCError, StreamTerminatedError
from h2.exceptions import ProtocolError

from nixlet import errors
from nixlet.rpc import status, transport

#: Seconds between two tries while a program starts.
_RETRY_INTERVAL = 0.02


class Channel(client.Channel):
    """A channel to a program; ``connect`` makes it.

    Attributes:
        connections: How many connections were begun. Whoever answers over one of them is the same program all the time.
    """

    connections: int = 0

    def _protocol_factory(self) -> protocol.H2Protocol:
        self.connections += 1
        return transport.LimitedProtocol(client.Handler(), self._config, self._h2_config)


@contextlib.asynccontextmanager
async def connect(path: str) -> AsyncIterator[Channel]:
    """A channel to a unix socket; it connects with the first call, and again after the peer was gone."""
    codec, details = transport.RawCodec(), transport.RawStatusDetails()
    with contextlib.closing(Channel(path=path, codec=codec, status_details_codec=details)) as channel:
        yield channel


@contextlib.asynccontextmanager
async def connect_to(host: str, port: int, tls: ssl.SSLContext | None) -> AsyncIterator[Channel]:
    """The same to a port; without ``tls`` whoever answers there is believed."""
    codec, details = transport.RawCodec(), transport.RawStatusDetails()
    with contextlib.closing(Channel(host, port, ssl=tls, codec=codec, status_details_codec=details)) as channel:
        yield channel


@contextlib.contextmanager
def translated(peer: str) -> Iterator[None]:
    """Turn what a call can raise into nixlet's errors.

    Args:
        peer: Whom the calls inside are made to, for the sentences: "containerd at /run/…".
    """
    try:
        yield
    except GRPCError as error:
        raise status.to_error(error, peer) from error
    except StreamTerminatedError as error:
        raise errors.UnavailableError(f"{peer} ended the connection during a call") from error
    except TimeoutError as error:
        raise errors.DeadlineExceededError(f"{peer} did not answer in time") from error
    except PermissionError as error:
        raise errors.PermissionDeniedError(
            f"{peer} can't be reached: it is not for you ({error.strerror})", hint="run it as root: sudo nixlet …"
        ) from error
    except (OSError, ConnectionError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise errors.UnavailableError(f"{peer} can't be reached: {reason}", hint="is it running?") from error


async def hang_up(stream: "client.Stream[Any, Any]") -> None:
    """Give up a call that would go on; one that has ended by itself is no error."""
    with contextlib.suppress(OSError, StreamTerminatedError, ProtocolError):
        await stream.cancel()


async def wait_until_answered(call: Callable[[], Awaitable[object]]) -> None:
    """Repeat a call until its peer answers it; for readiness. The caller limits the time.

    A peer that answers with an error is not ready either: containerd's CRI does so while it takes up its pods again.

    Raises:
        UnimplementedError: The peer answers, and doesn't know the call: services are there from the start or never.
    """
    while True:
        try:
            await call()
        except errors.UnimplementedError:
            raise
        except errors.NixletError:
            await asyncio.sleep(_RETRY_INTERVAL)
        else:
            return
