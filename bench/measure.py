"""Measuring side by side: rounds that run every contender once, in turn, so that a busy moment of the machine hits all alike."""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from support import nodes

Contender = Callable[[], float]
Sample = TypeVar("Sample")


def timed(action: Callable[[], object]) -> float:
    """How long something takes, in milliseconds."""
    start = time.perf_counter()
    action()
    return (time.perf_counter() - start) * 1000


def rounds(contenders: Mapping[str, Callable[[], Sample]], count: int, *, warm_up: int = 1) -> dict[str, list[Sample]]:
    """Run all contenders ``count`` times in turn, after some rounds that don't count."""
    samples: dict[str, list[Sample]] = {name: [] for name in contenders}
    for number in range(warm_up + count):
        for name, contender in contenders.items():
            value = contender()
            if number >= warm_up:
                samples[name].append(value)
    return samples


def row(samples: list[float]) -> dict[str, float]:
    """Median, minimum and maximum of some samples."""
    return {"median": statistics.median(samples), "min": min(samples), "max": max(samples), "runs": len(samples)}


def shown(name: str, figures: Mapping[str, float], base: Mapping[str, float] | None = None) -> str:
    """A line of a report, with the ratio to another row."""
    line = f"{name:44} {figures['median']:8.1f} {figures['min']:8.1f} {figures['max']:8.1f}"
    return line if base is None else f"{line}   {figures['median'] / base['median']:5.2f}"


HEAD = f"{'ms':44} {'median':>8} {'min':>8} {'max':>8}   ratio"


def machine() -> dict[str, Any]:
    """Where this was measured."""
    return {
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "nix": _first_line("nix-store", "--version"),
        "runc": _first_line("runc", "--version"),
    }


def _first_line(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=False).stdout.partition("\n")[0]


def arguments(description: str) -> argparse.ArgumentParser:
    """The arguments that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--docs", action="store_true", help="write the report into docs/")
    parser.add_argument("--runs", type=int, default=9, help="rounds that count (at least 7)")
    return parser


@contextlib.contextmanager
def running_node(number: int, containerd: Path, *arguments: str) -> Iterator[tuple[nodes.Node, Path]]:
    """A node, and a directory, for the time of the context.

    Args:
        number: What tells it from the nodes of other benchmarks and tests.
        containerd: Its containerd.
        arguments: Further ones of the server.
    """
    with tempfile.TemporaryDirectory(prefix="nixlet-bench-") as directory:
        node = nodes.Node(number, Path(directory), "--containerd", str(containerd), *arguments)
        with nodes.cleaned_up(node):
            node.start()
            yield node, Path(directory)


def replace_section(path: Path, name: str, text: str) -> None:
    """Put a benchmark's text between its marks in a document."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, _, rest = path.read_text().partition(begin)
    _, _, after = rest.partition(end)
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def write(path: Path | None, figures: object) -> None:
    """Write the figures for a program."""
    if path is not None:
        path.write_text(json.dumps({"machine": machine(), "figures": figures}, indent=2) + "\n")


def publish(
    chosen: argparse.Namespace, name: str, figures: object, text: str, document: str = "docs/performance.md"
) -> None:
    """Print a report, and write what was asked for: its figures, and its section of a document.

    Args:
        chosen: The arguments, as ``arguments`` has them.
        name: The benchmark's.
        figures: For programs.
        text: For people.
        document: Where its section is.
    """
    print(text)
    write(chosen.json, figures)
    if chosen.docs:
        replace_section(Path(document), name, text)
