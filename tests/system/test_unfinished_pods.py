"""What was begun of a pod is finished or undone, whatever becomes of the client, of containerd and of the node."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import nodes, parts, storeimages

pytestmark = pytest.mark.slow

SECONDS = 30.0


def until(condition: Callable[[], object], what: str, *, seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not in {seconds} s: {what}"
        time.sleep(0.005)


@pytest.fixture(params=parts.CONTAINERD_PARAMETERS)
def own_node(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[nodes.Node]:
    """A node whose parts a test may kill."""
    made = nodes.Node(6, tmp_path, "--containerd", str(parts.containerd(request.param)))
    with nodes.cleaned_up(made):
        made.start()
        yield made


@pytest.fixture
def image(store_images: dict[int, storeimages.StoreImage]) -> str:
    return store_images[1].reference


def sandboxes(node: nodes.Node) -> set[str]:
    return {path.name for path in node.state_dir.glob("containerd/io.containerd.grpc.v1.cri/sandboxes/*")}


def leases(node: nodes.Node) -> list[str]:
    return [path.name for path in node.state_dir.glob("cni/*/*") if path.name[0].isdigit()]


@contextlib.contextmanager
def begun(node: nodes.Node, image: str, name: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A `run -d` whose sandbox is being made in this moment."""
    before = sandboxes(node)
    argv = [sys.executable, "-m", "nixlet", "run", "-d", "--name", name, image, "--", "/bin/sleep", "1000"]
    with subprocess.Popen(argv, env=node.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            until(lambda: sandboxes(node) - before or process.poll() is not None, "a sandbox is being made")
            yield process
        finally:
            process.kill()


def nothing_is_left(node: nodes.Node) -> bool:
    try:
        return not (
            node.crictl("pods", "-q")
            or leases(node)
            or nodes.named(node, "containerd-shim")
            or list((node.data_dir / "agent" / "pods").iterdir())
            or list(Path("/run/netns").iterdir())
            or node.packet_rules()
        )
    except (AssertionError, OSError):
        # containerd is away.
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_client_that_goes_leaves_nothing(any_node: nodes.Node, image: str, number: int) -> None:
    any_node.ok("run", "--rm", image, "--", "/bin/true")
    with begun(any_node, image, "begun") as process:
        process.send_signal(signal.SIGSTOP)
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        code = process.wait(SECONDS)
    assert code == (-number if number == signal.SIGKILL else 128 + number)
    if number == signal.SIGKILL:
        until(lambda: nothing_is_left(any_node), "all of it is undone")
    assert nothing_is_left(any_node)
    any_node.ok("run", "--rm", "--name", "begun", image, "--", "/bin/true")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_pod_that_is_waited_for_goes_with_its_client(any_node: nodes.Node, image: str, number: int) -> None:
    script = "trap 'exit 0' TERM; echo ready; while true; do sleep 0.1; done"
    manifest = nodes.manifest("waited", image, command=["/bin/sh", "-c", script])
    argv = [sys.executable, "-m", "nixlet", "kube", "play", "--wait", "-"]
    with subprocess.Popen(
        argv, env=any_node.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(manifest)
            process.stdin.close()
            assert process.stdout.readline() == b"ready\n"
            process.send_signal(number)
            code = process.wait(SECONDS)
        finally:
            process.kill()
    assert code == (-number if number == signal.SIGKILL else 128 + number)
    if number == signal.SIGKILL:
        until(lambda: nothing_is_left(any_node), "the pod is gone")
    assert nothing_is_left(any_node)


def test_a_containerd_that_is_killed_leaves_nothing(own_node: nodes.Node, image: str) -> None:
    node = own_node
    node.ok("run", "--rm", image, "--", "/bin/true")
    for delay in (0.0, 0.05, 0.15):
        with begun(node, image, "begun") as process:
            time.sleep(delay)
            (containerd,) = nodes.named(node, "containerd")
            os.kill(containerd, signal.SIGKILL)
            code = process.wait(SECONDS)
        if code == 0:
            until(lambda: node.run("rm", "-f", "begun").returncode == 0, "it is there, and goes")
        until(lambda: nothing_is_left(node), f"all of it is undone ({delay})")


def test_a_node_that_is_killed_leaves_nothing(own_node: nodes.Node, image: str) -> None:
    node = own_node
    node.ok("run", "--rm", image, "--", "/bin/true")
    for delay in (0.0, 0.1):
        with begun(node, image, "begun"):
            time.sleep(delay)
            node.kill()
        node.start()
        until(lambda: nothing_is_left(node), f"all of it is undone ({delay})")


@pytest.fixture(params=parts.CONTAINERD_PARAMETERS)
def interruptible(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[nodes.Node, Path]]:
    """A node whose packet filter is somebody's as long as a file is there, and the file; who wants to delete something notes it there."""
    busy, programs = tmp_path / "busy", tmp_path / "programs"
    programs.mkdir()
    script = f'''#!/bin/sh
case "$0 $* " in *" -D "*|*-restore*) [ -e "{busy}" ] && echo "$0" >> "{busy}" && echo "Resource temporarily unavailable." >&2 && exit 4 ;; esac
exec /usr/sbin/"$(basename "$0")" "$@"
'''
    for name in ("iptables", "iptables-restore"):
        (programs / name).write_text(script)
        (programs / name).chmod(0o755)
    environment = {"PATH": f"{programs}:{os.environ['PATH']}"}
    made = nodes.Node(6, tmp_path, "--containerd", str(parts.containerd(request.param)), environment=environment)
    with nodes.cleaned_up(made):
        made.start()
        yield made, busy


def test_rules_go_also_when_the_packet_filter_was_busy(interruptible: tuple[nodes.Node, Path], image: str) -> None:
    node, busy = interruptible

    def free_again() -> None:
        until(busy.read_text, "somebody wanted to delete a rule")
        busy.unlink()

    for verbs in (["rm -f"], ["stop", "rm"]):
        node.ok("run", "-d", "--name", "held", image, "--", "/bin/sleep", "1000")
        busy.touch()
        with node.started(*verbs[0].split(), "held") as verb:
            free_again()
            verb.communicate(timeout=SECONDS)
        for each in verbs[1:]:
            node.ok(each, "held")
        until(lambda: nothing_is_left(node), f"nothing is left after {verbs}")
    busy.touch()
    node.ok("run", "--rm", image, "--", "/bin/true")
    free_again()
    until(lambda: nothing_is_left(node), "nothing is left after run --rm")


def test_rules_go_also_when_the_node_was_killed_while_the_packet_filter_was_busy(
    interruptible: tuple[nodes.Node, Path], image: str
) -> None:
    node, busy = interruptible
    node.ok("run", "-d", "--name", "held", image, "--", "/bin/sleep", "1000")
    busy.touch()
    with node.started("stop", "held"):
        until(busy.read_text, "somebody wanted to delete a rule")
        node.kill()
    busy.unlink()
    node.start()
    node.ok("rm", "-f", "held")
    until(lambda: nothing_is_left(node), "nothing is left")


def test_ports_are_had_again_when_the_packet_filter_has_given_them_back(
    interruptible: tuple[nodes.Node, Path], image: str
) -> None:
    node, busy = interruptible
    offering = ("-p", "127.0.0.1:18480:80", image, "--", "/bin/sleep", "1000")
    node.ok("run", "-d", "--name", "first", *offering)
    busy.touch()
    node.ok("stop", "-t", "0", "first")
    node.ok("rm", "first")
    until(busy.read_text, "somebody wanted to delete a rule")
    assert node.ok("ps", "-aq") == ""
    for verb in (["logs"], ["exec", "first", "/bin/true"], ["inspect"]):
        gone = node.run(*verb, *(["first"] if len(verb) == 1 else []))
        assert (gone.returncode, b"there is no container first" in gone.stderr) == (125, True), verb
    with node.started("run", "-d", "--name", "second", *offering) as second:
        time.sleep(1)
        assert second.poll() in {None, 125}
        busy.unlink()
        second.communicate(timeout=SECONDS)
    until(
        lambda: node.run("run", "-d", "--name", "third", *offering).returncode == 0 or second.returncode == 0,
        "one runs",
    )
    until(
        lambda: not [each for each in sandboxes(node) if each not in node.crictl("pods", "-q").split()],
        "the first is gone",
    )
    saved = subprocess.run(["iptables-save", "-t", "nat"], capture_output=True, text=True, check=True).stdout
    assert len([line for line in saved.splitlines() if "-j DNAT" in line and ":80" in line]) == 1
    node.ok("rm", "-f", *node.ok("ps", "-q").split())
    until(lambda: nothing_is_left(node), "nothing is left")


def test_what_is_begun_while_a_node_starts_is_not_taken_for_an_earlier_ones(
    own_node: nodes.Node, image: str, tmp_path: Path
) -> None:
    node = own_node
    node.ok("run", "--rm", image, "--", "/bin/true")
    assert node.stop() == 0
    first = {
        "name": "first",
        "image": image,
        "command": ["/bin/sh", "-c", "until [ -e /data/go ]; do sleep 0.1; done"],
        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
    }
    volumes = [{"name": "data", "hostPath": {"path": str(tmp_path)}}]
    manifest = nodes.manifest("web", image, command=["/bin/sleep", "1000"], initContainers=[first], volumes=volumes)
    # A registry that says nothing: what is to be there before the node is ready takes long, while containerd serves already.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        wanted = node.data_dir / "agent" / "images" / "wanted.txt"
        wanted.write_text(f"127.0.0.1:{silent.getsockname()[1]}/never:1\n")
        silent.settimeout(SECONDS)
        node.launch()
        asking, _ = silent.accept()
        argv = [sys.executable, "-m", "nixlet", "kube", "play", "-"]
        with subprocess.Popen(argv, env=node.environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as playing:
            try:
                assert playing.stdin is not None
                playing.stdin.write(manifest)
                playing.stdin.close()
                playing.stdin = None
                time.sleep(3)
                silent.close()
                asking.close()
                node.await_ready()
                (tmp_path / "go").touch()
                said = playing.communicate(timeout=SECONDS)[1].decode()
                assert playing.returncode == 0, said
            finally:
                playing.kill()
    wanted.unlink()
    assert [row["state"] for row in json.loads(node.ok("ps", "-o", "json"))] == ["running"]
    node.ok("kube", "down", "-", stdin=manifest)
    assert nothing_is_left(node)


def test_pods_of_others_are_left_alone(any_node: nodes.Node, image: str, tmp_path: Path) -> None:
    config = {"metadata": {"name": "theirs", "uid": "u-1", "namespace": "default"}, "linux": {}}
    (tmp_path / "pod.json").write_text(json.dumps(config))
    theirs = any_node.crictl("runp", str(tmp_path / "pod.json"))
    try:
        assert any_node.ok("ps", "-aq") == ""
        assert any_node.crictl("pods", "-q") == theirs
    finally:
        any_node.crictl("rmp", "-f", theirs)


def test_a_pod_without_containers_is_listed_stopped_and_removed(any_node: nodes.Node, image: str) -> None:
    container = any_node.ok("run", "-d", "--name", "bare", image, "--", "/bin/sleep", "1000").strip()
    any_node.crictl("rm", "-f", container)
    (row,) = json.loads(any_node.ok("ps", "-a", "-o", "json"))
    assert (row["pod"], row["state"]) == ("bare", "no container")
    assert json.loads(any_node.ok("ps", "-o", "json")) == []
    taken = any_node.run("run", "-d", "--name", "bare", image, "--", "/bin/sleep", "1000")
    assert b"remove it (nixlet rm bare)" in taken.stderr
    any_node.ok("stop", "bare")
    any_node.ok("rm", "bare")
    assert nothing_is_left(any_node)
    assert any_node.run("rm", "bare").returncode == 125


def test_a_pod_whose_network_can_not_be_given_back_is_removed_later(own_node: nodes.Node, image: str) -> None:
    node = own_node
    conflist = node.data_dir / "agent" / "etc" / "cni" / "net.d" / "10-nixlet.conflist"
    node.ok("run", "-d", "--name", "caught", image, "--", "/bin/sleep", "1000")
    aside = conflist.with_name("aside")
    conflist.rename(aside)

    def without_network() -> bool:
        status, text = ask_readyz(node)
        return status == 503 and "[-]network failed: pods get no network" in text

    until(without_network, "readyz says so")
    assert node.run("rm", "-f", "caught").returncode == 125
    assert "caught" in {row["pod"] for row in json.loads(node.ok("ps", "-a", "-o", "json"))}
    aside.rename(conflist)
    until(lambda: ask_readyz(node)[0] == 200, "the network is there again")
    node.ok("rm", "-f", "caught")
    assert nothing_is_left(node)


def ask_readyz(node: nodes.Node) -> tuple[int, str]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(node.state_dir / "health.sock"))
        sock.sendall(b"GET /readyz HTTP/1.1\r\nHost: node\r\n\r\n")
        answer = b""
        while data := sock.recv(1 << 16):
            answer += data
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body.decode()
