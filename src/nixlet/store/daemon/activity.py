"""The daemon's log records as progress: which activities matter to a person who waits for paths, and how far they are."""

import collections
import re

from nixlet.telemetry import progress

# Types of activities and of results that carry figures (Nix: enum ActivityType, enum ResultType).
_COPY_PATH = 100
_FILE_TRANSFER = 101
_COPY_PATHS = 103
_SUBSTITUTE = 108
_QUERY_PATH_INFO = 109
_PROGRESS = 105
_SET_EXPECTED = 106

#: Every so many figures one is passed on: a big closure makes 18,000 of them.
_EVERY = 16

#: What a cache has below its own URL (Nix: "Serving a Nix store via HTTP").
_IN_A_CACHE = re.compile(r"/(?:[0-9a-z]{32}\.(?:narinfo|ls)|nix-cache-info|(?:nar|log|realisations|debuginfo)/[^/]*)$")

#: So many lines of the log are kept, in case one says why a path can't be had.
_KEPT_LINES = 64


class Activities:
    """Follows the activities of one request and sums up what they report."""

    def __init__(self, sink: progress.ProgressSink, stage: str) -> None:
        self._sink = sink
        self._stage = stage
        self._types: dict[int, int] = {}
        self._transferred: dict[int, int] = {}
        self._copied: dict[int, int] = {}
        self._expected: dict[int, int] = {}
        self._lines: collections.deque[str] = collections.deque(maxlen=_KEPT_LINES)
        self._paths = (0, 0)
        self._detail = ""
        self._count = 0
        self._asked: dict[str, None] = {}

    @property
    def fetched_bytes(self) -> int:
        """Compressed bytes that were fetched over the network."""
        return sum(self._transferred.values())

    @property
    def copied_bytes(self) -> int:
        """Bytes of archives, unpacked, that came into the store; a cache in a directory is read without transfers."""
        return sum(self._copied.values())

    @property
    def caches(self) -> tuple[str, ...]:
        """The caches that were asked, in their order; one that answered a while ago may not be asked again."""
        return tuple(self._asked)

    def said_about(self, word: str) -> str:
        """The last line of the log that has a word in it, or an empty string."""
        return next((line for line in reversed(self._lines) if word in line), "")

    def line(self, text: str) -> None:
        """A line for a person."""
        self._lines.append(text.removeprefix("warning: "))

    def started(self, number: int, kind: int, fields: list[int | str]) -> None:
        """An activity began."""
        self._types[number] = kind
        if kind in {_SUBSTITUTE, _COPY_PATH} and fields and isinstance(fields[0], str):
            self._detail = fields[0].rpartition("/")[2]
        # Where from: the second field, or, where something is transferred, the URL of that.
        where = fields[1:2] if kind in {_SUBSTITUTE, _COPY_PATH, _QUERY_PATH_INFO} else fields[:1]
        if kind in {_SUBSTITUTE, _COPY_PATH, _QUERY_PATH_INFO, _FILE_TRANSFER}:
            self._asked.update((_cache(text), None) for text in where if isinstance(text, str) and "://" in text)

    def result(self, number: int, kind: int, fields: list[int | str]) -> None:
        """An activity reported something."""
        activity = self._types.get(number)
        figures = [field for field in fields if isinstance(field, int)]
        if kind == _PROGRESS and activity == _COPY_PATHS and len(figures) >= 2:
            if self._paths != (figures[0], figures[1]):
                self._paths = (figures[0], figures[1])
                self._sink(progress.Progress(self._stage, *self._paths, "paths", self._detail))
        elif kind == _PROGRESS and activity in {_FILE_TRANSFER, _COPY_PATH} and figures:
            (self._transferred if activity == _FILE_TRANSFER else self._copied)[number] = figures[0]
            self._tell_bytes()
        elif kind == _SET_EXPECTED and len(figures) >= 2:
            self._expected[figures[0]] = figures[1]

    def _tell_bytes(self) -> None:
        self._count += 1
        if self._count % _EVERY == 1:
            kind, done = (_FILE_TRANSFER, self.fetched_bytes) if self._transferred else (_COPY_PATH, self.copied_bytes)
            self._sink(progress.Progress(self._stage, done, self._expected.get(kind, 0), "bytes", self._detail))


def _cache(url: str) -> str:
    """The cache that a URL belongs to, without what may be secret in it."""
    scheme, _, rest = url.partition("://")
    rest = _IN_A_CACHE.sub("", rest.partition("?")[0]).rstrip("/")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
