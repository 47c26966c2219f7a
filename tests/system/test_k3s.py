"""What k3s tests of its own nix snapshotter, and the two tests that were wished for beside it, on every containerd."""

import json
import time
from pathlib import Path

from support import nodes, registries, storeimages

PORT = 5963


def ctr(node: nodes.Node, *arguments: str) -> str:
    return node.ok("ctr", *arguments)


def run_to_the_end(node: nodes.Node, manifest: bytes) -> dict[str, str]:
    """Play a pod and wait until it has succeeded; its containers' IDs by name."""
    (pod,) = json.loads(node.ok("kube", "play", "--output", "json", "-", stdin=manifest))
    containers = {each["name"]: each["id"] for each in pod["containers"]}
    for _ in range(600):
        listed = json.loads(node.crictl("ps", "-a", "--pod", pod["id"], "-o", "json"))["containers"]
        if {each["state"] for each in listed} == {"CONTAINER_EXITED"}:
            break
        time.sleep(0.05)
    for container in containers.values():
        assert json.loads(node.crictl("inspect", container))["status"]["exitCode"] == 0
    return containers


def closures_of(node: nodes.Node, container: str) -> tuple[set[str], str]:
    """The store paths that the layers of a container's snapshot bring along, and the options of its mount."""
    key = json.loads(ctr(node, "containers", "info", container))["SnapshotKey"]
    mounted = ctr(node, "snapshots", "--snapshotter", "nix", "mounts", "/target", key)
    found: set[str] = set()
    layers = 0
    while key:
        info = json.loads(ctr(node, "snapshots", "--snapshotter", "nix", "info", key))
        closure = info.get("Labels", {}).get("containerd.io/snapshot/nix-closure")
        if closure and info["Kind"] == "Committed":
            found |= set((Path(closure) / "store-paths").read_text().split())
        key = info.get("Parent", "")
        layers += 1
    assert 2 <= layers < 100
    return found, mounted


def test_the_pod_of_k3ss_own_test(node: nodes.Node, archive: Path, hello: str) -> None:
    """Image archive in /tmp, pull policy Always: the pod succeeds, says hello, and its mounts come from the closure."""
    manifest = nodes.manifest("nix-hello", f"nix:0{archive}", container={"imagePullPolicy": "Always"})
    container = run_to_the_end(node, manifest)["main"]
    assert node.ok("logs", container) == "Hello, world!\n"
    closure, mounted = closures_of(node, container)
    assert any(path.endswith("-hello") or "-hello-" in path for path in closure)
    # One overlay, with the view of that closure among its layers.
    (view,) = [layer for layer in mounted.split("lowerdir=")[1].replace('"', ":").split(":") if "/views/" in layer]
    assert mounted.count("mount -t") == 1
    store = Path(view.split(",")[0].strip()) / "nix/store"
    assert {f"/nix/store/{path.name}" for path in store.iterdir()} == closure
    plugins = ctr(node, "plugins", "ls")
    assert [line.split()[-1] for line in plugins.splitlines() if line.split()[1] == "nix"] == ["ok"]


def test_an_image_with_annotations_from_a_registry(node: nodes.Node, tmp_path: Path, archives: Path) -> None:
    image = storeimages.make(archives, 12)
    reference = f"127.0.0.1:{PORT}/nix:1"
    with registries.running(tmp_path, PORT) as registry:
        registry.push(image.archive, "nix:1")
        manifest = nodes.manifest(
            "from-registry", reference, command=["/bin/ls", "/nix/store"], container={"imagePullPolicy": "Always"}
        )
        container = run_to_the_end(node, manifest)["main"]
    assert sorted(node.ok("logs", container).split()) == sorted(path.name for path in image.paths)
    assert closures_of(node, container)[0] == {str(path) for path in image.paths}


def test_nix_and_ordinary_containers_in_one_pod(node: nodes.Node, hello: str, ordinary: Path) -> None:
    node.ok("image", "load", str(ordinary))
    containers = [
        {"name": "nix", "image": hello},
        {"name": "ordinary", "image": "localhost/ordinary:1", "imagePullPolicy": "Never", "command": ["/bin/ls", "/"]},
    ]
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "both"},
        "spec": {"restartPolicy": "Never", "containers": containers},
    }
    made = run_to_the_end(node, json.dumps(pod).encode())
    assert node.ok("logs", made["nix"]) == "Hello, world!\n"
    # No store in the ordinary one.
    assert "bin" in node.ok("logs", made["ordinary"]).split()
    assert "nix" not in node.ok("logs", made["ordinary"]).split()
