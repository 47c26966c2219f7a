"""The benchmarks run through, with small numbers: their figures are for the machine they are made on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nixlet.host import mounts
from support import parts

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["calls", "closures", "cluster", "podcost", "ready", "verbs"])
def test_a_benchmark_runs_through_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    families = "".join(f"{family} {directory}\n" for family, directory in parts.directories().items())
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}/tests:{ROOT}/bench", "NIXLET_PARTS": families}
    argv = [sys.executable, f"{ROOT}/bench/{name}.py", "--quick", "--json", f"{tmp_path}/figures.json"]
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())["figures"]
    if name == "calls":
        assert all(row["nixlet"]["p50"] > 0 for row in figures["calls"]["16"].values())
        assert figures["scale"]["nixlet"]["40"]["rss_mb"] > 0
    elif name == "ready":
        (figure,) = figures.values()
        node, bare = figure["rows"].values()
        assert node["median"] > bare["median"] > 0
        assert figure["idle"].keys() == {"nixlet", "containerd"}
    elif name == "cluster":
        (figure,) = figures.values()
        assert min(figure["ready"]["median"], figure["replicas"], figure["agent_ready"]) > 0
        assert figure["server"].keys() >= {"nixlet", "containerd", "etcd", "kube-apiserver", "kubelet"}
        assert figure["agent"].keys() == {"nixlet", "containerd", "kubelet", "kube-proxy"}
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
    # Others mount as well meanwhile; what a benchmark mounts lies below directories of its own.
    assert [entry.path for entry in mounts.table() if f"nixlet-{name}-" in entry.path] == []
    assert not any(Path(f"/run/nixlet-test/{place}").exists() for place in ("b", "15", "16", "17", "18"))
