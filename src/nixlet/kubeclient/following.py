"""Objects as they are from now on: listed, then watched, and listed anew where the server doesn't remember."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from typing import NamedTuple

from nixlet import errors
from nixlet.kubeclient import client as model
from nixlet.kubeclient import failures
from nixlet.kubeclient.asynchronous import AsyncClient
from nixlet.kubeclient.client import Object
from nixlet.kubeclient.resources import Resource

#: Seconds before the first try after a failure, which double, and the most.
_FIRST_DELAY, _LONGEST_DELAY = 0.5, 30.0

#: A watch that has ended sooner than this (seconds) is no reason to begin the next one at once.
_SHORT = 1.0

#: All objects are told, in place of what was told before.
LISTED = "LISTED"

_log = logging.getLogger("nixlet.kubernetes")


class Change(NamedTuple):
    """What is told.

    Attributes:
        kind: ``LISTED``, or what happened to one object: ``ADDED``, ``MODIFIED``, ``DELETED``.
        objects: All objects that there are; otherwise the one.
    """

    kind: str
    objects: list[Object]


async def follow(
    client: AsyncClient, resource: Resource, *, namespace: str = "", labels: str = "", fields: str = ""
) -> AsyncGenerator[Change, None]:
    """Tell for ever how objects are: first all of them, then each change, and all anew where changes may have been missed.

    A server that is away, or doesn't let us in, is asked again, ever later (30 s at most), and the first such failure goes to the log. Whoever leaves
    it closes it (``contextlib.aclosing``).

    Raises:
        InvalidArgumentError: The request itself is wrong.
    """
    loop = asyncio.get_running_loop()
    version, tries = "", 0
    while True:
        begun = loop.time()
        try:
            if not version:
                listing = await client.list(resource, namespace=namespace, labels=labels, fields=fields)
                version = listing.version
                yield Change(LISTED, listing.items)
                tries = 0
            begun = loop.time()
            watch = client.watch(resource, version=version, namespace=namespace, labels=labels, fields=fields)
            async with contextlib.aclosing(watch) as events:
                async for event in events:
                    version = event.version or version
                    tries = 0
                    if event.kind in {model.ADDED, model.MODIFIED, model.DELETED}:
                        yield Change(event.kind, [event.object])
        except failures.ExpiredError:
            version = ""
        except errors.InvalidArgumentError:
            raise
        except errors.NixletError as error:
            if isinstance(error, errors.CallCancelledError):
                raise
            if not tries:
                _log.warning("%s can't be followed, and is tried again: %s", resource.plural, error)
            tries += 1
        if tries or loop.time() - begun < _SHORT:
            # (the exponent is limited as well: a server may be away for days)
            await asyncio.sleep(min(_FIRST_DELAY * 2.0 ** min(max(tries - 1, 0), 64), _LONGEST_DELAY))
