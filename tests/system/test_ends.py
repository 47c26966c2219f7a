"""How pods end: what they hold is given back then, and neither a client that goes nor somebody else's patience is in the way."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import nodes, parts, storeimages

pytestmark = pytest.mark.slow

SECONDS = 60.0

#: Says what it was asked to do, and doesn't.
STUBBORN = ("/bin/sh", "-c", "trap 'echo asked' TERM; echo up; while :; do sleep 0.1; done")


@pytest.fixture
def image(store_images: dict[int, storeimages.StoreImage]) -> str:
    return store_images[1].reference


@pytest.fixture(params=[parts.CONTAINERDS[0], parts.CONTAINERDS[-1]])
def own_node(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[nodes.Node]:
    """A node that a test may end."""
    made = nodes.Node(5, tmp_path, "--containerd", str(parts.containerd(request.param)))
    with nodes.cleaned_up(made):
        made.start()
        yield made


def states(node: nodes.Node) -> list[str]:
    return [row["state"] for row in json.loads(node.ok("ps", "-a", "-o", "json"))]


def addresses(node: nodes.Node) -> list[str]:
    return [path.name for path in node.state_dir.glob("cni/*/*") if path.name[0].isdigit()]


@contextlib.contextmanager
def stubborn(node: nodes.Node, image: str) -> Iterator[Callable[[], bytes]]:
    """A container that does not end by itself; gives what it has said."""
    node.ok("run", "-d", "--name", "stubborn", image, "--", *STUBBORN)
    try:
        nodes.until(lambda: node.ok("logs", "stubborn"), "it is up")
        yield lambda: node.run("logs", "stubborn").stdout
    finally:
        node.run("rm", "-f", "stubborn")


def test_a_stop_goes_on_when_its_client_is_interrupted(any_node: nodes.Node, image: str) -> None:
    with stubborn(any_node, image) as said, any_node.started("stop", "-t", "3", "stubborn") as stopping:
        nodes.until(lambda: b"asked" in said(), "it is asked to end")
        stopping.send_signal(signal.SIGINT)
        assert stopping.wait(SECONDS) == 128 + signal.SIGINT
        nodes.until(lambda: states(any_node) == ["exited"], "it is stopped")
        nodes.until(lambda: addresses(any_node) == [], "its network is given back")


def test_who_is_in_a_hurry_does_not_wait_for_the_time_that_somebody_else_gave(any_node: nodes.Node, image: str) -> None:
    manifest = nodes.manifest("stubborn", image, command=STUBBORN, terminationGracePeriodSeconds=600)
    any_node.ok("kube", "play", "-", stdin=manifest)
    nodes.until(lambda: any_node.ok("logs", "stubborn"), "it is up")
    argv = [sys.executable, "-m", "nixlet", "kube", "down", "-"]
    with subprocess.Popen(argv, env=any_node.environment, stdin=subprocess.PIPE) as patient:
        try:
            assert patient.stdin is not None
            patient.stdin.write(manifest)
            patient.stdin.close()
            nodes.until(lambda: b"asked" in any_node.run("logs", "stubborn").stdout, "it is asked to end")
            with any_node.started("rm", "-f", "stubborn") as hurried:
                assert hurried.wait(SECONDS) == 0
            assert patient.wait(SECONDS) == 0
        finally:
            patient.kill()
    assert states(any_node) == []


def test_a_pods_directory_goes_when_nothing_is_mounted_there_any_more(any_node: nodes.Node, image: str) -> None:
    any_node.ok("run", "-d", "--rm", "--name", "held", image, "--", "/bin/sleep", "1000")
    (directory,) = (any_node.data_dir / "agent" / "pods").glob("*_held_*")
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(directory)], check=True)
    try:
        any_node.ok("stop", "-t", "0", "held")
        nodes.until(lambda: f"{directory} is still mounted" in any_node.log.read_text(), "the node says so")
        assert states(any_node) == []
        assert directory.exists()
    finally:
        subprocess.run(["umount", str(directory)], check=True)
    nodes.until(lambda: not directory.exists(), "it goes")


def test_what_has_ended_holds_nothing_also_when_there_was_no_node(
    own_node: nodes.Node, image: str, tmp_path: Path
) -> None:
    node = own_node
    node.ok("run", "-d", "--name", "short", "-p", "18081:80", image, "--", "/bin/sh", "-c", "echo said")
    nodes.until(lambda: addresses(node) == [], "it has given its address back")
    assert states(node) == ["exited"]
    assert node.ok("logs", "short") == "said\n"
    # Its port is free again as well.
    wait = ("/bin/sh", "-c", "until [ -e /data/go ]; do sleep 0.1; done")
    with node.started(
        "run", "--name", "next", "-p", "18081:80", "-v", f"{tmp_path}:/data", image, "--", *wait
    ) as front:
        nodes.until(lambda: "running" in states(node), "it runs")
        node.kill()
        front.wait(SECONDS)
    (tmp_path / "go").touch()
    node.start()
    nodes.until(lambda: states(node) == ["exited", "exited"], "the other one has ended, too")
    nodes.until(lambda: addresses(node) == [], "it has given its address back")
    node.ok("rm", "short", "next")


def test_a_pod_whose_own_process_was_killed_is_removed_with_its_network(node: nodes.Node, image: str) -> None:
    nodes.until(lambda: not node.packet_rules(), "earlier tests' pods are gone")
    networks = set(os.listdir("/run/netns"))
    node.ok("run", "-d", "--name", "beheaded", image, "--", "/bin/sleep", "1000")
    try:
        (pod,) = node.crictl("pods", "-q").split()
        os.kill(json.loads(node.crictl("inspectp", pod))["info"]["pid"], signal.SIGKILL)
        nodes.until(lambda: node.crictl("pods", "-q", "--state", "NotReady") == pod, "containerd knows it")
    finally:
        node.ok("rm", "-f", "beheaded")
    assert node.crictl("pods", "-q") == ""
    assert (addresses(node), node.packet_rules(), set(os.listdir("/run/netns"))) == ([], [], networks)
