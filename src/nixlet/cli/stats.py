"""``nixlet stats``: what running containers use."""

import asyncio
from typing import TYPE_CHECKING, NamedTuple

from nixlet.cli import grammar, options

if TYPE_CHECKING:
    from nixlet.cli.node import Node
    from nixlet.rpc.gen import cri_pb2

#: Seconds between two looks; a share of the CPU is that of the time between them.
_INTERVAL = 1.0

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


class _Usage(NamedTuple):
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


@grammar.verb(
    options.STATE_DIR,
    options.OUTPUT,
    grammar.Flag("--no-stream", text="Look once."),
    grammar.Argument("containers", several=True, required=False, completes="containers"),
)
@options.asynchronous
async def stats(containers: tuple[str, ...], state_dir: str, output: str, *, no_stream: bool) -> None:
    """Show what CONTAINERS use, or all that run: CPU, memory, processes; again each second until Ctrl-C."""
    import sys

    from nixlet.cli import containers as module
    from nixlet.cli import node, streams, table

    async with node.connected(state_dir) as connection:
        wanted = {(await module.find(connection, each)).id for each in containers} or None
        before = await _sample(connection)
        while True:
            await asyncio.sleep(_INTERVAL)
            now = await _sample(connection)
            usages = [
                await _usage(connection, sample, before.get(each))
                for each, sample in now.items()
                if wanted is None or each in wanted
            ]
            usages.sort(key=lambda usage: (usage.pod, usage.name))
            if output == "json":
                options.print_json([usage._asdict() for usage in usages])
            else:
                if not no_stream and sys.stdout.isatty():
                    sys.stdout.write("\x1b[2J\x1b[H")
                table.echo(
                    ("CONTAINER ID", "NAME", "CPU %", "MEM USAGE / LIMIT", "PIDS"), [_row(usage) for usage in usages]
                )
            if no_stream or streams.reader_is_gone():
                return
            before = now


async def _sample(connection: "Node") -> "dict[str, cri_pb2.ContainerStats]":
    # A container that ends meanwhile is left out by some versions of containerd, and has no figures in others.
    found = await connection.runtime.container_stats()
    return {each.attributes.id: each for each in found if each.cpu.timestamp}


async def _usage(
    connection: "Node", sample: "cri_pb2.ContainerStats", before: "cri_pb2.ContainerStats | None"
) -> _Usage:
    from nixlet import errors
    from nixlet.pods import criconfig

    share = 0.0
    if before is not None and sample.cpu.timestamp > before.cpu.timestamp:
        used = sample.cpu.usage_core_nano_seconds.value - before.cpu.usage_core_nano_seconds.value
        share = 100 * max(used, 0) / (sample.cpu.timestamp - before.cpu.timestamp)
    try:
        processes = len(await connection.tasks.pids(sample.attributes.id))
    except errors.NixletError:
        processes = 0
    memory = sample.memory
    # What is left of the limit is told only where there is one.
    limit = memory.available_bytes.value + memory.working_set_bytes.value if memory.available_bytes.value else 0
    return _Usage(
        id=sample.attributes.id,
        name=sample.attributes.metadata.name,
        pod=sample.attributes.labels.get(criconfig.POD_NAME, ""),
        cpu_percent=round(share, 2),
        memory_bytes=memory.working_set_bytes.value,
        memory_limit_bytes=limit,
        pids=processes,
    )


def _row(usage: _Usage) -> tuple[str, ...]:
    limit = _size(usage.memory_limit_bytes) if usage.memory_limit_bytes else "-"
    memory = f"{_size(usage.memory_bytes)} / {limit}"
    return usage.id[:12], usage.name, f"{usage.cpu_percent:.2f}%", memory, str(usage.pids)


def _size(count: float) -> str:
    for unit in _UNITS[:-1]:
        if count < 1024:
            return f"{count:.4g}{unit}"
        count /= 1024
    return f"{count:.4g}{_UNITS[-1]}"
