"""Whatever of a cluster is killed, while objects are made and pods come and go: its pods go on, and nothing that was acknowledged is lost.

NIXLET_CLUSTER_KILLS says how many rounds; the default is one.
"""

import functools
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

from support import kubernetes, parts, storeimages

ROUNDS = int(os.environ.get("NIXLET_CLUSTER_KILLS", "1"))

#: Pods that run all the while.
LASTING = 5

pytestmark = pytest.mark.timeout(300 + ROUNDS * 300)


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kubernetes.Cluster]:
    containerd = str(parts.containerd(parts.CONTAINERDS[-1]))
    with kubernetes.cleaned_up(
        kubernetes.Cluster(61, tmp_path_factory.mktemp("kills"), "--containerd", containerd)
    ) as made:
        made.start()
        made.await_node()
        yield made


class Load:
    """A client that makes config maps and short pods as fast as they are answered, and remembers what was acknowledged."""

    def __init__(self, cluster: kubernetes.Cluster, image: str) -> None:
        self.cluster = cluster
        self.image = image
        self.config_maps: set[str] = set()
        self.pods: set[str] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._make)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _make(self) -> None:
        number = 0
        while not self._ended.is_set():
            number += 1
            if self._made("create", "configmap", f"kept-{number}", f"--from-literal=number={number}"):
                self.config_maps.add(f"kept-{number}")
            # A pod whose first start is cut off is started again, as the kubelet does it.
            if number % 4 == 0 and self._made(
                "run", f"short-{number}", f"--image={self.image}", "--restart=OnFailure", "--command", "--", "/bin/true"
            ):
                self.pods.add(f"short-{number}")

    def _made(self, *arguments: str) -> bool:
        try:
            argv = [*self.cluster.administrator, *arguments]
            return subprocess.run(argv, capture_output=True, timeout=60, check=False).returncode == 0
        except subprocess.TimeoutExpired:
            return False


def test_kills_under_load(cluster: kubernetes.Cluster, archives: Path) -> None:
    image = storeimages.make(archives, 3).reference
    deployment = ("create", "deployment", "lasting", f"--image={image}", f"--replicas={LASTING}")
    cluster.kubectl(*deployment, "--", "/bin/sleep", "100000")
    kubernetes.until(lambda: len(running(cluster)) == LASTING, "the deployment's pods run")
    before = running(cluster)
    with Load(cluster, image) as load:
        for _ in range(ROUNDS):
            for child in cluster.children():
                kill(cluster, child)
            cluster.kill()
            cluster.start()
            cluster.await_node()
    assert load.config_maps
    assert load.pods
    kept = {each["metadata"]["name"]: each.get("data") for each in cluster.get("configmaps")["items"]}
    assert {name: kept.get(name) for name in load.config_maps} == {
        name: {"number": name.rpartition("-")[2]} for name in load.config_maps
    }
    kubernetes.until(lambda: load.pods <= ended(cluster), "what was acknowledged has run")
    # The same containers: none was started again, none replaced.
    kubernetes.until(lambda: running(cluster) == before, "the deployment's pods are what they were")
    for pod in before:
        kubernetes.until(functools.partial(answers, cluster, pod), f"{pod} answers")
    print(f"{ROUNDS} rounds: {len(load.config_maps)} config maps, {len(load.pods)} pods")


def running(cluster: kubernetes.Cluster) -> dict[str, tuple[str, int]]:
    """The deployment's containers, by pod: ID and restarts."""
    found = {}
    for pod in cluster.get("pods", "--selector=app=lasting")["items"]:
        for status in pod["status"].get("containerStatuses", []):
            if status["ready"] and "running" in status["state"]:
                found[pod["metadata"]["name"]] = (status["containerID"], status["restartCount"])
    return found


def ended(cluster: kubernetes.Cluster) -> set[str]:
    pods = cluster.get("pods")["items"]
    return {pod["metadata"]["name"] for pod in pods if pod["status"].get("phase") == "Succeeded"}


def kill(cluster: kubernetes.Cluster, name: str) -> None:
    """Kill a child, and wait until it is back; what its absence ends is left to come back meanwhile, or when its own turn comes."""
    killed = kubernetes.until(lambda: cluster.ready_child(name), f"{name} is there")
    os.kill(killed, signal.SIGKILL)
    kubernetes.until(lambda: cluster.ready_child(name) not in {0, killed}, f"{name} is back")


def answers(cluster: kubernetes.Cluster, pod: str) -> bool:
    """A kubelet that has just started knows its pods a moment later."""
    return cluster.kubectl("exec", pod, "--", "/bin/echo", "still", check=False) == "still\n"
