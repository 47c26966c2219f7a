"""What becomes of pods that have ended: they give back what they hold, and go if that was asked for (``nixlet run --rm``).

The latter are marked, so that a next node knows of them, too.
"""

import asyncio
import contextlib
import logging

from nixlet import errors
from nixlet.containerd import client, cri
from nixlet.containers import endings
from nixlet.pods import criconfig, removal
from nixlet.rpc.gen import cri_pb2

#: Seconds until CRI is asked again about a container whose process has ended. It says so after about 0.1 s, and nobody waits for that.
_LOOK = 0.1

_log = logging.getLogger("nixlet.pods")


class Watcher:
    """Waits for the end of pods.

    They stay for ``nixlet logs`` and ``nixlet rm`` unless they are marked, but are to hold no address, no port of the host and no
    process.
    """

    def __init__(self, runtime: cri.RuntimeClient, containerd: client.Containerd, removals: removal.Removals) -> None:
        self._runtime = runtime
        self._containerd = containerd
        self._removals = removals
        self._waiting: set[asyncio.Task[None]] = set()

    async def adopt(self) -> None:
        """Wait for the pods that there are: an earlier node did until now. Some may have ended while there was none."""
        for sandbox in await self._runtime.sandboxes(criconfig.MADE_BY):
            if sandbox.state == cri_pb2.SANDBOX_READY or removal.is_marked(sandbox):
                self.wait_for(sandbox.id)

    def wait_for(self, sandbox: str) -> "asyncio.Task[None]":
        """Release or remove a pod when none of its containers is running any more; the task ends when that is done."""
        task = asyncio.create_task(self._wait(sandbox), name=f"end of {sandbox}")
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)
        return task

    async def close(self) -> None:
        """Wait no more; a next node does."""
        for task in self._waiting:
            task.cancel()
        await asyncio.gather(*self._waiting, return_exceptions=True)

    async def _wait(self, sandbox: str) -> None:
        told = False
        while True:
            try:
                while running := await self._runtime.running(sandbox):
                    # Somebody may remove it while it is waited for.
                    with contextlib.suppress(errors.NotFoundError):
                        await endings.wait(self._runtime, self._containerd, running[0], patient=True, look=_LOOK)
                for found in await self._runtime.sandboxes(criconfig.MADE_BY):
                    if found.id == sandbox and (settling := await self._removals.settle(found)) is not None:
                        await asyncio.shield(settling)
                return
            except errors.NixletError as error:
                if not told:
                    _log.warning("pod %s can't be looked after at the moment: %s", sandbox, error)
                    told = True
            except Exception:  # noqa: BLE001 (it is logged, and tried again)
                if not told:
                    _log.exception("pod %s can't be looked after at the moment", sandbox)
                    told = True
            await asyncio.sleep(endings.RETRY)
