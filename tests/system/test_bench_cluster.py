"""The benchmark of a cluster runs through, with small numbers."""

from pathlib import Path

import pytest

from support import benchmarks, kubernetes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * kubernetes.PATIENCE)]


def test_it_runs_through_and_leaves_nothing(tmp_path: Path) -> None:
    (figure,) = benchmarks.figures("cluster", tmp_path).values()
    assert min(figure["ready"]["median"], figure["replicas"], figure["agent_ready"]) > 0
    assert figure["server"].keys() >= {"nixlet", "containerd", "etcd", "kube-apiserver", "kubelet"}
    assert figure["agent"].keys() == {"nixlet", "containerd", "kubelet", "kube-proxy"}
