"""Progress that a node tells of. It imports nothing that takes time: most work is done before there is anything to be shown."""

from nixlet.cli import streams

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Generator, Mapping
    from types import TracebackType
    from typing import Any, Self

    from nixlet.telemetry import progress
else:
    # As in ``session``.
    import _signal as signal


class Shown:
    """Shows the steps of some work from the first one on until its end.

    As a context manager it ends the verb when SIGTERM comes, as Ctrl-C does: a program that just dies leaves the cursor hidden.

    Args:
        title: What the work is called.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._showing: Generator[progress.ProgressSink, None, None] | None = None
        self._sink: progress.ProgressSink | None = None
        self._ends = False

    def __enter__(self) -> "Self":
        # Not where it is ignored, as by somebody who shall not be ended.
        if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _end)
            self._ends = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: "TracebackType | None"
    ) -> None:
        self.close()
        if self._ends:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def tell(self, step: "Mapping[str, Any]") -> None:
        """Show a step as the node tells it (``Progress`` in its interface's description), or that it begins."""
        from nixlet.cli import progressbars

        if self._sink is None:
            # Known before it begins: an interrupt may come at any time.
            self._showing = progressbars.showing(self._title)
            self._sink = next(self._showing)
        if "stage" in step:
            self._sink(progressbars.step(step))

    def close(self) -> None:
        """Take it away."""
        if self._showing is not None:
            self._showing.close()
            self._showing = self._sink = None


def _end(number: int, _: object) -> None:
    raise streams.Exit(128 + number)
