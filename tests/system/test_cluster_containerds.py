"""k3s's own test of its nix snapshotter, from an empty directory to nothing left, with each containerd that kubelets of today work with."""

import json
import subprocess
import time
from pathlib import Path

import pytest

from nixlet.host import mounts, network
from support import kubernetes, nodes, parts, storeimages

pytestmark = pytest.mark.timeout(600)

#: Seconds from an empty directory to a node that is ready: generous, a quiet machine takes a fifth of it.
READY_SECONDS = 60


@pytest.mark.parametrize("version", [each for each in parts.CONTAINERD_PARAMETERS if "1.6.20" not in each.values])
def test_a_cluster_runs_k3ss_own_pod_and_leaves_nothing(
    version: str, tmp_path: Path, archive: Path, archives: Path
) -> None:
    made = kubernetes.Cluster(
        60 + parts.CONTAINERDS.index(version), tmp_path, "--containerd", str(parts.containerd(version))
    )
    with kubernetes.cleaned_up(made):
        begun = time.monotonic()
        made.start()
        made.await_node()
        took = time.monotonic() - begun
        print(f"from nothing to Ready: {took:.1f} s, containerd {version}")
        assert took < READY_SECONDS
        runs_k3ss_own_pod(made, archive)
        kubelet_asks_our_image_service(made)
        nothing_is_left_after_uninstall(made, archives)


def runs_k3ss_own_pod(cluster: kubernetes.Cluster, archive: Path) -> None:
    cluster.kubectl(
        "run", "nix-hello", f"--image=nix:0{archive}", "--image-pull-policy=Always", "--restart=Never"
    )  # fmt: skip
    cluster.await_phase("nix-hello", "Succeeded")
    assert cluster.kubectl("logs", "nix-hello") == "Hello, world!\n"


def kubelet_asks_our_image_service(cluster: kubernetes.Cluster) -> None:
    (node,) = cluster.get("nodes")["items"]
    name = node["metadata"]["name"]
    answer = json.loads(cluster.kubectl("get", "--raw", f"/api/v1/nodes/{name}/proxy/configz"))
    config = answer["kubeletconfig"]
    assert config["imageServiceEndpoint"] == f"unix://{cluster.node_socket}"
    assert config["containerRuntimeEndpoint"] == f"unix://{cluster.containerd_socket}"
    assert node["spec"]["podCIDR"]


def nothing_is_left_after_uninstall(cluster: kubernetes.Cluster, archives: Path) -> None:
    """Of a pod that has ended, and of one that runs with mounts and a port of the node."""
    image = storeimages.make(archives, 3)
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "mounts"},
        "spec": {
            "containers": [
                {
                    "name": "main",
                    "image": image.reference,
                    "command": ["/bin/sleep", "1000"],
                    "ports": [{"containerPort": 80, "hostPort": 8765}],
                    "volumeMounts": [{"name": "memory", "mountPath": "/memory"}],
                }
            ],
            "volumes": [{"name": "memory", "emptyDir": {"medium": "Memory"}}],
        },
    }
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps(pod).encode())
    cluster.kubectl("create", "service", "clusterip", "some", "--tcp=80:80")
    cluster.await_phase("mounts", "Running")
    kubelet = cluster.data_dir / "agent" / "kubelet"
    assert [each for each in mounts.below(str(kubelet)) if each.fstype == "tmpfs"]
    assert cluster.cgroups("kubepods")
    assert "kube-proxy" in cluster.packet_tables()
    assert list(Path("/var/log/pods").glob("default_mounts_*"))
    assert cluster.stop() == 0
    printed = cluster.ok("uninstall", "--data-dir", str(cluster.data_dir), "--yes")
    assert str(cluster.kubeconfig) in printed
    assert not cluster.data_dir.exists()
    assert not cluster.state_dir.exists()
    assert not cluster.kubeconfig.exists()
    assert cluster.mounts() == []
    assert nodes.processes_below(cluster.state_dir) == []
    assert cluster.cgroups("kubepods") == []
    assert "kube-proxy" not in cluster.packet_tables()
    assert cluster.packet_rules() == []
    for program in ("iptables-save", "ip6tables-save"):
        assert "KUBE" not in subprocess.run([program], capture_output=True, text=True, check=True).stdout
    assert not network.bridge_exists(cluster.bridge)
    # (The kubelet itself removes those of pods that are gone, a minute later.)
    for name in ("mounts", "nix-hello"):
        assert not list(Path("/var/log/pods").glob(f"default_{name}_*"))
        assert not list(Path("/var/log/containers").glob(f"{name}_default_*"))
