"""Pods in user namespaces of their own: through CRI, and by the real kubelet."""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from support import kubernetes, nodes, parts, storeimages

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

OWNER = 400_000
#: Whether a pod sees its store paths as root's, may read and not write them, and has a root of its own to write to.
SCRIPT = (
    "set -e; cat /proc/self/uid_map; /bin/busybox stat -L -c '%u:%g' / /nix /nix/store /bin/busybox /bin/sh;"
    " echo text >/new; /bin/busybox stat -c '%u:%g' /new"
)
SEEN = ["0:0"] * 6


@pytest.fixture(scope="module", params=["2.2.9", "2.4.2"])
def node(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[nodes.Node]:
    made = nodes.Node(
        *(47, tmp_path_factory.mktemp("userns"), "--containerd", str(parts.containerd(request.param))),
        environment={"PATH": f"{parts.directories()['runc']}:{os.environ['PATH']}"},
    )
    with nodes.cleaned_up(made):
        made.start()
        yield made


@pytest.fixture(scope="module")
def image(archives: Path) -> storeimages.StoreImage:
    return storeimages.make(archives, 5)


def options(number: int) -> dict[str, Any]:
    extents = [{"container_id": 0, "host_id": OWNER + (number << 16), "length": 1 << 16}]
    return {"namespace_options": {"userns_options": {"mode": 0, "uids": extents, "gids": extents}}}


def started(node: nodes.Node, directory: Path, name: str, number: int, image: str, script: str) -> tuple[str, str]:
    """A pod and its container, in a user namespace."""
    pod = {
        "metadata": {"name": name, "namespace": "default", "uid": name, "attempt": 0},
        "log_directory": str(directory / name),
        "linux": {"security_context": options(number)},
    }
    container = {
        "metadata": {"name": "main"},
        "image": {"image": image},
        "command": ["/bin/sh", "-c", script],
        "log_path": "main.log",
        "linux": {"security_context": options(number)},
    }
    for what, config in (("pod", pod), ("container", container)):
        (directory / f"{name}-{what}.json").write_text(json.dumps(config))
    sandbox = node.crictl("runp", str(directory / f"{name}-pod.json")).strip()
    files = (str(directory / f"{name}-{what}.json") for what in ("container", "pod"))
    created = node.crictl("create", sandbox, *files).strip()
    node.crictl("start", created)
    return sandbox, created


def mounted(node: nodes.Node) -> list[str]:
    """What is mounted of a node, but for the views of closures, which stay as long as images."""
    return [path for path in node.mounts() if "/views/" not in path]


def roots(node: nodes.Node) -> list[str]:
    """Where roots of user namespaces are mounted."""
    return [path for path in node.mounts() if path.endswith("/root") and "/snapshots/" in path]


def exit_code(node: nodes.Node, container: str) -> int:
    def status() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(node.crictl("inspect", container))["status"]
        return found

    nodes.until(lambda: status()["state"] == "CONTAINER_EXITED", "the container has ended")
    code: int = status()["exitCode"]
    return code


def state_of(paths: list[Path]) -> list[tuple[str, int, int, str]]:
    """Store paths' files: their owners and content."""
    found = []
    for top in paths:
        for path in sorted([top, *top.rglob("*")]):
            status = path.lstat()
            content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
            found.append((str(path), status.st_uid, status.st_gid, hashlib.sha256(content).hexdigest()))
    return found


def test_a_pod_has_its_closure_as_roots_and_the_store_keeps_its_own(
    node: nodes.Node, image: storeimages.StoreImage, tmp_path: Path
) -> None:
    node.crictl("pull", image.reference)
    paths = [Path(path) for path in image.paths]
    before, mounts = state_of(paths), mounted(node)
    sandbox, container = started(node, tmp_path, "one", 1, image.reference, SCRIPT)
    assert exit_code(node, container) == 0, node.crictl("logs", container)
    seen = node.crictl("logs", container).splitlines()
    assert seen[0].split() == ["0", str(OWNER + (1 << 16)), "65536"]
    assert seen[1:] == SEEN
    node.crictl("rmp", "-f", sandbox)
    node.collect_garbage()
    nodes.until(lambda: not set(mounted(node)) - set(mounts), "the pod's mounts are gone")
    assert state_of(paths) == before


def test_what_it_changes_in_the_store_is_its_own(
    node: nodes.Node, image: storeimages.StoreImage, tmp_path: Path
) -> None:
    """And a program that is made set-user-ID there is its root's, who is nobody outside."""
    node.crictl("pull", image.reference)
    paths = [Path(path) for path in image.paths]
    before = state_of(paths)
    script = "set -e; b=$(/bin/busybox readlink -f /bin/busybox); /bin/busybox chmod 4755 $b; /bin/busybox sleep 1000"
    sandbox, _ = started(node, tmp_path, "changes", 2, image.reference, script)
    tops = [Path(path) for path in roots(node)]
    assert tops
    nodes.until(
        lambda: any(path.lstat().st_mode & 0o4000 for root in tops for path in (root / "nix").rglob("bin/busybox")),
        "the program is set-user-ID",
    )
    changed = [path for root in tops for path in (root / "nix").rglob("bin/busybox")]
    assert {path.lstat().st_uid for path in changed} == {OWNER + (2 << 16)}
    assert state_of(paths) == before
    node.crictl("rmp", "-f", sandbox)


def test_many_pods_each_with_owners_of_its_own_outlive_the_node(
    node: nodes.Node, image: storeimages.StoreImage, tmp_path: Path
) -> None:
    node.crictl("pull", image.reference)
    mounts = mounted(node)

    def start(number: int) -> tuple[str, str]:
        return started(node, tmp_path, f"many-{number}", 10 + number, image.reference, "/bin/busybox sleep 1000")

    with ThreadPoolExecutor(6) as threads:
        made = list(threads.map(start, range(30)))
    assert len(roots(node)) == 60
    node.kill()
    node.start()
    for number, (_, container) in enumerate(made):
        assert node.crictl("exec", container, "/bin/busybox", "cat", "/proc/self/uid_map").split() == [
            "0",
            str(OWNER + ((10 + number) << 16)),
            "65536",
        ]
    node.crictl("rmp", "-f", *(sandbox for sandbox, _ in made))
    node.collect_garbage()
    nodes.until(lambda: not set(mounted(node)) - set(mounts), "the pods' mounts are gone")


def test_a_runtime_that_cant_is_named(image: storeimages.StoreImage, tmp_path: Path) -> None:
    """Debian's runc knows no user namespaces of pods."""
    made = nodes.Node(48, tmp_path, "--containerd", str(parts.containerd("2.4.2")))
    with nodes.cleaned_up(made):
        made.start()
        made.crictl("pull", image.reference)
        with pytest.raises(AssertionError, match="idmap mounts not supported"):
            started(made, tmp_path, "one", 1, image.reference, SCRIPT)
        made.crictl("rmp", "-f", "-a")
        made.collect_garbage()
        nodes.until(lambda: not roots(made), "no root is left")


def test_a_kubelet_gives_each_pod_a_range_of_its_own(image: storeimages.StoreImage, tmp_path: Path) -> None:
    made = kubernetes.Cluster(48, tmp_path, "--containerd", str(parts.containerd("2.4.2")))
    made.environment["PATH"] = f"{parts.directories()['runc']}:{made.environment['PATH']}"
    with kubernetes.cleaned_up(made):
        made.start()
        made.await_node()
        pods = []
        for name in ("a", "b"):
            main: dict[str, Any] = {"name": "main", "image": image.reference, "command": ["/bin/sh", "-c", SCRIPT]}
            volume = {"name": "scratch", "emptyDir": {}}
            main["volumeMounts"] = [{"name": "scratch", "mountPath": "/scratch"}]
            spec = {"hostUsers": False, "restartPolicy": "Never", "containers": [main], "volumes": [volume]}
            pods.append({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec})
        made.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": pods}).encode())
        outside = set()
        for name in ("a", "b"):
            made.await_phase(name, "Succeeded")
            first, *seen = made.kubectl("logs", name).splitlines()
            assert seen == SEEN
            inside, begin, size = map(int, first.split())
            assert (inside, size) == (0, 65536)
            outside.add(begin)
        assert len(outside) == 2
        assert min(outside) >= 65536
