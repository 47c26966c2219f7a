"""Progress on standard error: a bar on a terminal, a plain line for each stage elsewhere."""

import contextlib
import sys
from collections.abc import Generator, Mapping
from typing import Any

from nixlet.cli import sizes
from nixlet.telemetry import progress


def showing(title: str) -> Generator[progress.ProgressSink, None, None]:
    """A sink that shows what it gets until the generator is closed, which may be at any time."""
    if sys.stderr.isatty():
        yield from _bars(title)
    else:
        yield _Lines(title)


@contextlib.contextmanager
def shown(title: str) -> Generator[progress.ProgressSink, None, None]:
    """A sink that shows what it gets for the time of the context."""
    yield from showing(title)


def step(told: Mapping[str, Any]) -> progress.Progress:
    """A step as the node tells it (``Progress`` in its interface's description)."""
    return progress.Progress(told["stage"], told["done"], told["total"], told["unit"], told["detail"])


class _Lines:
    """A line when a stage begins; more would only fill logs."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._stage = ""

    def __call__(self, step: progress.Progress) -> None:
        # Nothing to do is not worth a line.
        if step.stage != self._stage and (step.total or not step.unit):
            self._stage = step.stage
            what = f"{step.stage} {step.total} {step.unit}" if step.unit else f"{step.stage} ({step.detail})"
            print(f"{self._title}: {what}", file=sys.stderr)


def _bars(title: str) -> Generator[progress.ProgressSink, None, None]:
    from rich import console
    from rich import progress as bars

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.TextColumn("{task.fields[figures]}"),
        bars.TextColumn("[dim]{task.fields[detail]}"),
    )
    display = bars.Progress(*columns, console=console.Console(stderr=True), transient=True, refresh_per_second=10)
    task = display.add_task(title, total=None, figures="", detail="")

    def sink(step: progress.Progress) -> None:
        figures = f"{step.done} of {step.total} {step.unit}" if step.unit else ""
        if step.unit == "bytes":
            figures = _size(step.done, step.total)
        display.update(
            task,
            description=f"{title}: {step.stage}",
            completed=step.done,
            total=step.total or None,
            figures=figures,
            detail=step.detail[:60],
        )

    # Its own context leaves the cursor hidden where it is interrupted while it begins.
    try:
        display.start()
        yield sink
    finally:
        display.stop()


def _size(done: int, total: int) -> str:
    return f"{sizes.decimal(done)} of {sizes.decimal(total)}" if total else sizes.decimal(done)
