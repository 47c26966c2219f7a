"""What run is told, and what inspect, stats, completion, ctr and crictl tell."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from support import nodes, parts, storeimages

pytestmark = pytest.mark.slow


@pytest.fixture
def image(any_node: nodes.Node, store_images: dict[int, storeimages.StoreImage]) -> str:
    return store_images[50].reference


def inspected(node: nodes.Node, container: str) -> dict[str, Any]:
    (found,) = json.loads(node.ok("inspect", container))
    assert isinstance(found, dict)
    return found


def test_directories_and_files_of_the_host(any_node: nodes.Node, image: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("of the host\n")
    volumes = ["-v", f"{tmp_path}/made:/data", "-v", f"{file}:/file:ro"]
    script = "echo x > /data/new; cat /file; echo y > /file"
    done = any_node.run("run", "--rm", *volumes, image, "--", "/bin/sh", "-c", script)
    assert done.stdout == b"of the host\n"
    assert b"Read-only file system" in done.stderr
    assert (tmp_path / "made" / "new").read_text() == "x\n"
    assert file.read_text() == "of the host\n"
    refused = any_node.run("run", "-v", "data:/data", image)
    assert (refused.returncode, b"there are no named volumes" in refused.stderr) == (2, True)


def test_users_directories_entrypoints_and_read_only_roots(
    any_node: nodes.Node, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["-u", "1000:5", "-w", "/bin", "--read-only", "-e", "FROM_US", "--entrypoint", "/bin/sh"]
    monkeypatch.setitem(any_node.environment, "FROM_US", "ours")
    script = 'echo "$FROM_US" $(pwd); /bin/busybox id; echo > /new || echo refused'
    output = any_node.ok("run", "--rm", *options, image, "-c", script)
    assert output == "ours /bin\nuid=1000 gid=5 groups=5\nrefused\n"
    assert any_node.ok("run", "--rm", "--entrypoint", "", image, "/bin/echo", "alone") == "alone\n"
    assert any_node.run("run", "--rm", "--entrypoint", "", image).returncode == 2


def test_a_container_in_the_background_is_removed_when_it_ends(any_node: nodes.Node, image: str) -> None:

    def there() -> list[str]:
        """The pods of that name, and their logs."""
        logs = (any_node.data_dir / "agent/pods").glob("*_brief_*")
        return [*any_node.crictl("pods", "-q", "--name", "brief").split(), *map(str, logs)]

    container = any_node.ok(
        "run", "-d", "--rm", "--name", "brief", "-i", image, "--", "/bin/sh", "-c", "read x"
    ).strip()
    assert container in any_node.ok("ps", "-aq").split()
    any_node.run("attach", "brief", stdin=b"\n")
    nodes.until(lambda: not there(), "it goes")
    # Who is quicker than the node is no mistake of anybody's.
    any_node.ok("run", "-d", "--rm", "--name", "brief", image, "--", "/bin/sleep", "1000")
    any_node.ok("rm", "-f", "brief")
    assert not there()


@pytest.mark.parametrize(
    ("network", "interfaces"),
    [("none", {"lo"}), ("bridge", {"lo", "eth0"}), ("host", set())],
)
def test_networks(any_node: nodes.Node, image: str, network: str, interfaces: set[str]) -> None:
    rules = any_node.packet_rules()
    any_node.ok("run", "-d", "--name", "networked", "--network", network, image, "--", "/bin/sleep", "1000")
    try:
        assert (any_node.packet_rules() != rules) == (network == "bridge")
        names = set(any_node.ok("exec", "networked", "/bin/ls", "/sys/class/net").split())
        # The host has more, which come and go with pods.
        assert names == interfaces if network != "host" else any_node.bridge in names
        found = inspected(any_node, "networked")["network"]
        assert isinstance(found, dict)
        assert found["mode"] == network
        assert bool(found["addresses"]) == (network == "bridge")
        if network == "none":
            assert any_node.run("exec", "networked", "/bin/busybox", "ping", "-c", "1", "1.1.1.1").returncode != 0
    finally:
        any_node.ok("rm", "-f", "networked")
    assert any_node.packet_rules() == rules


def answer(host: str, port: int) -> bytes:
    """What a server says; it may need a moment to begin."""
    for _ in range(100):
        try:
            with socket.create_connection((host, port), timeout=5) as client:
                return client.recv(100)
        except OSError:
            time.sleep(0.05)
    raise AssertionError(f"nobody answers at {host}:{port}")


def test_ports_of_the_host(any_node: nodes.Node, image: str) -> None:
    script = "while :; do /bin/busybox nc -l -p 80 -e /bin/echo from the container; done"
    server = ["/bin/sh", "-c", script]
    options = ["-p", "127.0.0.1:18931:80", "-p", "18932:53/udp"]
    any_node.ok("run", "-d", "--name", "serving", *options, image, "--", *server)
    try:
        assert answer("127.0.0.1", 18931) == b"from the container\n"
        network = inspected(any_node, "serving")["network"]
        assert isinstance(network, dict)
        assert network["ports"] == ["127.0.0.1:18931->80/tcp", "0.0.0.0:18932->53/udp"]
        twice = any_node.run("run", "--rm", "-p", "18931:80", image, "/bin/true")
        assert (twice.returncode, b"is offered for pod serving already" in twice.stderr) == (125, True)
    finally:
        any_node.ok("rm", "-f", "serving")
    with socket.create_server(("127.0.0.1", 18931)):
        taken = any_node.run("run", "--rm", "-p", "18931:80", image, "/bin/true")
        assert (taken.returncode, b"in use by a program there" in taken.stderr) == (125, True)
    assert any_node.run("run", "--rm", "-p", "18931:80", image, "/bin/true").returncode == 0
    refused = any_node.run("run", "--network", "host", "-p", "1:1", image)
    assert (refused.returncode, b"--publish needs the network of pods" in refused.stderr) == (2, True)


def test_a_port_is_free_for_the_next_as_soon_as_its_container_is_stopped(any_node: nodes.Node, image: str) -> None:
    port = ["-p", "127.0.0.1:18933:80"]
    for name in ("first", "second", "third"):
        any_node.ok("run", "-d", "--name", name, *port, image, "--", "/bin/sleep", "1000")
        any_node.ok("stop", "-t", "0", name)
    any_node.ok("rm", "first", "second", "third")


def test_a_port_and_a_name_are_free_for_the_next_as_soon_as_their_container_has_ended(
    any_node: nodes.Node, image: str
) -> None:
    names = [f"ended-{number}" for number in range(5)]
    for name in names:
        any_node.ok("run", "--name", name, "-p", "127.0.0.1:18934:80", image, "--", "/bin/true")
    any_node.ok("rm", *names)
    for _ in range(5):
        any_node.ok("run", "-d", "--rm", "--name", "again", image, "--", "/bin/sleep", "1000")
        any_node.ok("stop", "-t", "0", "again")
    nodes.until(lambda: any_node.ok("ps", "-a", "-q") == "", "the last one goes")


def test_inspect(any_node: nodes.Node, image: str, tmp_path: Path) -> None:
    any_node.run(
        "run", "--name", "looked-at", "-e", "A=1", "-v", f"{tmp_path}:/x:ro", image, "--", "/bin/sh", "-c", "exit 3"
    )
    try:
        found = inspected(any_node, "looked-at")
        assert (found["name"], found["pod"], found["read_only"]) == ("looked-at", "looked-at", False)
        state, process = found["state"], found["process"]
        assert isinstance(state, dict)
        assert isinstance(process, dict)
        assert (state["status"], state["exit_code"], state["pid"]) == ("exited", 3, 0)
        # containerd notes the start once its shim has answered; so short a command may have ended before.
        assert state["created"] < min(state["started"], state["finished"])
        assert process["args"] == ["/bin/sh", "-c", "exit 3"]
        assert "A=1" in process["env"]
        assert {"host": str(tmp_path), "container": "/x", "read_only": True} in list(found["mounts"])
    finally:
        any_node.ok("rm", "looked-at")
    missing = any_node.run("inspect", "looked-at")
    assert (missing.returncode, missing.stdout) == (125, b"")


def test_stats_in_every_containerd(node: nodes.Node, store_images: dict[int, storeimages.StoreImage]) -> None:
    image = store_images[50].reference
    script = "a=$(/bin/busybox head -c 4000000 /dev/zero | /bin/busybox tr '\\0' x); while :; do :; done"
    node.ok("run", "-d", "--name", "busy", image, "--", "/bin/sh", "-c", script)
    node.ok("run", "-d", "--name", "idle", image, "--", "/bin/sh", "-c", "sleep 1000 & wait")
    try:
        time.sleep(0.5)
        both = json.loads(node.ok("stats", "--no-stream", "--output", "json"))
        busy, idle = sorted(both, key=lambda each: str(each["name"]))
        assert (busy["name"], idle["name"]) == ("busy", "idle")
        assert busy["cpu_percent"] > 10 > idle["cpu_percent"]
        assert busy["memory_bytes"] > 4_000_000 > idle["memory_bytes"] > 0
        assert (busy["pids"], idle["pids"]) == (1, 2)
        table = node.ok("stats", "--no-stream", "idle").splitlines()
        assert [line.split()[1] for line in table] == ["ID", "idle"]
    finally:
        node.ok("rm", "-f", "busy", "idle")


def test_ctr_is_the_one_beside_containerd(tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("containerd", "containerd-shim-runc-v2"):
        shutil.copy(f"/usr/bin/{name}", programs)
    (programs / "ctr").write_text('#!/bin/sh\necho beside "$CONTAINERD_ADDRESS" "$@"\n')
    (programs / "ctr").chmod(0o755)
    node = nodes.Node(35, tmp_path, "--containerd", str(programs / "containerd"))
    assert b"beside" not in node.run("ctr", "version").stdout
    with nodes.cleaned_up(node):
        node.start()
        assert node.ok("ctr", "plugins", "ls") == f"beside {node.containerd_socket} plugins ls\n"


def test_completion(any_node: nodes.Node, image: str) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert "_NIXLET_COMPLETE" in any_node.ok("completion", shell)
    any_node.ok("run", "-d", "--name", "completed", image, "--", "/bin/sleep", "1000")
    try:
        for words, found in (
            ("nixlet ex", {"exec"}),
            ("nixlet run --netw", {"--network"}),
            ("nixlet run --network ho", {"host"}),
            ("nixlet rm compl", {"completed"}),
            ("nixlet exec com", {"completed"}),
            ("nixlet rm other", set()),
        ):
            count = str(len(words.split()) - 1)
            more = {"_NIXLET_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": count}
            argv = [sys.executable, "-m", "nixlet"]
            done = subprocess.run(
                argv, env={**any_node.environment, **more}, capture_output=True, text=True, check=False
            )
            assert {line.partition(",")[2] for line in done.stdout.split()} == found, (words, done.stderr)
    finally:
        any_node.ok("rm", "-f", "completed")


def test_the_real_ctr_and_crictl(
    any_node: nodes.Node, image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "crictl").symlink_to(parts.tool("crictl"))
    monkeypatch.setitem(any_node.environment, "PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setitem(any_node.environment, "NIXLET_DATA_DIR", str(any_node.data_dir))
    # What the environment says of other nodes doesn't count.
    monkeypatch.setitem(any_node.environment, "CONTAINERD_ADDRESS", "/run/other.sock")
    monkeypatch.setitem(any_node.environment, "CONTAINER_RUNTIME_ENDPOINT", "unix:///run/other.sock")
    container = any_node.ok("run", "-d", "--name", "real", image, "--", "/bin/sleep", "1000").strip()
    try:
        assert container in any_node.ok("ctr", "containers", "ls", "-q").split()
        assert container not in any_node.ok("ctr", "-n", "default", "containers", "ls", "-q").split()
        assert "ctr" in any_node.ok("ctr", "--help")
        assert any_node.ok("crictl", "ps", "-q").split() == [container]
        assert "sha256" in any_node.ok("crictl", "pull", image)
        assert any_node.run("crictl", "inspect", "missing").returncode == 1
        monkeypatch.setitem(any_node.environment, "PATH", str(tmp_path))
        missing = any_node.run("crictl", "ps")
        assert (missing.returncode, b"crictl is not installed" in missing.stderr) == (127, True)
    finally:
        monkeypatch.undo()
        any_node.ok("rm", "-f", "real")
