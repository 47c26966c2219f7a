"""The daemon's log records as progress: which activities matter to a person who waits for paths, and how far they are."""

from nixlet.telemetry import progress

# Types of activities and of results that carry figures (Nix: enum ActivityType, enum ResultType).
_COPY_PATH = 100
_FILE_TRANSFER = 101
_COPY_PATHS = 103
_SUBSTITUTE = 108
_PROGRESS = 105
_SET_EXPECTED = 106

#: Every so many figures one is passed on: a big closure makes 18,000 of them.
_EVERY = 16


class Activities:
    """Follows the activities of one request and sums up what they report."""

    def __init__(self, sink: progress.ProgressSink, stage: str) -> None:
        self._sink = sink
        self._stage = stage
        self._types: dict[int, int] = {}
        self._bytes: dict[int, int] = {}
        self._expected_bytes = 0
        self._paths = (0, 0)
        self._detail = ""
        self._count = 0

    @property
    def fetched_bytes(self) -> int:
        """Compressed bytes that were fetched, over all transfers."""
        return sum(self._bytes.values())

    def started(self, number: int, kind: int, fields: list[int | str]) -> None:
        """An activity began."""
        self._types[number] = kind
        if kind in {_SUBSTITUTE, _COPY_PATH} and fields and isinstance(fields[0], str):
            self._detail = fields[0].rpartition("/")[2]

    def result(self, number: int, kind: int, fields: list[int | str]) -> None:
        """An activity reported something."""
        activity = self._types.get(number)
        figures = [field for field in fields if isinstance(field, int)]
        if kind == _PROGRESS and activity == _COPY_PATHS and len(figures) >= 2:
            self._paths = (figures[0], figures[1])
            self._sink(progress.Progress(self._stage, *self._paths, "paths", self._detail))
        elif kind == _PROGRESS and activity == _FILE_TRANSFER and figures:
            self._bytes[number] = figures[0]
            self._tell_bytes()
        elif kind == _SET_EXPECTED and len(figures) >= 2 and figures[0] == _FILE_TRANSFER:
            self._expected_bytes = figures[1]

    def _tell_bytes(self) -> None:
        self._count += 1
        if self._count % _EVERY == 1:
            self._sink(progress.Progress(self._stage, self.fetched_bytes, self._expected_bytes, "bytes", self._detail))
