"""What running containers use: CPU, memory, processes."""

import asyncio
import dataclasses
from collections.abc import Container, Mapping, Sequence

from nixlet import errors
from nixlet.containerd import cri, tasks
from nixlet.pods import criconfig
from nixlet.rpc.gen import cri_pb2


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """What a container uses.

    Attributes:
        id: Its ID.
        name: Its name.
        pod: Its pod's.
        cpu_percent: 100 is one CPU all of the time.
        memory_bytes: Its working set: what can't be given back at once.
        memory_limit_bytes: What it may have; 0: all there is.
        pids: Its processes.
    """

    id: str
    name: str
    pod: str
    cpu_percent: float
    memory_bytes: int
    memory_limit_bytes: int
    pids: int


class Meter:
    """Looks again and again; a share of the CPU is that of the time between two looks."""

    def __init__(self, runtime: cri.RuntimeClient, service: tasks.Tasks) -> None:
        self._runtime = runtime
        self._tasks = service
        self._before: Mapping[str, cri_pb2.ContainerStats] = {}

    async def look(self, wanted: Container[str] | None = None) -> Sequence[Usage]:
        """What containers use, by their pods and names.

        Args:
            wanted: Their IDs; None: all that run.

        Raises:
            NixletError: The runtime can't tell.
        """
        found = await self._runtime.container_stats()
        # A container that ends meanwhile is left out by some versions of containerd, and has no figures in others.
        now = {each.attributes.id: each for each in found if each.cpu.timestamp}
        before, self._before = self._before, now
        usages = await asyncio.gather(
            *(self._usage(sample, before.get(each)) for each, sample in now.items() if wanted is None or each in wanted)
        )
        return sorted(usages, key=lambda usage: (usage.pod, usage.name))

    async def _usage(self, sample: cri_pb2.ContainerStats, before: cri_pb2.ContainerStats | None) -> Usage:
        share = 0.0
        if before is not None and sample.cpu.timestamp > before.cpu.timestamp:
            used = sample.cpu.usage_core_nano_seconds.value - before.cpu.usage_core_nano_seconds.value
            share = 100 * max(used, 0) / (sample.cpu.timestamp - before.cpu.timestamp)
        try:
            processes = len(await self._tasks.pids(sample.attributes.id))
        except errors.NixletError:
            processes = 0
        memory = sample.memory
        # What is left of the limit is told only where there is one.
        limit = memory.available_bytes.value + memory.working_set_bytes.value if memory.available_bytes.value else 0
        return Usage(
            id=sample.attributes.id,
            name=sample.attributes.metadata.name,
            pod=sample.attributes.labels.get(criconfig.POD_NAME, ""),
            cpu_percent=round(share, 2),
            memory_bytes=memory.working_set_bytes.value,
            memory_limit_bytes=limit,
            pids=processes,
        )
