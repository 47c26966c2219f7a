"""The streams of a client that asks for a process: what it hands over, and waiting beside it."""

import asyncio
import contextlib
from typing import Annotated, Any

import msgspec

from nixlet.containers import clients
from nixlet.varlink import server

#: Seconds in which the end of a connection is heard of that ended with a descriptor.
_MOMENT = 0.2

#: Columns or rows of a terminal, as many as it can have (struct winsize in ioctl_tty(2)); 0: nobody knows.
Cells = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)]


class Streams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Indices of the descriptors that came with a call, None for streams that aren't to be served."""

    stdin: int | None = None
    stdout: int | None = None
    stderr: int | None = None


def client(call: server.Call[Any], streams: Streams) -> clients.Client:
    """The client that has these streams.

    Raises:
        InvalidArgumentError: A descriptor did not come, or is of no use.
    """
    outputs = {"stdout": streams.stdout, "stderr": streams.stderr}
    there = {name: call.descriptor(index) for name, index in outputs.items() if index is not None}
    return clients.Client(there, None if streams.stdin is None else call.descriptor(streams.stdin))


async def has_hung_up(call: server.Call[Any]) -> bool:
    """Whether a client whose descriptor has no reader any more is gone itself: one that dies takes both along at once."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(call.gone.wait(), _MOMENT)
    return call.gone.is_set()
