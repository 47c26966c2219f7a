"""containerd's life in the node: what is noticed, started again, told and given up, and what goes on meanwhile."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nixlet.host import mounts, network, unixsocket
from support import nodes, parts, storeimages

pytestmark = pytest.mark.slow

SECONDS = 30.0


def until(condition: Callable[[], object], what: str, *, seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not in {seconds} s: {what}"
        time.sleep(0.02)


def containerd_of(node: nodes.Node) -> list[int]:
    return nodes.named(node, "containerd")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def ask(node: nodes.Node, path: str) -> tuple[int, str]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(node.state_dir / "health.sock"))
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: node\r\n\r\n".encode())
        answer = b""
        while data := sock.recv(1 << 16):
            answer += data
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body.decode()


def metric(node: nodes.Node, name: str) -> float:
    """A sample by its name with labels; 0 when there is none."""
    found = [line for line in ask(node, "/metrics")[1].splitlines() if line.startswith(f"{name} ")]
    return float(found[0].rsplit(" ", 1)[1]) if found else 0.0


def events(node: nodes.Node) -> list[dict[str, object]]:
    """The node's log: every line is an object."""
    return [json.loads(line) for line in node.log.read_text().splitlines()]


def sleeper(node: nodes.Node, image: storeimages.StoreImage, name: str) -> tuple[str, int]:
    container = node.ok("run", "-d", "--name", name, image.reference, "--", "/bin/sleep", "1000").strip()
    return container, int(json.loads(node.crictl("inspect", container))["info"]["pid"])


@pytest.fixture(params=parts.CONTAINERD_PARAMETERS)
def own_node(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[nodes.Node]:
    made = nodes.Node(7, tmp_path, "--containerd", str(parts.containerd(request.param)))
    with nodes.cleaned_up(made):
        made.start()
        yield made


def test_a_killed_containerd_comes_back_with_images_and_pods(
    own_node: nodes.Node, store_images: dict[int, storeimages.StoreImage]
) -> None:
    node = own_node
    image = store_images[50]
    container, pid = sleeper(node, image, "stays")
    # containerd's output goes to us; a shim that wrote to the same place would end with us.
    for shim in nodes.named(node, "containerd-shim-runc-v2"):
        outputs = {os.readlink(f"/proc/{shim}/fd/{number}") for number in (1, 2)}
        assert all(each.startswith("/") for each in outputs), outputs
    images = sorted(node.crictl("images", "-q").split())
    assert len(images) >= 2
    mounted = len(node.mounts())
    (first,) = containerd_of(node)

    os.kill(first, signal.SIGKILL)
    reason = "[-]containerd failed: containerd is not running: containerd was ended by SIGKILL"
    seen: list[str] = []

    def noticed() -> bool:
        status, text = ask(node, "/readyz")
        seen.append(text)
        return status == 503 and reason in text

    until(noticed, "the death is noticed", seconds=2)
    assert "[+]snapshotter ok" in seen[-1]
    assert ask(node, "/healthz") == (200, "ok")
    until(lambda: ask(node, "/readyz")[0] == 200, "containerd is there again")

    (second,) = containerd_of(node)
    assert second != first
    assert alive(pid)
    # Taken up as it was: the same container, the same images (none "not unpacked"), no mount more or less.
    assert json.loads(node.crictl("inspect", container))["info"]["pid"] == pid
    assert sorted(node.crictl("images", "-q").split()) == images
    assert len(node.mounts()) == mounted
    assert node.ok("run", "--rm", image.reference, "--", "/bin/cat", image.link) == "a plain file\n"
    assert metric(node, 'nixlet_child_restarts_total{child="containerd"}') == 1
    assert metric(node, 'nixlet_child_up{child="containerd"}') == 1
    told = [event for event in events(node) if "containerd was ended by SIGKILL" in str(event["msg"])]
    assert [event["level"] for event in told] == ["error"]
    node.ok("rm", "-f", "stays")
    assert node.stop() == 0
    assert node.mounts() == []


def test_pods_outlive_the_deaths_of_containerd_and_then_of_the_node(
    tmp_path: Path, store_images: dict[int, storeimages.StoreImage]
) -> None:
    node = nodes.Node(7, tmp_path)
    with nodes.cleaned_up(node):
        node.start()
        container, pid = sleeper(node, store_images[1], "stays")
        (first,) = containerd_of(node)
        os.kill(first, signal.SIGKILL)
        # In the middle of containerd's absence.
        node.kill()
        until(lambda: not containerd_of(node), "containerd dies with its node")
        assert alive(pid)
        node.start()
        assert json.loads(node.crictl("inspect", container))["info"]["pid"] == pid
        node.ok("rm", "-f", "stays")


def test_a_containerd_that_dies_again_and_again_is_given_up(tmp_path: Path) -> None:
    # A containerd that serves, and dies as soon as a file is there.
    program = tmp_path / "containerd"
    real = parts.containerd("1.6.20")
    program.write_text(
        "#!/bin/sh\n"
        f'case "$1" in --version|config) exec {real} "$@";; esac\n'
        f'test -e {tmp_path}/broken && {{ echo "metadata.db is damaged"; exit 9; }}\n'
        f'exec {real} "$@"\n'
    )
    program.chmod(0o755)
    node = nodes.Node(7, tmp_path, "--containerd", str(program))
    with nodes.cleaned_up(node):
        node.start()
        process = node._process
        assert process is not None
        (tmp_path / "broken").touch()
        os.kill(containerd_of(node)[0], signal.SIGKILL)
        assert process.wait(60) == 125
        text = node.log.read_text()
        assert "containerd failed 6 times in a short time and is not started again" in text
        assert "  | metadata.db is damaged" in text or "status 9: metadata.db is damaged" in text
        assert text.count("is started again in") == 5
        assert "Traceback" not in text
        assert not node.node_socket.exists()
        assert node.mounts() == []


def test_a_node_without_restarts_goes_down_with_containerd(tmp_path: Path) -> None:
    node = nodes.Node(7, tmp_path, "--containerd-restart", "never", "--log", str(tmp_path / "node.log"))
    with nodes.cleaned_up(node):
        node.start()
        process = node._process
        assert process is not None
        os.kill(containerd_of(node)[0], signal.SIGKILL)
        assert process.wait(30) == 125
        assert "error: containerd was ended by SIGKILL" in node.log.read_text()
        # The log file holds all events, each an object; the terminal's side only the error.
        logged = [json.loads(line)["msg"] for line in (tmp_path / "node.log").read_text().splitlines()]
        assert "the node is ready" in logged
        assert any(line.startswith("the node ends: containerd was ended by SIGKILL") for line in logged)
        assert '"msg"' not in node.log.read_text()


def test_a_second_signal_does_not_wait_for_containerd(tmp_path: Path) -> None:
    program = tmp_path / "containerd"
    real = parts.containerd("1.6.20")
    # Its containerd ignores SIGTERM: the signal reaches the script, which does nothing about it.
    program.write_text(
        "#!/bin/sh\n"
        f'case "$1" in --version|config) exec {real} "$@";; esac\n'
        f'trap "touch {tmp_path}/asked" TERM\n'
        f'setpriv --pdeathsig KILL -- {real} "$@" &\n'
        "while :; do wait; done\n"
    )
    program.chmod(0o755)
    node = nodes.Node(7, tmp_path, "--containerd", str(program))
    with nodes.cleaned_up(node):
        node.start()
        process = node._process
        assert process is not None
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        until((tmp_path / "asked").exists, "containerd is asked to end", seconds=5)
        # Our services are there as long as containerd is.
        assert node.node_socket.exists()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert time.monotonic() - began < 8, "the grace of 10 s was waited for"
        until(lambda: not containerd_of(node), "containerd is gone")


def test_a_signal_during_the_start_ends_it(tmp_path: Path) -> None:
    program = tmp_path / "containerd"
    real = parts.containerd("1.6.20")
    program.write_text(
        f'#!/bin/sh\ncase "$1" in --version|config) exec {real} "$@";; esac\ntouch {tmp_path}/started\nexec sleep 600\n'
    )
    program.chmod(0o755)
    node = nodes.Node(7, tmp_path, "--containerd", str(program))
    with nodes.cleaned_up(node):
        process = node.launch()
        until((tmp_path / "started").exists, "containerd is started")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert not node.node_socket.exists()
        assert "Traceback" not in node.log.read_text()


def test_what_happens_is_counted(any_node: nodes.Node, store_images: dict[int, storeimages.StoreImage]) -> None:
    node = any_node
    pulls = 'nixlet_image_pulls_total{source="nix",status="%s"}'
    before = {status: metric(node, pulls % status) for status in ("success", "failure")}
    roots = metric(node, 'nixlet_snapshot_mounts_total{strategy="view"}')
    method = 'grpc_server_handling_seconds_count{grpc_service="containerd.services.snapshots.v1.Snapshots",'
    prepared = metric(node, method + 'grpc_method="Prepare"}')
    node.crictl("pull", store_images[50].reference)
    missing = f"nix:0/nix/store/{'0' * 32}-missing.tar"
    with contextlib.suppress(AssertionError):
        node.crictl("pull", missing)
    assert metric(node, pulls % "success") == before["success"] + 1
    assert metric(node, pulls % "failure") == before["failure"] + 1
    node.ok("run", "--rm", store_images[50].reference, "--", "/bin/true")
    assert metric(node, 'nixlet_snapshot_mounts_total{strategy="view"}') > roots
    assert metric(node, method + 'grpc_method="Prepare"}') > prepared
    assert metric(node, 'nixlet_snapshots{kind="committed"}') >= 2
    # No store path, image or key is a label.
    text = ask(node, "/metrics")[1]
    assert "/nix/store" not in text
    assert "sha256" not in text
    assert "missing" not in text
    assert metric(node, "process_resident_memory_bytes") < 120e6


def test_another_containerd_is_used_when_it_has_our_snapshotter(
    tmp_path: Path, any_node: nodes.Node, store_images: dict[int, storeimages.StoreImage]
) -> None:
    """A containerd that somebody else runs, here one that the test starts: without our plugin it is refused, with it it serves."""
    del any_node  # its containerd is of no concern here
    state = Path("/run/nixlet-test/6")
    state.mkdir(parents=True, exist_ok=True)
    node = nodes.Node(7, tmp_path, "--container-runtime-endpoint", f"unix://{state}/c.sock")
    config = tmp_path / "config.toml"
    top = f'version = 2\nroot = "{tmp_path}/root"\nstate = "{state}/s"\n[grpc]\naddress = "{state}/c.sock"\n'
    top += '[ttrpc]\naddress = ""\n[plugins."io.containerd.internal.v1.opt"]\npath = "' + f'{tmp_path}/opt"\n'
    ours = f'[proxy_plugins.nix]\ntype = "snapshot"\naddress = "{node.node_socket}"\n'
    ours += (
        '[plugins."io.containerd.grpc.v1.cri".containerd]\nsnapshotter = "nix"\ndisable_snapshot_annotations = false\n'
    )

    @contextlib.contextmanager
    def containerd(text: str) -> Iterator[None]:
        config.write_text(text)
        argv = ["setpriv", "--pdeathsig", "KILL", "--", str(parts.containerd("1.6.20")), "--config", str(config)]
        with (tmp_path / "containerd.log").open("ab") as log, subprocess.Popen(argv, stdout=log, stderr=log) as process:
            try:
                yield
            finally:
                process.terminate()
                process.wait(20)

    with nodes.cleaned_up(node):
        try:
            with containerd(top):
                process = node.launch()
                assert process.wait(60) == 125
                text = node.log.read_text()
                assert f"error: the containerd at {state}/c.sock can't use the snapshotter nix: " in text
                assert f'hint: give it [proxy_plugins.nix] type = "snapshot", address = "{node.node_socket}"' in text
            node.log.unlink()
            # At boot it may come later than the node, which has to serve it when it does.
            node.launch()
            until(lambda: unixsocket.is_served(str(node.node_socket)), "the snapshotter serves")
            with containerd(top + ours):
                node.await_ready()
                # It has no network for pods, and all else.
                status, text = ask(node, "/readyz")
                assert (status, "[-]network failed: pods get no network: " in text, text.count("[-]")) == (503, True, 1)
                running = node.version()["node"]
                assert running["containerd"].startswith("1.6.20")
                # The command line and crictl find it where a node's containerd is.
                assert node.crictl("pull", store_images[50].reference)
                assert len(node.crictl("images", "-q").split()) == 1
                assert node.stop() == 0
                assert not node.containerd_socket.is_symlink()
            with containerd(top):
                # With a snapshotter of its own it needs nothing of ours, and can't run store paths.
                node.arguments += ["--snapshotter", "overlayfs"]
                node.start()
                names = [line.split()[0] for line in ask(node, "/readyz")[1].splitlines()]
                assert names == ["[+]containerd", "[-]network", "[+]disk", "readyz"]
                assert node.version()["node"]["strategy"] == ""
                with pytest.raises(AssertionError, match="which the snapshotter overlayfs can't run") as refused:
                    node.crictl("pull", store_images[50].reference)
                assert "start the node with --snapshotter nix" in str(refused.value)
                assert metric(node, 'nixlet_image_pulls_total{source="nix",status="failure"}') == 1
                assert node.stop() == 0
        finally:
            for place in (tmp_path, state):
                for entry in reversed(mounts.below(str(place))):
                    mounts.unmount(entry.path)
            subprocess.run(["rm", "-rf", str(state)], check=True)


def test_another_image_service_is_asked_in_place_of_ours(
    tmp_path: Path, any_node: nodes.Node, store_images: dict[int, storeimages.StoreImage]
) -> None:
    any_node.crictl("pull", store_images[1].reference)
    node = nodes.Node(7, tmp_path, "--image-service-endpoint", f"unix://{any_node.containerd_socket}")
    with nodes.cleaned_up(node):
        node.start()
        config = node.data_dir / "agent" / "etc" / "crictl.yaml"
        assert config.stat().st_mode & 0o777 == 0o600
        assert f'image-endpoint: "unix://{any_node.containerd_socket}"' in config.read_text()
        # Those who ask ours get its answers, and store paths all the same.
        assert sorted(node.crictl("images", "-q").split()) == sorted(any_node.crictl("images", "-q").split())
        assert node.crictl("pull", store_images[50].reference)
        assert node.ok("run", "--rm", store_images[50].reference, "--", "/bin/true") == ""


def test_the_service_manager_is_told(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(SECONDS)
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "400000"}
        node = nodes.Node(7, tmp_path, environment=environment)
        with nodes.cleaned_up(node):
            node.start()
            (containerd,) = containerd_of(node)
            # containerd must not speak for the node.
            inherited = Path(f"/proc/{containerd}/environ").read_bytes()
            assert b"NOTIFY_SOCKET" not in inherited
            assert b"WATCHDOG_USEC" not in inherited
            os.kill(containerd, signal.SIGKILL)
            told: list[str] = []

            def hears(state: str) -> bool:
                told.append(manager.recv(4096).decode())
                return told[-1] == state

            until(lambda: hears("STATUS=containerd: died"), "the death is told")
            until(lambda: hears("STATUS=containerd: ready"), "the recovery is told")
            assert "READY=1" in told
            assert "WATCHDOG=1" in told
            assert node.stop() == 0
            until(lambda: hears("STOPPING=1"), "the end is told")


def uninstall(node: nodes.Node, *more: str) -> "subprocess.CompletedProcess[bytes]":
    return node.run("uninstall", *node.arguments, *more)


@pytest.mark.parametrize("broken", [False, True], ids=["in-order", "by-hand"])
@pytest.mark.parametrize("version", ["1.6.20", pytest.param("2.4.2", marks=pytest.mark.slow)])
def test_uninstalling_leaves_nothing_but_the_store_and_what_others_put_there(
    tmp_path: Path, store_images: dict[int, storeimages.StoreImage], version: str, broken: bool
) -> None:
    image = store_images[50]
    node = nodes.Node(7, tmp_path, "--containerd", str(parts.containerd(version)))
    shims = set(os.listdir("/run/containerd/s")) if os.path.isdir("/run/containerd/s") else set()
    with nodes.cleaned_up(node):
        node.start()
        container, pid = sleeper(node, image, "runs")
        sandbox = node.crictl("pods", "-q")
        assert any(sandbox in name for name in os.listdir("/var/lib/cni/results"))
        del container
        agent = node.data_dir / "agent"
        theirs = [node.data_dir / "other", agent / "images/mine.txt", agent / "etc/containerd/config-v3.toml.tmpl"]
        theirs += [agent / "etc/containerd/config.toml.d/mine.toml", agent / "opt/bin/tool"]
        for path in theirs:
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_text("not nixlet's")
        # A second node's, whose bridge's name begins with this one's.
        other = Path(f"/var/lib/cni/results/nixlet-{node.bridge}-b-{'0' * 64}-eth0")
        other.write_text("{}")
        refused = uninstall(node, "--yes")
        assert refused.returncode == 125
        assert b"the node is running" in refused.stderr
        assert refused.stdout == b""
        assert node.gc_roots.exists()
        assert node.stop() == 0
        assert alive(pid)

        asked = node.run("uninstall", "--data-dir", str(node.data_dir))
        assert (asked.returncode, asked.stderr) == (0, b"")
        assert b"Would be removed:" in asked.stdout
        assert b"add --yes" in asked.stdout
        assert alive(pid)
        arguments = ["--containerd", str(tmp_path / "missing")] if broken else []
        done = node.run("uninstall", "--data-dir", str(node.data_dir), "--yes", *arguments)
        assert done.returncode == 0, done.stderr.decode()
        for path in theirs[1:]:
            assert f"{path}, which is not the node's".encode() in done.stdout
        until(lambda: not alive(pid), "the pod is gone")
        assert nodes.processes_below(node.state_dir) == []
        assert node.mounts() == []
        assert not network.bridge_exists(node.bridge)
        assert not node.gc_roots.exists()
        assert not node.state_dir.exists()
        assert {path for path in node.data_dir.rglob("*") if not path.is_dir()} == set(theirs)
        rules = subprocess.run(["iptables-save"], capture_output=True, text=True, check=True).stdout
        assert f"nixlet-{node.bridge}" not in rules
        assert [name for name in os.listdir("/var/lib/cni/results") if sandbox in name] == []
        assert other.exists()
        other.unlink()
        assert set(os.listdir("/run/containerd/s")) <= shims
        for each in image.paths:
            assert os.path.lexists(str(each))
        again = uninstall(node, "--yes")
        assert again.returncode == 125
        assert b"there is no node at" in again.stderr


@pytest.fixture
def theirs() -> Iterator[Path]:
    """The state directory of another program that has a containerd of its own, such as k3s."""
    directory = Path("/run/nixlet-test/k3s")
    (directory / "containerd/io.containerd.runtime.v2.task/k8s.io").mkdir(parents=True)
    yield directory
    shutil.rmtree(directory)


def test_uninstalling_takes_no_flags_word_for_what_is_the_nodes(
    any_node: nodes.Node, theirs: Path, tmp_path: Path
) -> None:
    """The flags of another program's directories, of another node's bridge, and a copy of a node's directory."""
    data = ["uninstall", "--yes", "--data-dir", str(any_node.data_dir)]
    for flag, value, was in (
        ("--state-dir", str(theirs), str(any_node.state_dir)),
        ("--bridge", "cni0", any_node.bridge),
    ):
        done = any_node.run(*data, flag, value)
        assert done.returncode == 125
        assert f"was started with {flag} {was}, not {value}".encode() in done.stderr
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "nixlet.json").write_bytes((any_node.data_dir / "nixlet.json").read_bytes())
    done = any_node.run("uninstall", "--yes", "--data-dir", str(copy))
    assert done.returncode == 125
    assert f"{copy} was made at {any_node.data_dir} and copied or moved".encode() in done.stderr
    # Nor does a node start in what is another containerd's.
    server = [sys.executable, "-m", "nixlet", "server", "--data-dir", str(tmp_path / "data"), "--bridge", "nixtest99"]
    environment = {**any_node.environment, "NIXLET_STATE_DIR": str(theirs)}
    refused = subprocess.run(server, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 125
    assert f"{theirs}/containerd holds the running state of another containerd\n" in refused.stderr
    assert "--state-dir" in refused.stderr
    assert not (tmp_path / "data").exists()
    doctor = [*server[:3], "doctor", *server[4:]]
    looked = subprocess.run(doctor, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert looked.returncode == 1
    assert f"{theirs}/containerd holds the running state of another containerd" in looked.stdout
    assert (theirs / "containerd/io.containerd.runtime.v2.task/k8s.io").exists()


def test_uninstalling_stops_before_what_is_mounted_in_its_way(tmp_path: Path) -> None:
    node = nodes.Node(7, tmp_path)
    with nodes.cleaned_up(node):
        subprocess.run(["ip", "link", "add", node.bridge, "type", "bridge"], check=True)
        node.start()
        assert node.stop() == 0
        # Somebody's, who made it before.
        assert network.bridge_exists(node.bridge)
        # A disk that somebody gave containerd, or one of its plugins, is neither taken off nor emptied.
        containerd = node.data_dir / "agent/containerd"
        for disk in (containerd, containerd / "io.containerd.snapshotter.v1.overlayfs"):
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(disk)], check=True)
            try:
                (disk / "precious").touch()
                assert uninstall(node, "--yes", "--pods-only").returncode == 0
                done = uninstall(node, "--yes")
                assert done.returncode == 125
                assert f"{containerd} is not deleted: {disk} is mounted in it".encode() in done.stderr
                assert (disk / "precious").exists()
            finally:
                mounts.unmount(str(disk))
        pods = node.data_dir / "agent" / "pods"
        inside = pods / "disk"
        inside.mkdir()
        outside = tmp_path / "outside"
        outside.mkdir()
        for source, target in ((outside, inside), (pods, outside)):
            (source / "precious").touch()
            subprocess.run(["mount", "--bind", str(source), str(target)], check=True)
            try:
                done = uninstall(node, "--yes")
                assert done.returncode == 125
                assert b"is not deleted" in done.stderr
                assert str(target).encode() in done.stderr
                assert (source / "precious").exists()
            finally:
                mounts.unmount(str(target))
        assert uninstall(node, "--yes").returncode == 0
        assert not node.data_dir.exists()
        assert network.bridge_exists(node.bridge)


def test_the_node_ends_with_json_lines_and_people_get_words(any_node: nodes.Node) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nixlet", "server", *any_node.arguments],
        env=any_node.environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 125
    lines = [line for line in done.stderr.splitlines() if line.startswith("{")]
    assert all(json.loads(line) for line in lines)
    assert "is in use by process" in done.stderr
