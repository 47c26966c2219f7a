"""Containers' logs of limited size, as kubelets keep them: one that is full is put aside, and the oldest goes."""

import asyncio
import contextlib
import datetime
import glob
import logging
import os
from collections.abc import AsyncIterator

from nixlet import errors
from nixlet.containerd import cri
from nixlet.kube import begun, logs, pods
from nixlet.rpc.gen import cri_pb2

#: Seconds between two looks. A kubelet takes ten, in which a container can fill a disk.
_INTERVAL = 1.0

_log = logging.getLogger("nixlet.pods")


class Rotator:
    """Puts the logs of a node's pods aside when they are full."""

    def __init__(self, runtime: cri.RuntimeClient, pods_dir: str, *, limit: int, files: int) -> None:
        """For all pods of one node.

        Args:
            runtime: What writes the logs.
            pods_dir: The directory of the pods' directories.
            limit: Bytes that a log may have.
            files: How many files a log may have, the one that is written included.
        """
        self._runtime = runtime
        self._pods_dir = pods_dir
        self._limit = limit
        self._files = files
        self._told: set[str] = set()

    async def run(self) -> None:
        """Look after the logs until this is cancelled."""
        while True:
            await asyncio.sleep(_INTERVAL)
            try:
                full = await asyncio.to_thread(self._full)
            except OSError as error:
                self._tell(self._pods_dir, f"the logs of pods can't be looked at: {error}")
                continue
            for path in full:
                try:
                    await self._rotate(path)
                    self._told.discard(path)
                except (errors.NixletError, OSError) as error:
                    self._tell(path, f"{path} grows on: {error}")
                except Exception:  # noqa: BLE001 (it is logged, and others are looked after)
                    _log.exception("%s grows on", path)

    def _tell(self, about: str, sentence: str) -> None:
        if about not in self._told:
            self._told.add(about)
            _log.warning("%s", sentence)

    def _full(self) -> list[str]:
        found = []
        for path in glob.iglob(os.path.join(glob.escape(self._pods_dir), "*", "*", "*.log")):
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_size > self._limit:
                    found.append(path)
        return found

    async def _rotate(self, path: str) -> None:
        own = os.path.dirname(path)
        uid, name = begun.uid_of(os.path.dirname(own)), os.path.basename(own)
        labels = {pods.POD_UID: uid, pods.CONTAINER_NAME: name, **pods.MADE_BY}
        for container in await self._runtime.containers(labels=labels):
            # The log of one that has ended grows no more.
            if container.state == cri_pb2.CONTAINER_RUNNING:
                aside = logs.aside(path, datetime.datetime.now(datetime.UTC))
                os.rename(path, aside)
                try:
                    await self._runtime.reopen_log(container.id)
                except BaseException:
                    # It is written on under either name.
                    if not os.path.exists(path):
                        os.rename(aside, path)
                    raise
                for old in logs.parts(path)[: -self._files]:
                    os.unlink(old)
                return


@contextlib.asynccontextmanager
async def kept(rotator: Rotator) -> AsyncIterator[None]:
    """Have logs looked after for the time of the context."""
    running = asyncio.create_task(rotator.run(), name="logs")
    try:
        yield
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
