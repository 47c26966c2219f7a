"""Stopping and removing containers for the command line: several at once, each to its end, whatever becomes of the client."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Annotated

import msgspec

from nixlet import errors
from nixlet.containerd import cri
from nixlet.pods import listing, removal
from nixlet.rpc.gen import cri_pb2
from nixlet.varlink import server, wire

_Names = Annotated[Sequence[str], msgspec.Meta(min_length=1)]

#: The longest time that containers get to end by themselves (seconds): some decades. containerd counts nanoseconds in 64 bits.
_LONGEST_GRACE = 2**31 - 1


class _Stopped(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    containers: _Names
    grace: int | None = None


class _Removed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    containers: _Names
    force: bool = False


def _names_several(wanted: _Stopped | _Removed) -> bool:
    """Each container that is named has a reply."""
    return len(wanted.containers) > 1


#: Changes what a person called so: a container or a pod without one, and the pod.
_Change = Callable[[str, cri_pb2.Container, cri_pb2.PodSandbox], Awaitable[None]]


class StoppingService:
    """Answers for one node."""

    def __init__(self, runtime: cri.RuntimeClient, removals: removal.Removals) -> None:
        """Answer for a node.

        Args:
            runtime: The CRI.
            removals: Stops and removes there.
        """
        self._runtime = runtime
        self._removals = removals

    def methods(self) -> Mapping[str, server.Method]:
        """Its methods."""
        return {
            "StopContainers": server.Method(_Stopped, self._stop, several=_names_several),
            "RemoveContainers": server.Method(_Removed, self._remove, several=_names_several),
        }

    async def _stop(self, call: server.Call[_Stopped]) -> Mapping[str, object]:
        given = call.parameters.grace
        grace = -1 if given is None else min(max(given, 0), _LONGEST_GRACE)

        async def stop(_: str, found: cri_pb2.Container, sandbox: cri_pb2.PodSandbox) -> None:
            await self._removals.stop(sandbox, "" if listing.is_bare(found) else found.id, grace)

        return await self._changed(call, call.parameters.containers, stop)

    async def _remove(self, call: server.Call[_Removed]) -> Mapping[str, object]:
        async def remove(name: str, found: cri_pb2.Container, sandbox: cri_pb2.PodSandbox) -> None:
            if listing.is_bare(found):
                await self._removals.remove(sandbox)
                return
            if found.state == cri_pb2.CONTAINER_RUNNING and not call.parameters.force:
                raise errors.FailedPreconditionError(
                    f"container {name} is running", hint="stop it first, or remove it with --force"
                )
            await self._removals.remove_container(sandbox, found.id)

        return await self._changed(call, call.parameters.containers, remove)

    async def _changed(
        self, call: server.Call[_Stopped] | server.Call[_Removed], wanted: Sequence[str], change: _Change
    ) -> Mapping[str, object]:
        """Change all that is wanted at once, and tell of each in order."""
        present = await listing.present(self._runtime, self._removals)

        async def changed(name: str) -> dict[str, object]:
            try:
                found = present.find(name)
                # One that is removed as soon as it ends ("run --rm") may be gone already.
                with contextlib.suppress(errors.NotFoundError):
                    await change(name, found, present.sandboxes[found.pod_sandbox_id])
            except errors.NixletError as error:
                return {"container": name, "failure": wire.parameters_of(error)}
            return {"container": name}

        changing = [asyncio.create_task(changed(each), name=f"change {each}") for each in wanted]
        try:
            for each in changing[:-1]:
                await call.reply(await each)
            return await changing[-1]
        finally:
            # Where this ends early, the changes themselves go on.
            for each in changing:
                each.cancel()
            await asyncio.gather(*changing, return_exceptions=True)
