"""The benchmarks run through, with small numbers: their figures are for the machine they are made on."""

from pathlib import Path

import pytest

from support import benchmarks


@pytest.mark.slow
@pytest.mark.timeout(320)
@pytest.mark.parametrize("name", ["calls", "closures", "podcost", "ready", "verbs"])
def test_a_benchmark_runs_through_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    figures = benchmarks.figures(name, tmp_path)
    if name == "calls":
        assert all(row["nixlet"]["p50"] > 0 for row in figures["calls"]["16"].values())
        assert figures["scale"]["nixlet"]["40"]["rss_mb"] > 0
    elif name == "ready":
        (figure,) = figures.values()
        node, bare = figure["rows"].values()
        assert node["median"] > bare["median"] > 0
        assert figure["idle"].keys() == {"nixlet", "containerd"}
    elif name == "podcost":
        (figure,) = figures.values()
        assert len(figure) == 10
        assert all(row["median"] > 0 for steps in figure.values() for row in steps.values())
    elif name == "verbs":
        (figure,) = figures.values()
        tables = [*figure["verbs"].values(), *figure["output"].values(), *figure["load"].values(), figure["crowd"]]
        assert len(tables) == 16
        assert all(len(row) == 2 and all(each["median"] > 0 for each in row.values()) for row in tables)
    else:
        assert (
            figures["beside"]["10"]["nixlet"]["host_mounts"]
            < figures["beside"]["10"]["Go nix-snapshotter"]["host_mounts"]
        )
