"""Containers whose roots fuse-overlayfs shows in place of the kernel: with nixlet's own snapshotter, and with containerd's program."""

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nixlet.host import mounts
from support import nodes, parts, storeimages

pytestmark = pytest.mark.slow

DAEMON = "containerd-fuse-overlayfs-grpc"

#: The kind of a container's root, as the container sees it.
ROOT_KIND = [
    "/bin/sh",
    "-c",
    "while read -r _ _ _ _ at _ _ _ kind _; do [ $at = / ] && echo $kind; done </proc/self/mountinfo; :",
]


@contextlib.contextmanager
def made(directory: Path, version: str, *arguments: str) -> Iterator[nodes.Node]:
    node = nodes.Node(50, directory, "--containerd", str(parts.containerd(version)), *arguments)
    node.snapshotter = "fuse-overlayfs"
    with nodes.cleaned_up(node):
        yield node
    # With its mount each of them has ended.
    nodes.until(lambda: not overlays(node), "no fuse-overlayfs is left")


@pytest.fixture(params=parts.CONTAINERD_PARAMETERS)
def fresh(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[nodes.Node]:
    """A node that is not started yet, for each containerd."""
    with made(tmp_path, request.param) as node:
        yield node


@pytest.fixture
def newest(tmp_path: Path) -> Iterator[nodes.Node]:
    with made(tmp_path, parts.CONTAINERDS[-1]) as node:
        yield node


def overlays(node: nodes.Node) -> list[int]:
    """The programs that show a node's containers their roots."""
    return nodes.named(node, "fuse-overlayfs", node.data_dir)


def roots(node: nodes.Node) -> list[str]:
    return [entry.path for entry in mounts.below(str(node.state_dir)) if entry.fstype == "fuse.fuse-overlayfs"]


def finding(node: nodes.Node, name: str) -> dict[str, str]:
    """What doctor says of one thing."""
    done = node.run("doctor", "--json", "--snapshotter", node.snapshotter, *node.arguments)
    found: list[dict[str, str]] = json.loads(done.stdout)
    (one,) = (each for each in found if each["name"] == name)
    return one


def test_ordinary_images_and_images_of_store_paths(
    fresh: nodes.Node, ordinary: Path, store_images: dict[int, storeimages.StoreImage]
) -> None:
    node, image = fresh, store_images[50]
    node.start()
    node.ok("image", "load", str(ordinary))
    assert node.ok("run", "--rm", "localhost/ordinary:1", *ROOT_KIND).split() == ["fuse.fuse-overlayfs"]
    assert node.ok("run", "--rm", image.reference, "--", *ROOT_KIND).split() == ["fuse.fuse-overlayfs"]
    # A pod's file system is its own, and what it writes stays in it.
    script = "cat /$0 2>/dev/null; echo written >/$0 && rm /bin/ls && cat /$0"
    for _ in range(2):
        assert node.ok("run", "--rm", "localhost/ordinary:1", "/bin/sh", "-c", script, "new").split() == ["written"]
    listed = node.ok("run", "--rm", image.reference, "--", "/bin/ls", "/nix/store").split()
    assert sorted(listed) == sorted(path.name for path in image.paths)
    assert node.ok("run", "--rm", image.reference, "--", "/bin/cat", image.link) == "a plain file\n"
    nodes.until(lambda: not overlays(node), "each ends with its container")
    assert roots(node) == []


def test_what_goes_on_without_the_node(newest: nodes.Node, store_images: dict[int, storeimages.StoreImage]) -> None:
    node, image = newest, store_images[50]
    node.start()
    script = "while [ ! -e /go ]; do sleep 0.1; done; cat $0; exec sleep 1000"
    node.ok("run", "-d", "--name", "kept", image.reference, "--", "/bin/sh", "-c", script, image.link)
    before = overlays(node)
    # The pod's, and the container's.
    assert len(before) == len(roots(node)) > 0
    for end in (node.kill, node.stop):
        end()
        assert (overlays(node), len(roots(node))) == (before, len(before))
        node.start()
    # Views are taken away with the node: whoever shows a root has them open.
    node.ok("exec", "kept", "/bin/sh", "-c", "echo >/go")
    nodes.until(lambda: node.ok("logs", "kept") == "a plain file\n", "what was never read before is there")
    node.ok("rm", "-f", "kept")
    nodes.until(lambda: not overlays(node), "each ends with its container")
    assert roots(node) == []
    assert node.stop() == 0
    assert node.mounts() == []


def test_a_root_whose_program_was_killed_is_cleaned_up(newest: nodes.Node, ordinary: Path) -> None:
    node = newest
    node.start()
    node.ok("image", "load", str(ordinary))
    for name in ("broken", "whole"):
        node.ok("run", "-d", "--name", name, "localhost/ordinary:1", "/bin/sleep", "1000")
    (broken,) = (each["id"] for each in json.loads(node.ok("ps", "--output", "json")) if each["name"] == "broken")
    (root,) = (each for each in roots(node) if broken in each)
    (pid,) = (each for each in overlays(node) if root in Path(f"/proc/{each}/cmdline").read_text())
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(OSError, match=r"not connected|connection abort"):
        os.listdir(root)
    assert node.ok("exec", "whole", "/bin/echo", "goes on") == "goes on\n"
    node.ok("rm", "-f", "broken", "whole")
    nodes.until(lambda: not roots(node), "both roots are gone")
    assert node.ok("run", "--rm", "localhost/ordinary:1", "/bin/echo", "next") == "next\n"


def test_a_node_that_was_killed_with_its_pods_is_uninstalled(
    newest: nodes.Node, store_images: dict[int, storeimages.StoreImage]
) -> None:
    node = newest
    node.start()
    node.ok("run", "-d", "--name", "left", store_images[1].reference, "--", "/bin/sleep", "1000")
    assert roots(node)
    node.kill()
    # As after a crash of the machine's service manager: the shims go as well.
    for pid in nodes.named(node, "containerd-shim"):
        os.kill(pid, signal.SIGKILL)
    node.ok("uninstall", "--yes", "--data-dir", str(node.data_dir))
    assert node.mounts() == []
    nodes.until(lambda: not overlays(node), "each ends with its mount")
    assert not node.data_dir.exists()


def test_store_paths_by_bind_mounts(tmp_path: Path, store_images: dict[int, storeimages.StoreImage]) -> None:
    image = store_images[50]
    with made(tmp_path, parts.CONTAINERDS[-1], "--strategy", "bind") as node:
        node.start()
        assert node.ok("run", "--rm", image.reference, "--", "/bin/cat", image.link) == "a plain file\n"
        listed = node.ok("run", "--rm", image.reference, "--", "/bin/ls", "/nix/store").split()
        assert sorted(listed) == sorted(path.name for path in image.paths)
        nodes.until(lambda: not overlays(node), "each ends with its container")
        assert node.stop() == 0
        assert node.mounts() == []


def test_where_the_kernels_overlayfs_has_no_roots(
    tmp_path: Path, ordinary: Path, store_images: dict[int, storeimages.StoreImage]
) -> None:
    """On an overlay, as a container's own root is."""
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    merged, image = tmp_path / "merged", store_images[50]
    options = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    mounts.mount("overlay", str(merged), "overlay", 0, options)
    try:
        with made(merged, parts.CONTAINERDS[-1]) as node:
            node.snapshotter = "nix"
            assert node.launch().wait(60) == 125
            assert "containers can't be given a root file system" in node.log.read_text()
            node.snapshotter = "fuse-overlayfs"
            node.start()
            node.ok("image", "load", str(ordinary))
            assert node.ok("run", "--rm", "localhost/ordinary:1", "/bin/echo", "ordinary") == "ordinary\n"
            assert node.ok("run", "--rm", image.reference, "--", "/bin/cat", image.link) == "a plain file\n"
            assert node.stop() == 0
    finally:
        mounts.unmount(str(merged))


def with_daemon(node: nodes.Node) -> None:
    """Have containerd's program where a node finds it."""
    node.environment["PATH"] = os.pathsep.join((str(parts.directories()["fuse-overlayfs"]), os.environ["PATH"]))


def test_containerds_own_program(fresh: nodes.Node, ordinary: Path, hello: str) -> None:
    node = fresh
    with_daemon(node)
    node.start()
    assert node.children()[DAEMON]["state"] == "ready"
    node.ok("image", "load", str(ordinary))
    assert node.ok("run", "--rm", "localhost/ordinary:1", *ROOT_KIND).split() == ["fuse.fuse-overlayfs"]
    done = node.run("run", "--rm", hello)
    assert done.returncode == 125
    assert "which the snapshotter fuse-overlayfs can't run" in done.stderr.decode()
    assert finding(node, "snapshotter")["evidence"] == (
        f"fuse-overlayfs, served by {DAEMON}, leaves one fuse-overlayfs for each container that runs"
    )
    node.ok("run", "-d", "--name", "kept", "localhost/ordinary:1", "/bin/sleep", "1000")
    # It dies: containers and containerd go on, and so do new containers when it is back.
    containerd = node.children()["containerd"]["pid"]
    pid = node.children()[DAEMON]["pid"]
    os.kill(pid, signal.SIGKILL)
    nodes.until(lambda: node.children()[DAEMON]["pid"] not in {0, pid}, "it is started again")
    nodes.until(lambda: node.children()[DAEMON]["state"] == "ready", "it is ready again")
    assert node.children()["containerd"]["pid"] == containerd
    assert node.ok("exec", "kept", "/bin/echo", "goes on") == "goes on\n"
    # (a containerd that was refused a connection waits a second for its next try)
    nodes.until(
        lambda: node.run("run", "--rm", "localhost/ordinary:1", "/bin/echo", "next").stdout == b"next\n",
        "the next one runs",
    )
    # So does the node; the program goes with it.
    nodes.until(lambda: len(overlays(node)) == 2, "those of the pod that is kept are left")
    running = overlays(node)
    node.kill()
    nodes.until(lambda: not nodes.named(node, DAEMON), "it goes with its node")
    node.start()
    assert overlays(node) == running
    node.ok("rm", "-f", "kept")
    nodes.until(lambda: not overlays(node), "each ends with its container")
    assert node.stop() == 0
    assert node.mounts() == []


def test_who_has_made_the_snapshots_goes_on_with_them(newest: nodes.Node, ordinary: Path) -> None:
    node = newest
    node.start()
    node.ok("image", "load", str(ordinary))
    assert node.stop() == 0
    # It comes later, and what there is goes on.
    with_daemon(node)
    node.start()
    assert DAEMON not in node.children()
    assert node.ok("run", "--rm", "localhost/ordinary:1", "/bin/echo", "there") == "there\n"
    assert node.stop() == 0
    root = node.data_dir / "agent/containerd/io.containerd.snapshotter.v1.fuse-overlayfs"
    for name in root.glob("nixlet.db*"):
        name.unlink()
    (root / "metadata.db").touch()
    node.environment["PATH"] = os.environ["PATH"]
    assert node.launch().wait(60) == 125
    assert (
        f'"fuse-overlayfs" snapshotter cannot be enabled for "{node.data_dir}/agent/containerd", try using "native": '
        f"{DAEMON} not installed"
    ) in node.log.read_text()


def test_a_kernel_without_fuse(newest: nodes.Node) -> None:
    """The device is another one, in a mount namespace of the node's own."""
    covered = ["sh", "-c", 'mount --bind /dev/null /dev/fuse && exec "$@"', "sh"]
    newest.wrapper = ["unshare", "--mount", "--propagation", "private", *covered]
    assert newest.launch().wait(60) == 125
    said = newest.log.read_text()
    root = newest.data_dir / "agent" / "containerd"
    assert (
        f'"fuse-overlayfs" snapshotter cannot be enabled for "{root}", try using "native": '
        "fuse-overlayfs not functional, make sure running with kernel >= 4.18: fuse-overlayfs ended with status 1: "
    ) in said
    assert "Traceback" not in said
    assert newest.mounts() == []
    assert subprocess.run(["find", str(root), "-mindepth", "1"], capture_output=True, check=True).stdout == b""
