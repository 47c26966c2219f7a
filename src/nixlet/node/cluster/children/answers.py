"""Whether a cluster's programs answer: each is asked again and again until it says itself that it is well."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from nixlet import errors
from nixlet.kubeclient.asynchronous import AsyncClient
from nixlet.kubeclient.client import Client
from nixlet.kubeclient.endpoint import Endpoint

#: Seconds for one answer, and between two questions.
_ANSWER_TIMEOUT, _PAUSE = 5.0, 0.1


def until_well(endpoint: Endpoint, path: str) -> Callable[[], Awaitable[None]]:
    """What returns when a program is well by its own word; the caller limits the time.

    Args:
        endpoint: Where it is asked.
        path: What for.
    """

    async def wait() -> None:
        async with AsyncClient(Client(endpoint, seconds=_ANSWER_TIMEOUT)) as client:
            while True:
                with contextlib.suppress(errors.NixletError):
                    await client.check(path)
                    return
                await asyncio.sleep(_PAUSE)

    return wait
