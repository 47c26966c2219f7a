"""The disk of a cluster's state gets full, or its database reaches its quota: it is told, pods go on, and so does the cluster when there is room."""

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import disks, kubernetes, storeimages

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

#: How large etcd's database may get (bytes).
QUOTA = 24 << 20


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kubernetes.Cluster]:
    """A cluster whose etcd has a small disk of its own."""
    arguments = ("--disable", "coredns", "--etcd-arg", f"quota-backend-bytes={QUOTA}")
    made = kubernetes.Cluster(69, tmp_path_factory.mktemp("cluster"), *arguments)
    (made.data_dir / "server").mkdir(parents=True)
    with disks.disk("ext4", database(made), 384), kubernetes.cleaned_up(made):
        made.start()
        made.await_node()
        yield made


def database(cluster: kubernetes.Cluster) -> Path:
    return cluster.data_dir / "server" / "db"


def ready(cluster: kubernetes.Cluster) -> str:
    """Whether the node is ready, and why not."""
    argv = ["curl", "-s", "--unix-socket", str(cluster.state_dir / "health.sock"), "http://localhost/readyz?verbose"]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def found(cluster: kubernetes.Cluster, name: str) -> dict[str, Any]:
    """What doctor finds of a thing."""
    findings = json.loads(cluster.run("doctor", *cluster.arguments, "--output", "json").stdout)
    (one,) = [each for each in findings if each["name"] == name and each["group"] in {"Kubernetes", "children"}]
    return dict(one)


def test_a_full_disk(cluster: kubernetes.Cluster, archives: Path) -> None:
    image, place = storeimages.make(archives, 3), database(cluster)
    cluster.kubectl(
        "run", "steady", f"--image={image.reference}", "--restart=Never", "--command", "--", "/bin/sleep", "1000"
    )  # fmt: skip
    cluster.await_phase("steady", "Running")
    before = cluster.get("pod", "steady")["status"]["containerStatuses"][0]
    assert cluster.keeps("before")
    disks.fill(place)
    sentence = f"the file system of {place} is full, and the cluster takes no changes until there is room: etcd ended"
    kubernetes.until(lambda: sentence in ready(cluster), f"it is told: {cluster.log}")
    assert f"[-]disk failed: {place} is full" in ready(cluster)
    assert sentence in cluster.log.read_text()
    assert not cluster.keeps("meanwhile")
    for name, words in (("datastore", f"the disk is full: 0.0 GiB free at {place}"), ("etcd", sentence)):
        told = found(cluster, name)
        assert told["status"] == "missing", told
        assert words in told["evidence"]
    # What runs goes on.
    running = before["containerID"].removeprefix("containerd://")
    assert running in cluster.crictl("ps", "-q", "--no-trunc").split()
    disks.make_room(place)
    kubernetes.until(lambda: cluster.keeps("after"), f"the cluster goes on: {cluster.log}")
    cluster.await_node()
    names = {each["metadata"]["name"] for each in cluster.get("configmaps")["items"]}
    assert names.issuperset({"before", "after"})
    kubernetes.until(lambda: "readyz check passed" in ready(cluster), "the node is well")
    after = cluster.get("pod", "steady")["status"]["containerStatuses"][0]
    assert (after["containerID"], after["restartCount"]) == (before["containerID"], 0)


def test_a_database_that_has_reached_its_quota(cluster: kubernetes.Cluster, tmp_path: Path) -> None:
    file = tmp_path / "large"
    file.write_text("x" * 900_000)
    made: list[str] = []
    refused = ""
    while not refused:
        assert len(made) < 2 * QUOTA // 900_000
        made.append(f"large-{len(made)}")
        argv = ["create", "configmap", made[-1], f"--from-file={file}", "--request-timeout=20s"]
        refused = "" if cluster.kubectl(*argv, check=False) else cluster.log_of("etcd")
    assert len(made) > 5
    # An etcd that has raised the alarm isn't well, and comes back nevertheless.
    with contextlib.suppress(ProcessLookupError):
        os.kill(cluster.children()["etcd"]["pid"], signal.SIGKILL)
    kubernetes.until(
        lambda: "had reached its quota, and was made smaller" in cluster.log.read_text(), f"it is told: {cluster.log}"
    )
    kubernetes.until(lambda: cluster.children()["etcd"]["state"] == "ready", "etcd is back")
    kubernetes.until(
        lambda: cluster.kubectl("get", "configmaps", "-o", "name", check=False) != "", "the API server answers"
    )
    cluster.kubectl("delete", "configmap", "--ignore-not-found", *made)
    kubernetes.until(lambda: cluster.keeps("at-last"), f"the cluster takes objects again: {cluster.log}")
    kubernetes.until(lambda: "quota" not in ready(cluster), "all is well")
