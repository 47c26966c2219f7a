"""Progress of long work, as values: who does the work emits them, who shows them decides how.

Sinks are called in the event loop, often (thousands of times for a big closure): they must be cheap, and throttle themselves.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple


class Progress(NamedTuple):
    """One step of some work.

    Attributes:
        stage: What is being done, for a person: "realising", "loading".
        done: How much is done, in ``unit``.
        total: How much there is, or 0 while nobody knows.
        unit: What is counted; empty where there is nothing to be counted, such as while somebody else is waited for.
        detail: The thing at hand (a store path's name, a layer), or an empty string.
    """

    stage: str
    done: int
    total: int
    unit: Literal["paths", "bytes", "layers", ""]
    detail: str = ""


ProgressSink = Callable[[Progress], None]


def ignore(_progress: Progress) -> None:
    """A sink for those who don't want to know."""
