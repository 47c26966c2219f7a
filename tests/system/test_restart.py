"""What outlives the node, and what doesn't."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import nodes, parts, storeimages

pytestmark = pytest.mark.slow


@pytest.fixture(params=parts.CONTAINERD_PARAMETERS)
def own_node(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[nodes.Node]:
    """A node that a test may kill."""
    made = nodes.Node(8, tmp_path, "--containerd", str(parts.containerd(request.param)))
    with nodes.cleaned_up(made):
        made.start()
        yield made


def container_pid(node: nodes.Node, container: str) -> int:
    return int(json.loads(node.crictl("inspect", container))["info"]["pid"])


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return "gone"


def test_containers_outlive_a_kill_and_are_taken_up_again(
    own_node: nodes.Node, store_images: dict[int, storeimages.StoreImage]
) -> None:
    node = own_node
    image = store_images[50]
    script = "while :; do echo tick; sleep 0.1; done"
    container = node.ok("run", "-d", "--name", "survivor", image.reference, "--", "/bin/sh", "-c", script).strip()
    pid = container_pid(node, container)
    brief = node.ok("run", "-d", "--rm", "--name", "brief", image.reference, "--", "/bin/sleep", "1000").strip()
    brief_pid = container_pid(node, brief)
    containerd = nodes.named(node, "containerd")
    assert containerd
    node.kill()
    for _ in range(100):
        if all(state(each) in {"gone", "Z"} for each in containerd):
            break
        time.sleep(0.05)
    # containerd goes with its node; the container doesn't.
    assert all(state(each) in {"gone", "Z"} for each in containerd)
    assert state(pid) in {"S", "R"}
    root = Path(f"/proc/{pid}/root/nix/store")
    assert len(list(root.iterdir())) == len(image.paths)

    node.start()
    assert container_pid(node, container) == pid
    listed = json.loads(node.ok("ps", "--output", "json"))
    assert {(each["id"], each["name"], each["state"]) for each in listed} == {
        (container, "survivor", "running"),
        (brief, "brief", "running"),
    }
    # The node knows what it promised before.
    os.kill(brief_pid, signal.SIGKILL)
    for _ in range(200):
        if node.ok("ps", "-aq").split() == [container]:
            break
        time.sleep(0.05)
    assert node.ok("ps", "-aq").split() == [container]
    before = node.ok("logs", "survivor").count("tick")
    for _ in range(100):
        if node.ok("logs", "survivor").count("tick") > before:
            break
        time.sleep(0.05)
    assert node.ok("logs", "survivor").count("tick") > before
    # And a new one starts beside it from the same view.
    assert node.ok("run", "--rm", image.reference, "--", "/bin/cat", image.link) == "a plain file\n"

    node.ok("stop", "-t", "1", "survivor")
    assert state(pid) in {"gone", "Z"}
    assert json.loads(node.ok("ps", "-a", "--output", "json"))[0]["state"] == "exited"
    node.ok("rm", "survivor")
    assert json.loads(node.ok("ps", "-a", "--output", "json")) == []
    assert node.stop() == 0
    assert node.mounts() == []


def test_an_orderly_stop_leaves_running_pods_alone(
    tmp_path: Path, store_images: dict[int, storeimages.StoreImage]
) -> None:
    node = nodes.Node(8, tmp_path)
    with nodes.cleaned_up(node):
        node.start()
        container = node.ok("run", "-d", store_images[1].reference, "--", "/bin/sleep", "1000").strip()
        pid = container_pid(node, container)
        assert node.stop() == 0
        assert state(pid) == "S"
        assert not node.node_socket.exists()
        node.start()
        assert container_pid(node, container) == pid
        node.ok("rm", "-f", container)


def test_the_node_ends_when_containerd_dies_and_says_why(tmp_path: Path) -> None:
    node = nodes.Node(8, tmp_path, "--containerd-restart", "never")
    with nodes.cleaned_up(node):
        node.start()
        (containerd,) = nodes.named(node, "containerd")
        process = node._process
        assert process is not None
        os.kill(containerd, signal.SIGKILL)
        assert process.wait(30) == 125
        assert "containerd was ended by SIGKILL" in node.log.read_text()


def test_a_second_node_on_the_same_directory_is_refused(any_node: nodes.Node) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nixlet", "server", *any_node.arguments],
        env=any_node.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 125
    assert f"is in use by process {any_node.pid}" in done.stderr
    assert "Traceback" not in done.stderr
    assert any_node.version()["node"] is not None
