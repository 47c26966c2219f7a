"""Large output: what a process of a container prints, and what its log holds, to a reader at a pipe."""

import time
from collections.abc import Sequence
from typing import Any

import commands
import measure

#: The line that is printed, and how many of them are a block.
_LINE = "0123456789abcdef" * 6 + "012"
_BLOCK_LINES = 10_000
_BLOCK = _BLOCK_LINES * (len(_LINE) + 1)

#: What is printed last.
_END = "end\n"


def _script(blocks: int) -> str:
    """A shell script that prints as many blocks as quickly as a shell can."""
    block = f"busybox yes {_LINE} | busybox head -n {_BLOCK_LINES} > /block"
    return f"[ -e /block ] || {block}; i=0; while [ $i -lt {blocks} ]; do cat /block; i=$((i+1)); done; echo end"


def _wait_for_log(tool: commands.Tool) -> None:
    """Wait until the last line of what was printed is in the log: nerdctl's comes there later."""
    deadline = time.monotonic() + commands.PATIENCE
    while tool.ran("logs", "--tail", "1", "log-output").output != _END:
        assert time.monotonic() < deadline, f"{tool.name}: what a container printed is not in its log"
        time.sleep(0.5)


def rows(tools: Sequence[commands.Tool], size: int, rounds: int) -> dict[str, Any]:
    """The throughput in MB/s, by verb and tool, of some bytes that are printed."""
    blocks = max(size // _BLOCK, 1)
    script, whole = _script(blocks), blocks * _BLOCK + len(_END)
    for tool in tools:
        tool.ran("run", "-d", "--name", "exec-output", tool.image, "sh", "-c", f"{_script(0)}; exec sleep 100000")
        # It stays: nerdctl's log lacks what a container printed last if it ends at once.
        tool.ran(
            "run", "-d", "--name", "log-output", *tool.whole_log, tool.image, "sh", "-c", f"{script}; exec sleep 100000"
        )
        _wait_for_log(tool)
    verbs = {"exec": ("exec", "exec-output", "sh", "-c", script), "logs": ("logs", "log-output")}
    report = {}
    for verb, arguments in verbs.items():

        def contender(tool: commands.Tool, arguments: Sequence[str] = arguments) -> float:
            taken, count = tool.piped(*arguments)
            assert count == whole, f"{tool.name} {arguments[0]}: {count} of {whole} bytes"
            return count / 1000 / taken

        samples = measure.rounds({tool.name: lambda tool=tool: contender(tool) for tool in tools}, rounds, warm_up=0)
        report[verb] = {name: measure.row(values) for name, values in samples.items()}
    for tool in tools:
        tool.ran("rm", "-f", "exec-output", "log-output")
    return report
