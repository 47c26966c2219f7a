"""Containers' logs of limited size, as kubelets keep them: one that is full is put aside, and the oldest goes."""

import asyncio
import contextlib
import datetime
import glob
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable

from nixlet import errors
from nixlet.containerd import cri
from nixlet.containers import logs, logwriter
from nixlet.pods import begun, criconfig
from nixlet.rpc.gen import cri_pb2

#: Seconds between two looks. A kubelet takes ten, in which a container can fill a disk.
_INTERVAL = 1.0

_log = logging.getLogger("nixlet.pods")


class Rotator:
    """Puts the logs of a node's pods aside when they are full."""

    def __init__(
        self,
        runtime: cri.RuntimeClient,
        pods_dir: str,
        is_ours: Callable[[str], bool],
        *,
        limit: int,
        files: int,
    ) -> None:
        """For all pods of one node.

        Args:
            runtime: Writes the logs that the node doesn't write.
            pods_dir: The directory of the pods' directories.
            is_ours: Whether the node itself writes the log of this path.
            limit: Bytes that a log may have.
            files: How many files a log may have, the one that is written included.
        """
        self._runtime = runtime
        self._pods_dir = pods_dir
        self._is_ours = is_ours
        self._limit = limit
        self._files = files
        self._told: set[str] = set()
        self._ended: set[str] = set()

    async def run(self) -> None:
        """Look after the logs until this is cancelled."""
        while True:
            await asyncio.sleep(_INTERVAL)
            try:
                full, cut_off = await asyncio.to_thread(self._look)
            except OSError as error:
                self._tell(self._pods_dir, f"the logs of pods can't be looked at: {error}")
                continue
            for path in (*full, *cut_off):
                try:
                    await (self._rotate(path) if path in full else self._complete(path))
                    self._told.discard(path)
                except (errors.NixletError, OSError) as error:
                    self._tell(path, f"{path} grows on: {error}")
                except Exception:  # noqa: BLE001 (it is logged, and others are looked after)
                    _log.exception("%s grows on", path)

    def _tell(self, about: str, sentence: str) -> None:
        if about not in self._told:
            self._told.add(about)
            _log.warning("%s", sentence)

    def _look(self) -> tuple[set[str], set[str]]:
        """The logs that are full, and those that were put aside by somebody who was cut off before there was a new one."""
        there = os.path.join(glob.escape(self._pods_dir), "*", "*", "*.log")
        full = set()
        for path in glob.iglob(there):
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_size > self._limit:
                    full.add(path)
        missing = {
            path for each in glob.iglob(f"{there}.*") if (path := logs.log_of(each)) and not os.path.lexists(path)
        }
        self._ended &= missing
        return full, missing - self._ended

    async def _running(self, path: str) -> str | None:
        """The container that writes a log; the log of one that has ended grows no more."""
        own = os.path.dirname(path)
        uid, name = begun.uid_of(os.path.dirname(own)), os.path.basename(own)
        labels = {criconfig.POD_UID: uid, criconfig.CONTAINER_NAME: name, **criconfig.MADE_BY}
        for container in await self._runtime.containers(labels=labels):
            if container.state == cri_pb2.CONTAINER_RUNNING:
                return container.id
        return None

    async def _rotate(self, path: str) -> None:
        begin_anew = await self._who_begins_anew(path)
        if begin_anew is None:
            return
        aside = logs.aside(path, datetime.datetime.now(datetime.UTC))
        os.rename(path, aside)
        try:
            await begin_anew()
        except BaseException:
            # It is written on under either name; one that the runtime has made nevertheless is not overwritten.
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
                os.unlink(aside)
            raise
        finally:
            self._drop_oldest(path)

    async def _complete(self, path: str) -> None:
        begin_anew = await self._who_begins_anew(path)
        if begin_anew is None:
            self._ended.add(path)
            return
        await begin_anew()
        self._drop_oldest(path)

    async def _who_begins_anew(self, path: str) -> Callable[[], Awaitable[None]] | None:
        """How a log gets a new file after one that was put aside; None: nobody writes it any more."""
        if self._is_ours(path):

            async def begin() -> None:
                # The node opens it anew for each piece of output, so nobody has to be told.
                logwriter.begin(path)

            return begin
        container = await self._running(path)
        return None if container is None else lambda: self._runtime.reopen_log(container)

    def _drop_oldest(self, path: str) -> None:
        with logs.at(path) as log:
            for old in log.names()[: -self._files]:
                os.unlink(old, dir_fd=log.directory)


@contextlib.asynccontextmanager
async def kept(rotator: Rotator) -> AsyncIterator[None]:
    """Have logs looked after for the time of the context."""
    running = asyncio.create_task(rotator.run(), name="logs")
    try:
        yield
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
