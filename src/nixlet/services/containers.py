"""What the command line asks about containers: which there are, what is known of them, what they use, how they end."""

import asyncio
import contextlib
from collections.abc import Mapping, Sequence

import msgspec

from nixlet.containerd import client, cri, tasks
from nixlet.containers import endings
from nixlet.pods import details, listing, lookup, removal, usage
from nixlet.varlink import server

#: Seconds between two looks at what containers use.
_INTERVAL = 1.0


class _Listed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    all: bool


class _Named(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    containers: Sequence[str]


class _One(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    container: str


class ContainersService:
    """Answers for one node."""

    def __init__(
        self,
        runtime: cri.RuntimeClient,
        containerd: client.Containerd,
        service: tasks.Tasks,
        removals: removal.Removals,
    ) -> None:
        """Answer for a node.

        Args:
            runtime: The CRI.
            containerd: The containerd behind it.
            service: Its tasks.
            removals: What is being removed there.
        """
        self._removals = removals
        self._runtime = runtime
        self._containerd = containerd
        self._tasks = service

    def methods(self) -> Mapping[str, server.Method]:
        """Its methods."""
        return {
            "ListContainers": server.Method(_Listed, self._list),
            "InspectContainers": server.Method(_Named, self._inspect),
            "ContainerStats": server.Method(_Named, self._stats),
            "WaitContainer": server.Method(_One, self._wait),
        }

    async def _list(self, call: server.Call[_Listed]) -> Mapping[str, object]:
        return {"containers": await listing.entries(self._runtime, self._removals, everything=call.parameters.all)}

    async def _found(self, wanted: Sequence[str]) -> Sequence[str]:
        """The IDs of containers by what a person calls them."""
        containers = await listing.containers(self._runtime, self._removals)
        return [lookup.find(each, containers).id for each in wanted]

    async def _inspect(self, call: server.Call[_Named]) -> Mapping[str, object]:
        found = await self._found(call.parameters.containers)
        return {"containers": await asyncio.gather(*(details.describe(self._runtime, each) for each in found))}

    async def _stats(self, call: server.Call[_Named]) -> Mapping[str, object]:
        wanted = await self._found(call.parameters.containers) or None
        meter = usage.Meter(self._runtime, self._tasks)
        await meter.look(())
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(call.gone.wait(), _INTERVAL)
            answer = {"containers": await meter.look(wanted)}
            if not call.more or call.gone.is_set():
                return answer
            await call.reply(answer)

    async def _wait(self, call: server.Call[_One]) -> Mapping[str, object] | None:
        (found,) = await self._found([call.parameters.container])
        status = await call.unless_gone(endings.wait(self._runtime, self._containerd, found, patient=True))
        return None if status is None else {"exit_code": status.exit_code}
