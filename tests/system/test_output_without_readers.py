"""A container's output depends on nobody: clients that go, are slow or are cut off, and parts of the node that are restarted."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import nodes, parts, storeimages, terminals

pytestmark = pytest.mark.slow

SECONDS = 60.0

#: Prints for some seconds, more than all pipes on the way hold, and ends with status 7.
COUNTING = "i=0; while [ $i -lt 60 ]; do /bin/busybox seq 1000; sleep 0.05; i=$((i+1)); done; exit 7"
COUNTED = b"".join(b"%d\n" % number for number in range(1, 1001)) * 60

ENDLESS = "while :; do /bin/busybox seq 1000; done"


@pytest.fixture
def image(store_images: dict[int, storeimages.StoreImage]) -> str:
    return store_images[1].reference


@pytest.fixture(params=[parts.CONTAINERDS[0], parts.CONTAINERDS[-1]])
def own_node(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[nodes.Node]:
    """A node whose parts a test may restart."""
    made = nodes.Node(5, tmp_path, "--containerd", str(parts.containerd(request.param)))
    with nodes.cleaned_up(made):
        made.start()
        yield made


def size_of_logs(node: nodes.Node) -> int:
    return sum(path.stat().st_size for path in (node.data_dir / "agent" / "pods").rglob("*.log"))


def kill_containerd(node: nodes.Node) -> None:
    (containerd,) = nodes.named(node, "containerd")
    os.kill(containerd, signal.SIGKILL)


def test_a_reader_that_has_enough_ends_it(node: nodes.Node, image: str) -> None:
    argv = ["run", "--rm", "--name", "enough", image, "--", "/bin/busybox", "seq", "100000"]
    with node.started(*argv) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"1\n"
        process.stdout.close()
        assert process.wait(SECONDS) in {0, 128 + signal.SIGPIPE}
    assert "enough" not in node.ok("ps", "-a")


def test_a_container_goes_on_when_its_client_is_killed_or_does_not_read(node: nodes.Node, image: str) -> None:
    with node.started("run", "--name", "alone", image, "--", "/bin/sh", "-c", ENDLESS) as process:
        assert process.stdout is not None
        process.stdout.read(1 << 20)
        process.kill()
        process.wait(SECONDS)
        before = size_of_logs(node)
        nodes.until(lambda: size_of_logs(node) > before + (1 << 20), "it goes on")
        node.ok("stop", "-t", "1", "alone")
        node.ok("rm", "alone")
    with node.started("run", "--name", "slow", image, "--", "/bin/sh", "-c", ENDLESS) as process:
        nodes.until(lambda: node.ok("ps", "-q"), "it runs")
        time.sleep(1)
        node.ok("rm", "-f", "slow")
        process.communicate(timeout=SECONDS)
        assert process.returncode == 137


def test_a_restart_of_containerd_is_not_noticed_in_front_of_it(own_node: nodes.Node, image: str) -> None:
    with own_node.started("run", "--name", "front", image, "--", "/bin/sh", "-c", COUNTING) as process:
        assert process.stdout is not None
        seen = process.stdout.read(10)
        kill_containerd(own_node)
        assert seen + process.stdout.read() == COUNTED
        assert process.wait(SECONDS) == 7
    assert own_node.run("logs", "front").stdout == COUNTED


def test_a_pod_that_is_waited_for_outlasts_restarts_of_containerd(own_node: nodes.Node, image: str) -> None:
    manifest = nodes.manifest(
        "patient",
        image,
        command=["/bin/sh", "-c", "echo begun; /bin/busybox sleep 4; exit 7"],
        initContainers=[{"name": "first", "image": image, "command": ["/bin/busybox", "sleep", "4"]}],
    )
    path = own_node.state_dir.parent / "patient.json"
    path.write_bytes(manifest)
    with own_node.started("kube", "play", "--wait", str(path)) as process:
        assert process.stdout is not None
        nodes.until(lambda: own_node.ok("ps", "-q"), "the init container runs")
        kill_containerd(own_node)
        assert process.stdout.readline() == b"begun\n"
        kill_containerd(own_node)
        assert process.wait(SECONDS) == 7
    assert json.loads(own_node.ok("ps", "-a", "-o", "json")) == []


def test_a_restart_of_the_node_loses_nothing_and_says_so(own_node: nodes.Node, image: str) -> None:
    with own_node.started("run", "--name", "front", image, "--", "/bin/sh", "-c", COUNTING) as process:
        assert process.stdout is not None
        process.stdout.read(10)
        with own_node.started("logs", "-f", "front") as following:
            assert following.stdout is not None
            following.stdout.read(10)
            assert own_node.stop() == 0
            following.communicate(timeout=SECONDS)
            assert following.returncode == 125
        errors = process.communicate(timeout=SECONDS)[1]
        assert (process.returncode, b"it goes on" in errors) == (125, True)
    own_node.start()
    assert own_node.run("logs", "-f", "front").stdout == COUNTED
    assert json.loads(own_node.ok("inspect", "front"))[0]["state"]["exit_code"] == 7


def test_a_node_ends_although_a_shim_hangs(tmp_path: Path, image: str) -> None:
    made = nodes.Node(5, tmp_path)
    with nodes.cleaned_up(made):
        made.start()
        made.ok("run", "-d", "--name", "hangs", image, "--", "/bin/sleep", "1000")
        (shim,) = nodes.named(made, "containerd-shim-runc-v2")
        os.kill(shim, signal.SIGSTOP)
        try:
            with made.started("rm", "-f", "hangs") as removing:
                time.sleep(1)
                assert removing.poll() is None
                os.kill(made.pid, signal.SIGTERM)
                assert made.stop() == 0
        finally:
            os.kill(shim, signal.SIGCONT)
        made.start()
        made.ok("rm", "-f", "hangs")


def test_attach_leaves_a_container_alone_when_its_terminal_goes(any_node: nodes.Node, image: str) -> None:
    any_node.ok("run", "-dit", "--name", "shell", image, "--", "/bin/sh")
    try:
        with terminals.running(["attach", "shell"], any_node.environment) as terminal:
            # A first line may come before the runtime listens.
            time.sleep(0.5)
            terminal.press(b"echo in''side\r")
            terminal.wait_for(b"inside\r\n")
            terminal.press(b"\x10")
            terminal.press(b"\x11")
            assert terminal.end() == 0
        with terminals.running(["attach", "shell"], any_node.environment) as terminal:
            time.sleep(0.5)
            terminal.press(b"echo a''gain\r")
            terminal.wait_for(b"again\r\n")
            os.kill(terminal.pid, signal.SIGHUP)
            assert terminal.end() == 0
        assert [each["state"] for each in json.loads(any_node.ok("ps", "-o", "json"))] == ["running"]
    finally:
        any_node.ok("rm", "-f", "shell")


def test_what_is_ended_before_it_runs_leaves_nothing(any_node: nodes.Node, image: str) -> None:
    waiting = {"name": "first", "image": image, "command": ["/bin/sleep", "1000"]}
    manifest = nodes.manifest("web", image, command=["/bin/true"], initContainers=[waiting])
    argv = [sys.executable, "-m", "nixlet", "kube", "play", "-"]
    with subprocess.Popen(argv, env=any_node.environment, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(manifest)
        process.stdin.close()
        nodes.until(lambda: any_node.ok("ps", "-q"), "the init container runs")
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 128 + signal.SIGTERM
    assert json.loads(any_node.ok("ps", "-a", "-o", "json")) == []


def test_what_an_init_container_said_that_failed_is_told(any_node: nodes.Node, image: str) -> None:
    failing = {"name": "first", "image": image, "command": ["/bin/sh", "-c", "echo one; echo two; exit 3"]}
    done = any_node.run(
        "kube", "play", "-", stdin=nodes.manifest("web", image, command=["/bin/true"], initContainers=[failing])
    )
    assert done.returncode == 125
    assert done.stderr.decode().splitlines()[-4:] == [
        "error: the init container first ended with status 3",
        "  | one",
        "  | two",
        "hint: mend what it complains of, and play the pod again; nothing of it is left",
    ]


def test_a_pod_that_is_replaced_gets_its_time(any_node: nodes.Node, image: str, tmp_path: Path) -> None:
    script = f"trap 'sleep 1; echo ended > /data/{'{}'}; exit' TERM; echo up; while :; do sleep 0.1; done"
    more: dict[str, Any] = {
        "terminationGracePeriodSeconds": 20,
        "volumes": [{"name": "data", "hostPath": {"path": str(tmp_path)}}],
        "container": {"volumeMounts": [{"name": "data", "mountPath": "/data"}]},
    }
    command = ["/bin/sh", "-c", script.format("first")]
    manifest = nodes.manifest("web", image, command=command, **more)
    any_node.ok("kube", "play", "-", stdin=manifest)
    nodes.until(lambda: any_node.ok("logs", "web"), "it is up")
    any_node.ok("kube", "play", "--replace", "-", stdin=manifest.replace(b"first", b"second"))
    assert (tmp_path / "first").read_text() == "ended\n"
    nodes.until(lambda: any_node.ok("logs", "web"), "it is up")
    any_node.ok("stop", "web")
    assert (tmp_path / "second").read_text() == "ended\n"
    any_node.ok("rm", "web")


def test_logs_have_a_limit_and_are_followed_over_it(
    node: nodes.Node, image: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    version = request.node.callspec.params["node"]
    limits = ("--container-log-max-size", "512Ki", "--container-log-max-files", "3")
    made = nodes.Node(5, tmp_path, "--containerd", str(parts.containerd(version)), *limits)
    # Slow enough for a reader on a busy machine: what is rotated away before it was read is lost to it.
    script = "i=0; while [ $i -lt 60 ]; do /bin/busybox seq 1000; sleep 0.2; i=$((i+1)); done; echo end"
    with nodes.cleaned_up(made):
        made.start()
        made.ok("run", "-d", "--name", "prints", image, "--", "/bin/sh", "-c", script)
        with made.started("logs", "-f", "prints") as following:
            assert following.stdout is not None
            assert following.stdout.read() == COUNTED + b"end\n"
            assert following.wait(SECONDS) == 0
        files = sorted(path.name for path in (made.data_dir / "agent" / "pods").glob("*/prints/*"))
        assert len(files) == 3
        assert files[0] == "0.log"
        kept = made.run("logs", "prints").stdout
        assert (COUNTED + b"end\n").endswith(kept)
        assert 40_000 < len(kept) < len(COUNTED)
        assert made.run("logs", "--tail", "3", "prints").stdout == b"999\n1000\nend\n"


def test_a_verb_says_whom_it_waits_for(any_node: nodes.Node, image: str) -> None:
    (containerd,) = nodes.named(any_node, "containerd")
    os.kill(containerd, signal.SIGSTOP)
    try:
        with any_node.started("ps") as process:
            assert process.stderr is not None
            expected = f"waiting for containerd at {any_node.containerd_socket}, which does not answer\n"
            assert process.stderr.readline().decode() == expected
            os.kill(containerd, signal.SIGCONT)
            assert process.wait(SECONDS) == 0
    finally:
        os.kill(containerd, signal.SIGCONT)
