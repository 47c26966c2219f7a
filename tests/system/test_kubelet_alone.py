"""A node whose kubelet has no cluster: `--kubernetes kubelet`, and static pods."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from nixlet.host import network
from support import kubernetes, nodes, storeimages

pytestmark = pytest.mark.timeout(300)

MINE = """
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
healthzPort: 10349
"""


def test_a_static_pod_without_a_cluster(tmp_path: Path, archives: Path) -> None:
    node = kubernetes.Cluster(72, tmp_path, "--kubernetes", "kubelet")
    # (a person's file, of the kubelet's own configuration)
    mine = node.data_dir / "agent" / "etc" / "kubelet.conf.d" / "50-mine.conf"
    mine.parent.mkdir(parents=True)
    mine.write_text(MINE)
    with kubernetes.cleaned_up(node):
        node.start()
        assert set(node.children()) == {"containerd", "kubelet"}
        runs_while_its_file_is_there(node, storeimages.make(archives, 3).reference)
        doctor_knows_it(node)
        nothing_is_left(node)


def running(node: kubernetes.Cluster) -> str:
    """The container that runs; empty: none does."""
    return node.crictl("ps", "-q", "--no-trunc", "--state", "Running")


def runs_while_its_file_is_there(node: kubernetes.Cluster, image: str) -> None:
    file = static(node, "standing", image)
    kubernetes.until(lambda: running(node) != "", f"the pod runs: {node.log}")
    container = running(node)
    seen = json.loads(node.crictl("inspect", container))["status"]
    assert seen["labels"]["io.kubernetes.pod.name"] == "standing-node-72"
    assert node.crictl("exec", container, "/bin/echo", "inside") == "inside"
    # The kubelet serves nobody but who asks for its health.
    assert subprocess.run(["curl", "-sf", "http://127.0.0.1:10349/healthz"], check=True, capture_output=True).stdout
    assert "10250" not in subprocess.run(["ss", "-ltnH"], check=True, capture_output=True, text=True).stdout
    node.kill()
    node.start()
    kubernetes.until(lambda: node.children()["kubelet"]["state"] == "ready", "the kubelet is back")
    assert running(node) == container
    file.unlink()
    # (what is left of it a kubelet removes within a minute)
    kubernetes.until(lambda: running(node) == "", "the pod goes with its file")
    # One more, for whoever takes the node away.
    static(node, "staying", image)
    kubernetes.until(lambda: running(node) not in {"", container}, f"another pod runs: {node.log}")


def static(node: kubernetes.Cluster, name: str, image: str) -> Path:
    """The manifest of a pod that the kubelet is to run."""
    file = node.data_dir / "agent" / "pod-manifests" / f"{name}.yaml"
    more: dict[str, Any] = {"restartPolicy": "Always", "terminationGracePeriodSeconds": 1}
    file.write_bytes(nodes.manifest(name, image, command=["/bin/sleep", "1000"], **more))
    return file


def doctor_knows_it(node: kubernetes.Cluster) -> None:
    found = json.loads(node.run("doctor", *node.arguments, "--output", "json").stdout)
    ours = {each["name"]: each for each in found if each["group"] == "Kubernetes"}
    assert {name: each["status"] for name, each in ours.items()} == dict.fromkeys(
        ("programs", "settings", "ports", "kubelet"), "ok"
    ), ours
    assert f"its pods' manifests are in {node.data_dir}/agent/pod-manifests" in ours["settings"]["evidence"]


def nothing_is_left(node: kubernetes.Cluster) -> None:
    assert node.stop() == 0
    node.ok("uninstall", "--data-dir", str(node.data_dir), "--yes")
    # What a person put there is theirs.
    left = [str(path.relative_to(node.data_dir)) for path in node.data_dir.rglob("*") if not path.is_dir()]
    assert sorted(left) == ["agent/etc/kubelet.conf.d/50-mine.conf", "agent/pod-manifests/staying.yaml"]
    assert not node.state_dir.exists()
    assert node.mounts() == []
    assert nodes.processes_below(node.state_dir) == []
    assert node.cgroups("kubepods") == []
    assert node.packet_rules() == []
    assert not network.bridge_exists(node.bridge)
    # (The kubelet itself removes those of pods that are gone, a minute later.)
    assert not list(Path("/var/log/pods").glob("default_staying-*"))
