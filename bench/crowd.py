"""Many containers that are started by some clients at once."""

import concurrent.futures
import time
from collections.abc import Sequence
from typing import Any

import commands
import measure


def rows(tools: Sequence[commands.Tool], containers: int, clients: int, rounds: int) -> dict[str, Any]:
    """The seconds until all run, by tool; one that does not start is an error."""

    def contender(tool: commands.Tool) -> float:
        names = [f"crowd{number}" for number in range(containers)]

        def start(name: str) -> None:
            tool.ran("run", "-d", "--name", name, tool.image, "sleep", "100000")

        begin = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(clients) as pool:
            list(pool.map(start, names))
            taken = time.perf_counter() - begin
            list(pool.map(lambda name: tool.ran("rm", "-f", name), names))
        return taken

    samples = measure.rounds({tool.name: lambda tool=tool: contender(tool) for tool in tools}, rounds, warm_up=0)
    return {name: measure.row(values) for name, values in samples.items()}
