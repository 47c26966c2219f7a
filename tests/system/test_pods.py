"""Pods made of store paths, on every containerd: the hello pod, and what a container costs and sees."""

import json
import os
import re
import subprocess
import time
from pathlib import Path

import pytest

from nixlet.host import mounts
from nixlet.node.images import pause
from support import nodes, storeimages

#: Warnings of containerd that it prints with any configuration on a machine like this.
NOT_OURS = re.compile(
    r"devmapper|zfs|btrfs|blockfile|erofs|cgroup|failed to load plugin|skip loading plugin|deprecat|cleanup|"
    r"cni config load failed|failed to load cni|fsverity|collecting metrics|unable to recover|sandbox|OOM|shim|exit status|nri|NRI",
)


def test_the_hello_pod(node: nodes.Node, hello: str) -> None:
    template = Path("nix/examples/hello-pod.yaml").read_bytes()
    manifest = template.replace(b"@image@", hello.encode())
    output = node.ok("kube", "play", "--replace", "--wait", "--summary", "-", stdin=manifest)
    assert output.startswith("Hello, world!\n")
    assert re.search(r"paths in the closure +7\n", output)
    assert re.search(r"mounts per container +1\n", output)


def test_the_hello_pod_by_crictl(node: nodes.Node, hello: str, tmp_path: Path) -> None:
    """Any client of the CRI: pull, sandbox, container, and the very reference resolves afterwards."""
    image_id = re.search(r"sha256:[0-9a-f]{64}", node.crictl("pull", hello))
    assert image_id is not None
    assert image_id[0] in node.crictl("inspecti", hello)
    listed = {each["id"]: each["repoTags"] for each in json.loads(node.crictl("images", "-o", "json"))["images"]}
    assert f"{hello}:latest" in listed[image_id[0]]
    sandbox = {
        "metadata": {"name": "by-crictl", "namespace": "default", "uid": f"by-crictl-{time.time()}"},
        "log_directory": str(tmp_path),
        "linux": {},
    }
    container = {"metadata": {"name": "hello"}, "image": {"image": hello}, "log_path": "hello.log", "linux": {}}
    (tmp_path / "pod.json").write_text(json.dumps(sandbox))
    (tmp_path / "container.json").write_text(json.dumps(container))
    pod = node.crictl("runp", f"{tmp_path}/pod.json")
    try:
        made = node.crictl("create", pod, f"{tmp_path}/container.json", f"{tmp_path}/pod.json")
        node.crictl("start", made)
        for _ in range(200):
            if "CONTAINER_EXITED" in node.crictl("inspect", made):
                break
            time.sleep(0.05)
        assert (tmp_path / "hello.log").read_text().endswith("stdout F Hello, world!\n")
    finally:
        node.crictl("rmp", "-f", pod)


def test_what_a_container_puts_into_an_empty_volume_gives_nobody_its_rights(
    node: nodes.Node, store_images: dict[int, storeimages.StoreImage]
) -> None:
    """A set-user-ID program of root's on the host, for every local user to find: neither reachable nor of effect."""
    script = "cp /bin/busybox /data/sh; chmod 4755 /data/sh; ls -l /data/sh; cat /proc/self/mountinfo"
    manifest = nodes.manifest(
        "power",
        store_images[50].reference,
        command=["/bin/sh", "-c", script],
        volumes=[{"name": "data", "emptyDir": {}}],
        container={"volumeMounts": [{"name": "data", "mountPath": "/data"}]},
    )
    first, *mounted = node.ok("kube", "play", "--wait", "-", stdin=manifest).splitlines()
    assert first.startswith("-rwsr-xr-x")
    (options,) = [line.split()[5].split(",") for line in mounted if line.split()[4] == "/data"]
    assert {"nosuid", "nodev"} <= set(options)
    assert "noexec" not in options
    # The second has the volumes that images ask for.
    for directory in (node.data_dir / "agent" / "pods", node.data_dir / "agent" / "containerd"):
        assert directory.stat().st_mode & 0o777 == 0o700


def test_the_configuration_is_what_containerd_speaks_and_causes_no_warning(node: nodes.Node) -> None:
    version = node.version()["node"]
    wanted = {"1.6.20": 2, "1.7.35": 2, "2.2.9": 3, "2.4.2": 4}
    assert version["containerd_config_version"] == wanted[version["containerd"]]
    # What it says of its configuration comes before it serves; later lines are about what other tests let it do.
    log = node.containerd_log.read_text().partition("containerd successfully booted")[0]
    assert log
    complaints = [line for line in log.splitlines() if re.search("level=(warning|error)", line)]
    assert not [line for line in complaints if not NOT_OURS.search(line)]
    assert not [
        line
        for line in complaints
        if re.search("config(uration)? (file|migrated|version)|unknown key", line, re.IGNORECASE)
    ]


def test_the_file_system_of_images_is_the_snapshotters(node: nodes.Node) -> None:
    """Through the relay: kubelets watch the disk that this names."""
    answer = json.loads(node.crictl("imagefsinfo"))["status"]["imageFilesystems"][0]
    root = node.data_dir / "agent/containerd/io.containerd.snapshotter.v1.nix"
    assert answer["fsId"]["mountpoint"] == str(root)
    assert root.is_dir()


@pytest.fixture
def sleeping() -> list[str]:
    return ["/bin/sh", "-c", "echo started; exec sleep 1000"]


def started(node: nodes.Node, name: str, image: str, command: list[str]) -> str:
    """Start a pod of one container and wait for its first output; the container's ID."""
    manifest = nodes.manifest(name, image, command=command)
    played = json.loads(node.ok("kube", "play", "--output", "json", "-", stdin=manifest))
    container: str = played[0]["containers"][0]["id"]
    for _ in range(200):
        if "started" in node.ok("logs", container):
            return container
        time.sleep(0.02)
    raise AssertionError(f"{name} printed nothing")


def inside(node: nodes.Node, container: str, *command: str) -> str:
    return node.crictl("exec", "-s", container, *command)


def test_who_is_not_root_sees_and_writes_what_is_theirs(
    any_node: nodes.Node, store_images: dict[int, storeimages.StoreImage]
) -> None:
    """Test nodes are started with umask 077, which is no business of containers."""
    look = "cd /; ls /nix/store >/dev/null && cat /etc/resolv.conf /etc/hosts >/dev/null && : >/data/mine && umask"
    container = {
        "securityContext": {"runAsUser": 1000, "runAsGroup": 1000},
        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
    }
    manifest = nodes.manifest(
        "modes",
        store_images[1].reference,
        command=["/bin/sh", "-c", f"{look} && busybox stat -c %a / /nix /nix/store /data"],
        container=container,
        volumes=[{"name": "data", "emptyDir": {}}],
    )
    printed = any_node.ok("kube", "play", "--wait", "-", stdin=manifest)
    assert printed.split() == ["0022", "755", "755", "755", "777"]


def views(node: nodes.Node) -> set[str]:
    return {place for place in node.mounts() if "/views/" in place}


def view_below(node: nodes.Node, container: str) -> str:
    """The view in a container's only mount."""
    (root,) = [each for each in mounts.below(str(node.state_dir)) if each.path.endswith(f"/{container}/rootfs")]
    (view,) = set(re.findall(r"views/(\d+)/v\b", root.options))
    return str(node.data_dir / f"agent/containerd/io.containerd.snapshotter.v1.nix/views/{view}")


@pytest.mark.parametrize("count", [1, pytest.param(50, marks=pytest.mark.slow), 500])
def test_a_container_is_one_mount_and_sees_its_closure(
    node: nodes.Node,
    count: int,
    store_images: dict[int, storeimages.StoreImage],
    ordinary: Path,
    sleeping: list[str],
) -> None:
    image = store_images[count]
    node.ok("image", "load", str(ordinary))
    try:
        before = set(node.mounts())
        started(node, "plain", "localhost/ordinary:1", sleeping)
        plain = set(node.mounts()) - before
        container = started(node, "nix", image.reference, sleeping)
        nix = set(node.mounts()) - before - plain
        # The view may be there already: it lasts as long as the image, and other tests run it as well.
        assert len(nix - views(node)) == len(plain)
        view = view_below(node, container)
        assert set(os.listdir(f"{view}/v/nix/store")) == {path.name for path in image.paths}

        second = started(node, "again", image.reference, sleeping)
        again = set(node.mounts()) - before - plain - nix
        assert not again & views(node)
        assert len(again) == len(plain)
        assert view_below(node, second) == view

        seen = inside(node, container, "/bin/ls", "-a", "/nix/store").split()
        assert sorted(set(seen) - {".", ".."}) == sorted(path.name for path in image.paths)
        if count > 2:
            assert inside(node, container, "/bin/cat", image.file) == "a plain file"
            assert inside(node, container, "/bin/cat", image.link) == "a plain file"
            assert inside(node, second, "/bin/readlink", image.link) == image.file
    finally:
        node.remove_all_pods()
    assert set(node.mounts()) - before <= views(node)


def test_a_store_path_of_the_host_is_not_visible(
    node: nodes.Node, store_images: dict[int, storeimages.StoreImage], hello: str, sleeping: list[str]
) -> None:
    other = hello.removeprefix("nix:0")
    assert Path(other).exists()
    try:
        container = started(node, "nix", store_images[1].reference, sleeping)
        with pytest.raises(AssertionError, match="No such file"):
            inside(node, container, "/bin/cat", other)
        # Nor by way of what the view is mounted from.
        assert inside(node, container, "/bin/ls", "/").split() == sorted(
            inside(node, container, "/bin/ls", "/").split()
        )
        assert "v" not in inside(node, container, "/bin/ls", "/").split()
    finally:
        node.remove_all_pods()


def test_images_of_the_older_form_run(node: nodes.Node, archives: Path, sleeping: list[str]) -> None:
    image = storeimages.make(archives, 20, closure_form=False)
    try:
        container = started(node, "older", image.reference, sleeping)
        seen = inside(node, container, "/bin/ls", "/nix/store").split()
        assert sorted(seen) == sorted(path.name for path in image.paths)
    finally:
        node.remove_all_pods()


def test_what_a_container_writes_below_the_store_stays_its_own(
    node: nodes.Node, store_images: dict[int, storeimages.StoreImage], sleeping: list[str]
) -> None:
    image = store_images[50]
    try:
        container = started(node, "writer", image.reference, sleeping)
        other = started(node, "reader", image.reference, sleeping)
        inside(node, container, "/bin/sh", "-c", f"echo changed > {image.file}")
        assert inside(node, container, "/bin/cat", image.file) == "changed"
        assert inside(node, other, "/bin/cat", image.file) == "a plain file"
        assert Path(image.file).read_text() == "a plain file\n"
    finally:
        node.remove_all_pods()
    subprocess.run(["nix-store", "--verify-path", image.file, image.paths[0]], check=True)


def test_a_pod_annotation_names_no_store_paths(
    node: nodes.Node, store_images: dict[int, storeimages.StoreImage], hello: str, sleeping: list[str]
) -> None:
    other = hello.removeprefix("nix:0")
    annotations = {
        "containerd.io/snapshot/nix-layer": "true",
        "containerd.io/snapshot/nix-store-path.0": other,
        "containerd.io/snapshot/nix-closure": other,
    }
    manifest = nodes.manifest(
        "annotated", store_images[1].reference, command=sleeping, metadata={"annotations": annotations}
    )
    try:
        played = json.loads(node.ok("kube", "play", "--output", "json", "-", stdin=manifest))
        container = played[0]["containers"][0]["id"]
        seen = inside(node, container, "/bin/ls", "/nix/store").split()
        assert seen == [store_images[1].paths[0].name]
    finally:
        node.remove_all_pods()


def test_nothing_is_left_of_pods_and_images(node: nodes.Node, store_images: dict[int, storeimages.StoreImage]) -> None:
    image = store_images[50]
    node.ok("kube", "play", "--wait", "-", stdin=nodes.manifest("brief", image.reference, command=["/bin/true"]))
    assert list(node.gc_roots.glob("*"))
    for each in json.loads(node.crictl("images", "-o", "json"))["images"]:
        if not each["pinned"]:
            node.crictl("rmi", each["id"])
    # Also where containerd itself doesn't tell which images are pinned.
    node.crictl("rmi", "--prune")
    kept_images = json.loads(node.crictl("images", "-o", "json"))["images"]
    assert [each["repoTags"] for each in kept_images] == [[pause.REFERENCE]]
    for _ in range(300):
        if not views(node):
            break
        time.sleep(0.05)
    assert node.mounts() == [str(node.data_dir / "agent" / "pods")]
    assert not [entry for entry in mounts.table() if str(node.data_dir) in entry.options]
    assert list(node.gc_roots.glob("*")) == []
    assert not list((node.state_dir / "cni").rglob("10.*"))
    assert list((node.data_dir / "agent" / "pods").iterdir()) == []
