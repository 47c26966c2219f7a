"""The units in deploy/, started by a real systemd (systemd.service(5))."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import alone, nodes, storeimages, systemd

pytestmark = pytest.mark.slow

DEPLOY = Path(__file__).parents[2] / "deploy"
NIXLET = Path(sys.executable).parent / "nixlet"


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[systemd.Manager]:
    runtime = Path("/run/nixlet-test/systemd")
    runtime.mkdir(mode=0o700, exist_ok=True)
    made = systemd.Manager(tmp_path / "config", runtime)
    with made.running():
        yield made


def until(holds: Callable[[], object], what: str) -> None:
    for _ in range(600):
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError(what)


def test_pods_outlive_a_node_that_is_killed_restarted_and_stopped(
    tmp_path: Path, manager: systemd.Manager, store_images: dict[int, storeimages.StoreImage]
) -> None:
    node = nodes.Node(7, tmp_path)
    with nodes.cleaned_up(node):
        own = {name: value for name, value in node.environment.items() if name.startswith(("NIX", "PATH"))}
        unit = manager.install(DEPLOY / "nixlet.service", NIXLET, " ".join(node.arguments), own)
        # Type=notify: it is started when it is ready.
        manager.ok("start", unit)
        assert node.version()["node"] is not None
        run = ["run", "-d", "--name", "stays", store_images[1].reference, "--", "/bin/sleep", "1000"]
        container = node.ok(*run).strip()
        pid = json.loads(node.crictl("inspect", container))["info"]["pid"]
        socket = node.node_socket.stat().st_ino
        try:
            first = manager.show(unit, "MainPID")
            os.kill(int(first), signal.SIGKILL)
            until(lambda: manager.show(unit, "MainPID") not in {first, "0"}, "it is started again")
            until(lambda: manager.show(unit, "ActiveState") == "active", "it is ready again")
            manager.ok("restart", unit)
            assert [container.startswith(each) for each in node.ok("ps", "-q").split()] == [True]
            # Kept by the manager all the time: no call was refused.
            assert node.node_socket.stat().st_ino == socket
        finally:
            manager.ok("stop", unit)
        assert Path(f"/proc/{pid}").exists()
        assert manager.show(unit, "Result") == "success"
        # A mistake doesn't mend itself: it isn't started again and again.
        node.arguments.append("--nonsense")
        manager.install(DEPLOY / "nixlet.service", NIXLET, " ".join(node.arguments), own)
        assert manager.systemctl("start", unit).returncode != 0
        time.sleep(3)
        assert manager.show(unit, "ActiveState") == "failed"
        assert manager.show(unit, "NRestarts") == "0"
        node.arguments.pop()
        manager.install(DEPLOY / "nixlet.service", NIXLET, " ".join(node.arguments), own)
        manager.ok("start", unit)
        node.ok("rm", "-f", "stays")
        manager.ok("stop", unit)


def test_a_snapshotter_alone(
    tmp_path: Path, manager: systemd.Manager, store_images: dict[int, storeimages.StoreImage]
) -> None:
    with alone.cleaned_up(4, tmp_path) as place:
        place.snapshotter()
        own = {"PATH": os.environ["PATH"], "NIX_CONFIG": "substituters ="}
        arguments = f"--config {place.directory}/config.toml"
        unit = manager.install(DEPLOY / "nixlet-snapshotter.service", NIXLET, arguments, own)
        manager.ok("start", unit)
        try:
            inode = place.socket.stat().st_ino
            with place.containerd("1.6.20"):
                manager.ok("restart", unit)
                assert place.socket.stat().st_ino == inode
                place.load(store_images[1], "localhost/nix:1")
        finally:
            manager.ok("stop", unit)
        assert manager.show(unit, "Result") == "success"
