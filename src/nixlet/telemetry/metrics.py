"""Metrics: counters, gauges and histograms, and their text form for Prometheus.

The form is version 0.0.4 of https://prometheus.io/docs/instrumenting/exposition_formats/. Written here and not taken from
prometheus_client, whose import costs a node a tenth of its memory. Everything happens in the event loop's thread; nothing is
locked. Labels come from small sets that are known before: never a store path, an image or anything else that others choose.
"""

import bisect
import contextlib
import functools
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from google.protobuf import descriptor_pool

#: The media type of the text form.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

#: Seconds: Prometheus's usual buckets, and two more at the low end, where calls of a snapshotter are.
LATENCY_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

#: Seconds: what is fetched over a network takes its time.
PULL_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

Labels = tuple[str, ...]


class _Metric:
    kind = ""

    def __init__(self, name: str, text: str, labels: Sequence[str]) -> None:
        self.name = name
        self._help = text
        self._labels = tuple(labels)

    def lines(self) -> Iterator[str]:
        """The metric's part of the text."""
        yield f"# HELP {self.name} {_escaped(self._help)}"
        yield f"# TYPE {self.name} {self.kind}"
        yield from self._samples()

    def _samples(self) -> Iterable[str]:
        raise NotImplementedError

    def _sample(self, values: Labels, number: float, suffix: str = "", extra: str = "") -> str:
        pairs = [f'{label}="{_escaped(value, quoted=True)}"' for label, value in zip(self._labels, values, strict=True)]
        if extra:
            pairs.append(extra)
        inside = f"{{{','.join(pairs)}}}" if pairs else ""
        return f"{self.name}{suffix}{inside} {_number(number)}"


class Counter(_Metric):
    """A number for each combination of labels, which only grows."""

    kind = "counter"

    def __init__(self, name: str, text: str, labels: Sequence[str] = ()) -> None:
        super().__init__(name, text, labels)
        # One without labels says 0 from the start: what has not happened yet can be told from what isn't counted.
        self._values: dict[Labels, float] = {} if labels else {(): 0}

    def add(self, *labels: str, amount: float = 1) -> None:
        """Count something, under its labels' values in order."""
        self._values[labels] = self._values.get(labels, 0) + amount

    def value(self, *labels: str) -> float:
        """How much was counted."""
        return self._values.get(labels, 0)

    def _samples(self) -> Iterable[str]:
        return (self._sample(labels, value) for labels, value in sorted(self._values.items()))


class Gauge(_Metric):
    """Numbers that are asked for when somebody wants to know, by their labels' values."""

    kind = "gauge"

    def __init__(
        self, name: str, text: str, read: Callable[[], Mapping[Labels, float]], labels: Sequence[str] = ()
    ) -> None:
        super().__init__(name, text, labels)
        self._read = read

    def _samples(self) -> Iterable[str]:
        return (self._sample(labels, value) for labels, value in sorted(self._read().items()))


class CounterOf(Gauge):
    """A counter that somebody else keeps."""

    kind = "counter"


class Histogram(_Metric):
    """How often a number fell below each of some bounds, for each combination of labels."""

    kind = "histogram"

    def __init__(
        self, name: str, text: str, labels: Sequence[str] = (), *, buckets: Sequence[float] = LATENCY_BUCKETS
    ) -> None:
        super().__init__(name, text, labels)
        self._bounds = tuple(buckets)
        self._counts: dict[Labels, list[int]] = {}
        self._sums: dict[Labels, float] = {}

    def observe(self, number: float, *labels: str) -> None:
        """Take up a number; the bucket of a bound holds what is not larger."""
        counts = self._counts.get(labels)
        if counts is None:
            counts = self._counts[labels] = [0] * (len(self._bounds) + 1)
            self._sums[labels] = 0.0
        counts[bisect.bisect_left(self._bounds, number)] += 1
        self._sums[labels] += number

    def count(self, *labels: str) -> int:
        """How many numbers were taken up."""
        return sum(self._counts.get(labels, ()))

    def _samples(self) -> Iterable[str]:
        for labels, counts in sorted(self._counts.items()):
            total = 0
            for bound, count in zip((*self._bounds, float("inf")), counts, strict=True):
                total += count
                yield self._sample(labels, total, "_bucket", f'le="{_number(bound)}"')
            yield self._sample(labels, self._sums[labels], "_sum")
            yield self._sample(labels, total, "_count")


class Registry:
    """All metrics of a process."""

    def __init__(self) -> None:
        self._metrics: list[_Metric] = []

    def add(self, *metrics: _Metric) -> None:
        """Take up metrics, to be shown in this order."""
        self._metrics.extend(metrics)

    def text(self) -> str:
        """All of them, in Prometheus's text form."""
        return "".join(f"{line}\n" for metric in self._metrics for line in metric.lines())


class RpcMetrics:
    """How calls went, under the names that Go's gRPC servers have for it, containerd's among them."""

    def __init__(self) -> None:
        labels = ("grpc_service", "grpc_method")
        self.handled = Counter(
            "grpc_server_handled_total", "RPCs that were answered, by their status.", (*labels, "grpc_code")
        )
        self.seconds = Histogram("grpc_server_handling_seconds", "How long RPCs took.", labels)

    def observe(self, path: str, code: str, seconds: float) -> None:
        """Take up a call that was answered.

        Args:
            path: "/package.Service/Method".
            code: The status's name as gRPC writes it, "NOT_FOUND".
            seconds: How long it took.
        """
        service, method = ("unknown", "unknown") if code == "UNIMPLEMENTED" else _split(path)
        self.handled.add(service, method, _go_code(code))
        self.seconds.observe(seconds, service, method)


@functools.cache
def _go_code(name: str) -> str:
    """The name of a status in Go's gRPC, which Prometheus's dashboards know: NOT_FOUND is NotFound there."""
    if name in {"OK", "CANCELLED"}:
        return {"OK": "OK", "CANCELLED": "Canceled"}[name]
    return "".join(part.capitalize() for part in name.split("_"))


@functools.lru_cache(maxsize=256)
def _split(path: str) -> tuple[str, str]:
    service, _, method = path.lstrip("/").rpartition("/")
    try:
        descriptor_pool.Default().FindMethodByName(f"{service}.{method}")
    except KeyError:
        # Whoever calls may say any name, and each would stay here for good.
        return "unknown", "unknown"
    return service, method


class NodeMetrics:
    """What a node counts."""

    def __init__(self) -> None:
        self.registry = Registry()
        self.rpc = RpcMetrics()
        self.pulls_started = Counter(
            "nixlet_image_pulls_started_total", "Image pulls that began; source is nix or registry.", ("source",)
        )
        self.pulls = Counter(
            "nixlet_image_pulls_total", "Image pulls that ended; status is success or failure.", ("source", "status")
        )
        self.pull_seconds = Histogram(
            "nixlet_image_pull_duration_seconds",
            "How long image pulls that succeeded took.",
            ("source",),
            buckets=PULL_BUCKETS,
        )
        self.realised_paths = Counter("nixlet_realised_paths_total", "Store paths that were fetched or built.")
        self.realised_bytes = Counter(
            "nixlet_realised_bytes_total", "Bytes that were fetched for store paths, compressed where that is known."
        )
        self.registry.add(
            self.rpc.handled,
            self.rpc.seconds,
            self.pulls_started,
            self.pulls,
            self.pull_seconds,
            self.realised_paths,
            self.realised_bytes,
        )

    @contextlib.contextmanager
    def pull(self, source: str) -> Iterator[Callable[[], None]]:
        """Count a pull, "nix" or "registry", for the time of the context; yields what is to be called when it succeeded."""
        self.pulls_started.add(source)
        began = time.perf_counter()
        status = "failure"

        def succeed() -> None:
            nonlocal status
            status = "success"
            self.pull_seconds.observe(time.perf_counter() - began, source)

        try:
            yield succeed
        finally:
            self.pulls.add(source, status)

    def realised(self, paths: int, size: int) -> None:
        """Count store paths that were brought, and their bytes."""
        self.realised_paths.add(amount=paths)
        self.realised_bytes.add(amount=size)


def process_metrics(version: str) -> tuple[_Metric, ...]:
    """What Prometheus's own clients say of their process, and which nixlet this is."""
    started = time.time()

    def cpu() -> Mapping[Labels, float]:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return {(): usage.ru_utime + usage.ru_stime}

    return (
        Gauge(
            "nixlet_build_info", "Always 1; the label says which version this is.", lambda: {(version,): 1}, ["version"]
        ),
        Gauge("process_start_time_seconds", "When this process started (Unix time).", lambda: {(): started}),
        Gauge("process_resident_memory_bytes", "Memory of this process.", _resident_memory),
        CounterOf("process_cpu_seconds_total", "Processor time of this process.", cpu),
    )


def _resident_memory() -> Mapping[Labels, float]:
    with open("/proc/self/statm", encoding="ascii") as file:
        return {(): int(file.read().split()[1]) * resource.getpagesize()}


def _escaped(text: str, *, quoted: bool = False) -> str:
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quoted else text


def _number(value: float) -> str:
    if value == float("inf"):
        return "+Inf"
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(float(value))
