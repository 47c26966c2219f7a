"""Pods that go by themselves when they have ended (``nixlet run -d --rm``). They are marked, so that a next node knows of them, too."""

import asyncio
import contextlib
import logging

from nixlet import errors
from nixlet.containerd import client, cri
from nixlet.kube import endings, player, pods
from nixlet.rpc.gen import cri_pb2

_log = logging.getLogger("nixlet.pods")


class AutoRemover:
    """Waits for the end of pods and removes them."""

    def __init__(self, runtime: cri.RuntimeClient, containerd: client.Containerd, plays: player.Player) -> None:
        self._runtime = runtime
        self._containerd = containerd
        self._player = plays
        self._waiting: set[asyncio.Task[None]] = set()

    async def adopt(self) -> None:
        """Wait for the marked pods that there are: an earlier node did until now."""
        for sandbox in await self._runtime.sandboxes({**pods.MADE_BY, **pods.AUTO_REMOVE}):
            self.wait_for(sandbox.id)

    def wait_for(self, sandbox: str) -> "asyncio.Task[None]":
        """Remove a pod when none of its containers is running any more; the task ends when that is done."""
        task = asyncio.create_task(self._remove(sandbox), name=f"remove {sandbox} when it has ended")
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)
        return task

    async def close(self) -> None:
        """Wait no more; marked pods stay for a next node."""
        for task in self._waiting:
            task.cancel()
        await asyncio.gather(*self._waiting, return_exceptions=True)

    async def _remove(self, sandbox: str) -> None:
        told = False
        while True:
            try:
                for container in await self._runtime.containers(sandbox=sandbox):
                    if container.state == cri_pb2.CONTAINER_RUNNING:
                        # Somebody may remove it while it is waited for.
                        with contextlib.suppress(errors.NotFoundError):
                            await endings.wait(self._runtime, self._containerd, container.id)
                for found in await self._runtime.sandboxes(pods.AUTO_REMOVE):
                    if found.id == sandbox:
                        await self._player.remove(found)
                return
            except errors.NixletError as error:
                if not told:
                    _log.warning("pod %s can't be removed yet: %s", sandbox, error)
                    told = True
            except Exception:  # noqa: BLE001 (it is logged, and tried again)
                if not told:
                    _log.exception("pod %s can't be removed yet", sandbox)
                    told = True
            await asyncio.sleep(endings.RETRY)
