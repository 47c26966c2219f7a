import re

import pytest

from nixlet.rpc.gen import cri_pb2
from nixlet.telemetry import metrics

assert cri_pb2.DESCRIPTOR.package == "runtime.v1"

#: A line of the text form: a comment, or a sample (https://prometheus.io/docs/instrumenting/exposition_formats/).
LINE = re.compile(
    r'# (HELP|TYPE) [a-z_]+ .+|[a-z_]+(\{([a-z_]+="([^"\\\n]|\\[\\"n])*",?)+\})? (\+Inf|-?[0-9.]+(e[-+]?[0-9]+)?)'
)


def text(*shown: "metrics.Counter | metrics.Gauge | metrics.Histogram") -> list[str]:
    registry = metrics.Registry()
    registry.add(*shown)
    lines = registry.text().splitlines()
    assert [line for line in lines if not LINE.fullmatch(line)] == []
    return [line for line in lines if not line.startswith("#")]


def test_counters() -> None:
    plain, labelled = metrics.Counter("a_total", "A."), metrics.Counter("b_total", "B.", ("x", "y"))
    assert text(plain, labelled) == ["a_total 0"]
    plain.add(amount=2.5)
    labelled.add("1", "2")
    labelled.add("1", "2", amount=3)
    assert text(plain, labelled) == ["a_total 2.5", 'b_total{x="1",y="2"} 4']
    assert labelled.value("1", "2") == 4


def test_gauges_are_read_when_asked() -> None:
    values: dict[tuple[str, ...], float] = {("a",): 1.0}
    gauge = metrics.Gauge("g", "G.", lambda: values, ("l",))
    assert text(gauge) == ['g{l="a"} 1']
    values["b",] = 2.0
    assert text(gauge) == ['g{l="a"} 1', 'g{l="b"} 2']


def test_histograms_add_up() -> None:
    histogram = metrics.Histogram("h_seconds", "H.", ("m",), buckets=(0.1, 1))
    for number in (0.05, 0.1, 0.5, 7):
        histogram.observe(number, "x")
    # A bound is part of its bucket, and each bucket holds all below it.
    assert text(histogram) == [
        'h_seconds_bucket{m="x",le="0.1"} 2',
        'h_seconds_bucket{m="x",le="1"} 3',
        'h_seconds_bucket{m="x",le="+Inf"} 4',
        'h_seconds_sum{m="x"} 7.65',
        'h_seconds_count{m="x"} 4',
    ]


def test_labels_are_escaped() -> None:
    counter = metrics.Counter("a_total", "with \\ and\nnewline", ("x",))
    counter.add('say "no"\\\n')
    assert text(counter) == ['a_total{x="say \\"no\\"\\\\\\n"} 1']


@pytest.mark.parametrize(
    ("code", "shown"),
    [("OK", "OK"), ("NOT_FOUND", "NotFound"), ("CANCELLED", "Canceled"), ("DEADLINE_EXCEEDED", "DeadlineExceeded")],
)
def test_statuses_have_the_names_that_dashboards_know(code: str, shown: str) -> None:
    calls = metrics.RpcMetrics()
    calls.observe("/runtime.v1.ImageService/PullImage", code, 0.002)
    assert text(calls.handled) == [
        f'grpc_server_handled_total{{grpc_service="runtime.v1.ImageService",grpc_method="PullImage",grpc_code="{shown}"}} 1'
    ]
    assert calls.seconds.count("runtime.v1.ImageService", "PullImage") == 1


@pytest.mark.parametrize(("code", "shown"), [("UNIMPLEMENTED", "Unimplemented"), ("CANCELLED", "Canceled")])
def test_methods_that_nobody_serves_make_no_labels(code: str, shown: str) -> None:
    calls = metrics.RpcMetrics()
    for number in range(100):
        calls.observe(f"/any.Service/Method{number}", code, 0.001)
        calls.observe(f"/runtime.v1.ImageService/Method{number}", code, 0.001)
    assert text(calls.handled) == [
        f'grpc_server_handled_total{{grpc_service="unknown",grpc_method="unknown",grpc_code="{shown}"}} 200'
    ]


def test_the_process_tells_of_itself() -> None:
    registry = metrics.Registry()
    registry.add(*metrics.process_metrics("1.2.3"))
    lines = [line.rsplit(" ", 1) for line in registry.text().splitlines() if not line.startswith("#")]
    shown = dict(lines)
    assert shown['nixlet_build_info{version="1.2.3"}'] == "1"
    assert 5e6 < float(shown["process_resident_memory_bytes"]) < 5e9
    assert float(shown["process_cpu_seconds_total"]) > 0
