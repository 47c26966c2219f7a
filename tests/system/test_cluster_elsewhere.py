"""A server without a node of its own, whose cluster's state is in an etcd of somebody's."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import kubernetes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

#: Where that etcd is.
CLIENTS, PEERS = "http://127.0.0.1:23790", "http://127.0.0.1:23800"


@contextlib.contextmanager
def etcd(directory: Path) -> Iterator[None]:
    """It, for the time of the context; what it has stays for the next."""
    urls = [f"--listen-client-urls={CLIENTS}", f"--advertise-client-urls={CLIENTS}", f"--listen-peer-urls={PEERS}"]
    argv = ["etcd", f"--data-dir={directory}/theirs", *urls]
    with (directory / "etcd.log").open("ab") as log, subprocess.Popen(argv, stdout=log, stderr=log) as process:
        try:
            yield
        finally:
            process.kill()


def test_objects_are_there_and_no_node_is(tmp_path: Path) -> None:
    server = kubernetes.Cluster(62, tmp_path, "--disable-agent", "--datastore-endpoint", CLIENTS)
    with kubernetes.cleaned_up(server):
        with etcd(tmp_path):
            server.start()
            assert {"kube-apiserver", "kube-controller-manager", "kube-scheduler"} <= set(server.children())
            assert not {"etcd", "kine", "kubelet", "kube-proxy"} & set(server.children())
            server.kubectl("create", "configmap", "kept", "--from-literal=a=1")
            server.kubectl("create", "deployment", "waiting", "--image=localhost/none", "--replicas=1")
            assert server.get("nodes")["items"] == []
            # The controllers and the scheduler do what they can.
            kubernetes.until(lambda: "no nodes available" in unscheduled(server), "a pod waits for a node")
            assert not list((server.data_dir / "server/db").glob("*"))
        # It goes, and so does what the API server answers, but for the node, which says so; and it comes back.
        kubernetes.until(lambda: not server.keeps("meanwhile"), "nothing is kept without it")
        assert server.version()["node"] is not None
        with etcd(tmp_path):
            kubernetes.until(lambda: server.keeps("after"), f"the cluster goes on: {server.log}")
            assert server.stop() == 0
            server.start()
            names = {each["metadata"]["name"] for each in server.get("configmaps")["items"]}
            assert {"kept", "after"} <= names


def unscheduled(server: kubernetes.Cluster) -> str:
    """Why a pod is nowhere."""
    pods = server.get("pods", "-l", "app=waiting")["items"]
    said = [each.get("message", "") for pod in pods for each in pod["status"].get("conditions", [])]
    return " ".join(said)
