"""Progress that a node tells of. It imports nothing that takes time: most work is done before there is anything to be shown."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager
    from types import TracebackType
    from typing import Any, Self

    from nixlet.telemetry import progress


class Shown:
    """Shows the steps of some work from the first one on until its end; a context manager.

    Args:
        title: What the work is called.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._showing: AbstractContextManager[progress.ProgressSink] | None = None
        self._sink: progress.ProgressSink | None = None

    def __enter__(self) -> "Self":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: "TracebackType | None"
    ) -> None:
        self.close()

    def tell(self, step: "Mapping[str, Any]") -> None:
        """Show a step as the node tells it (``Progress`` in its interface's description), or that it begins."""
        from nixlet.cli import progressbars

        if self._sink is None:
            self._showing = progressbars.shown(self.title)
            self._sink = self._showing.__enter__()
        if "stage" in step:
            self._sink(progressbars.step(step))

    def close(self) -> None:
        """Take it away."""
        if self._showing is not None:
            self._showing.__exit__(None, None, None)
            self._showing = self._sink = None
