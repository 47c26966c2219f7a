"""Containers' logs for whoever asks the node: the method OpenLog.

The client is handed the directory of the log and reads for itself: what it prints takes the node no time, and whether it goes on
reading is nobody's concern.
"""

import contextlib
import os
from collections.abc import Mapping

import msgspec

from nixlet import errors
from nixlet.containerd import client, cri
from nixlet.containers import endings
from nixlet.pods import listing, lookup, removal
from nixlet.varlink import server


class Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The parameters of OpenLog."""

    container: str
    follow: bool


class LogService:
    """Answers for the containers of one containerd.

    Args:
        runtime: The CRI.
        containerd: The containerd behind it.
        removals: What is being removed there.
    """

    def __init__(self, runtime: cri.RuntimeClient, containerd: client.Containerd, removals: removal.Removals) -> None:
        self._runtime = runtime
        self._containerd = containerd
        self._removals = removals

    def methods(self) -> Mapping[str, server.Method]:
        """Its methods."""
        return {"OpenLog": server.Method(Wanted, self._open, several=True)}

    async def _open(self, call: server.Call[Wanted]) -> None:
        wanted = call.parameters.container
        found = lookup.find(wanted, await listing.containers(self._runtime, self._removals))
        path = (await self._runtime.container_status(found.id)).log_path
        directory, name = os.path.split(path)
        if not path:
            raise errors.FailedPreconditionError(
                f"container {wanted} has no log", hint="whoever made it wants none: make its pod with a log directory"
            )
        try:
            opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise errors.NotFoundError(
                f"the log of container {wanted} is gone: there is no {directory}", hint="somebody deleted it"
            ) from error
        try:
            await call.reply({"directory": 0, "name": name}, [opened])
        finally:
            os.close(opened)
        if call.parameters.follow:
            # One that was removed has ended.
            with contextlib.suppress(errors.NotFoundError):
                await call.unless_gone(endings.wait(self._runtime, self._containerd, found.id, patient=True))
