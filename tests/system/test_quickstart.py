"""The README's first command, and that the system's own containerd isn't touched."""

import hashlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nixlet.host import mounts, network, unixsocket
from nixlet.store import roots as gcroots
from support import kubernetes, nodes, parts, readme

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SYSTEM_SOCKET = "/run/containerd/containerd.sock"


def leftovers(directory: Path) -> dict[str, object]:
    """What a node could leave on a machine."""
    rules = subprocess.run(["iptables-save"], capture_output=True, text=True, check=False).stdout
    leases = Path("/run/nixlet-test/5/cni")
    return {
        "mounts": [
            entry.path for entry in mounts.table() if str(directory) in entry.path or "nixlet-test/5" in entry.path
        ],
        "network namespaces": sorted(os.listdir("/run/netns")) if os.path.isdir("/run/netns") else [],
        "bridge": network.bridge_exists("nixlet0"),
        "rules": [line for line in rules.splitlines() if "CNI" in line or "nixlet" in line],
        "processes": nodes.processes_below(Path("/run/nixlet-test/5")) + nodes.processes_below(directory),
        "leases": [str(path) for path in leases.rglob("10.*")] if leases.exists() else [],
        "interfaces": sorted(name for name in os.listdir("/sys/class/net") if name.startswith(("veth", "nixlet"))),
    }


def quickstart(directory: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "NIXLET_DATA_DIR": str(directory), "NIXLET_STATE_DIR": "/run/nixlet-test/5"}
    argv = [str(ROOT / "scripts/quickstart"), *arguments]
    return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=170, check=False)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "data"
    root = tmp_path / "data/agent/containerd/io.containerd.snapshotter.v1.nix"
    shutil.rmtree(Path("/nix/var/nix/gcroots/nixlet") / gcroots.owner_of(str(root)), ignore_errors=True)
    shutil.rmtree("/run/nixlet-test/5", ignore_errors=True)


def test_the_quickstart_says_hello_and_leaves_nothing(directory: Path) -> None:
    before = leftovers(directory)
    done = quickstart(directory)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Hello, world!\n")
    for line in (
        "paths in the closure +7",
        "bytes fetched",
        "mounts per container +1",
        r"from start to output +\d+ ms",
    ):
        assert re.search(line, done.stdout)
    # No terminal: no escape sequences.
    assert "\x1b" not in done.stdout + done.stderr
    assert leftovers(directory) == before


def test_keep_leaves_the_node_up_and_says_how_to_use_it(directory: Path) -> None:
    before = leftovers(directory)
    done = quickstart(directory, "--keep")
    assert done.returncode == 0, done.stderr
    found = re.search(r"process (\d+)", done.stderr)
    assert found is not None
    try:
        (log,) = re.findall(r"its log is (\S+)\.", done.stderr)
        assert '"the node is ready"' in Path(log).read_text()
        run = re.search(r"^ *(\S+/nixlet) run --rm (\S+) -- -g", done.stderr, re.MULTILINE)
        assert run is not None
        argv = [run[1], "run", "--rm", run[2], "--", "-g", "Hello from the store"]
        environment = {**os.environ, "NIXLET_STATE_DIR": "/run/nixlet-test/5"}
        output = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True).stdout
        assert output == "Hello from the store\n"
        # With the settings that it names, the README's next step succeeds, too.
        (settings,) = re.findall(r"^ *(export NIX_CONFIG=.*)$", done.stderr, re.MULTILINE)
        file = readme.checkout(directory.parent / "checkout", readme.image_expressions()["without"])
        script = f"{settings}; nixlet run --rm nix:0$(nix-build image.nix --no-out-link) -- /bin/busybox echo built"
        environment["PATH"] = f"{ROOT}/.venv/bin:{environment['PATH']}"
        environment.pop("NIX_CONFIG", None)
        argv = ["bash", "-c", script]
        built = subprocess.run(argv, env=environment, cwd=file.parent, capture_output=True, text=True, check=False)
        assert built.stdout == "built\n", built.stderr
    finally:
        os.kill(int(found[1]), 15)
        for _ in range(200):
            if not Path(f"/proc/{found[1]}").exists() or "Z" in Path(f"/proc/{found[1]}/stat").read_text().split()[2]:
                break
            time.sleep(0.05)
    assert leftovers(directory) == before


def test_a_node_that_was_there_keeps_nothing_of_it(directory: Path) -> None:
    node = nodes.Node(5, directory.parent)
    with nodes.cleaned_up(node):
        node.start()
        environment = {**os.environ, "NIXLET_DATA_DIR": str(node.data_dir), "NIXLET_STATE_DIR": str(node.state_dir)}
        argv = [str(ROOT / "scripts/quickstart")]
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=170, check=False)
        assert done.returncode == 0, done.stderr
        assert "already; using it" in done.stderr
        assert done.stdout.startswith("Hello, world!\n")
        assert node.version()["node"] is not None
        assert node.ok("ps", "-aq") == ""
        assert node.crictl("pods", "-q") == ""


@pytest.mark.timeout(600)
def test_a_cluster_serves_and_leaves_nothing(tmp_path: Path) -> None:
    """With the programs that are built already; a machine that has no default route has one of the test's for services."""
    cluster = kubernetes.Cluster(5, tmp_path)
    with kubernetes.cleaned_up(cluster):
        before = leftovers(tmp_path)
        cgroups = cluster.cgroups("*")
        environment = {
            **os.environ,
            "NIXLET_PARTS": "".join(f"{family} {path}\n" for family, path in parts.directories().items()),
            "NIXLET_DATA_DIR": str(cluster.data_dir),
            "NIXLET_STATE_DIR": str(cluster.state_dir),
            "NIXLET_NODE_IP": cluster.address,
            # Nix would try for seconds to reach what isn't there.
            "NIX_CONFIG": "substituters =",
            "NIXLET_NODE_NAME": "node-5",
            "NIXLET_KUBELET_ARG": f"cgroup-root=/{cluster.cgroup}",
        }
        argv = [str(ROOT / "scripts/quickstart"), "--kubernetes"]
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, done.stderr
        page, pods = done.stdout.split("\n\n")
        assert page == "Hello from the Nix store!"
        assert len(re.findall(r"^nix-server-\S+ +1/1 +Running ", pods, re.MULTILINE)) == 2
        # Nothing was built, and all of it is gone.
        assert "Building" not in done.stderr.replace("Building the image", "")
        assert leftovers(tmp_path) == before
        assert cluster.cgroups("*") == cgroups
        rules = subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True, check=True).stdout
        assert re.findall("(?i)kube", rules) == []
        assert not cluster.gc_roots.exists()
        assert not cluster.data_dir.exists()
        assert not cluster.state_dir.exists()
        assert list(Path("/tmp").glob("nixlet-quickstart.*")) == []
        # What is there already is nothing to be taken away at the end.
        cluster.data_dir.mkdir()
        (cluster.data_dir / "nixlet.json").touch()
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=170, check=False)
        assert done.returncode == 125
        assert f"there is a node in {cluster.data_dir} already" in done.stderr


def test_unknown_arguments_are_a_usage_error(directory: Path) -> None:
    done = quickstart(directory, "--nonsense")
    assert (done.returncode, done.stderr.startswith("error: unknown argument --nonsense\n")) == (2, True)
    done = quickstart(directory, "--keep", "--kubernetes")
    assert (done.returncode, done.stderr.startswith("error: a cluster is not kept\n")) == (2, True)


@pytest.fixture
def system_containerd() -> Iterator[None]:
    """The system's containerd, with the system's configuration, at the system's places."""
    if unixsocket.is_served(SYSTEM_SOCKET):
        yield
        return
    made = [path for path in ("/run/containerd", "/var/lib/containerd") if not os.path.exists(path)]
    with (
        open("/tmp/nixlet-test-system-containerd.log", "wb") as log,
        subprocess.Popen(["/usr/bin/containerd"], stdout=log, stderr=log) as process,
    ):
        try:
            for _ in range(200):
                if unixsocket.is_served(SYSTEM_SOCKET):
                    break
                time.sleep(0.05)
            yield
        finally:
            process.terminate()
            process.wait(30)
    os.unlink("/tmp/nixlet-test-system-containerd.log")
    for path in made:
        if not mounts.below(path):
            shutil.rmtree(path, ignore_errors=True)


def ctr(*arguments: str) -> str:
    return subprocess.run(["ctr", *arguments], capture_output=True, text=True, check=True).stdout


def system_state() -> dict[str, object]:
    files = [path for path in Path("/etc/containerd").rglob("*") if path.is_file()]
    return {
        "socket": os.stat(SYSTEM_SOCKET).st_ino,
        "ttrpc": os.stat(f"{SYSTEM_SOCKET}.ttrpc").st_ino,
        "namespaces": ctr("namespaces", "list", "-q"),
        "images": ctr("images", "list"),
        "k8s images": ctr("-n", "k8s.io", "images", "list"),
        "containers": ctr("-n", "k8s.io", "containers", "list"),
        "snapshots": ctr("snapshots", "list"),
        "configuration": {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
        "root": sorted(os.listdir("/var/lib/containerd")),
        "cni": sorted(str(path) for path in Path("/etc/cni").rglob("*")),
    }


@pytest.mark.usefixtures("system_containerd")
def test_the_systems_containerd_is_not_touched(directory: Path, ordinary: Path) -> None:
    ctr("images", "import", str(ordinary))
    try:
        before = system_state()
        assert quickstart(directory).returncode == 0
        assert system_state() == before
        assert "localhost/ordinary:1" in str(before["images"])
    finally:
        ctr("images", "remove", "--sync", "localhost/ordinary:1")
