"""A node inside a Docker container, with the host's store: configured by config.yaml, its data on a volume."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nixlet.host import mounts
from nixlet.store import roots as gcroots
from support import image_archives, nodes

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PLACE = Path("/run/nixlet-test/d")

#: What a container needs that runs containers, on a machine where "--privileged" asks for capabilities that it lacks.
RIGHTS = [
    *("--cap-add", "SYS_ADMIN", "--cap-add", "NET_ADMIN", "--cap-add", "SYS_PTRACE", "--cap-add", "MKNOD"),
    *("--security-opt", "seccomp=unconfined", "--security-opt", "systempaths=unconfined"),
    *("-v", "/sys/fs/cgroup:/sys/fs/cgroup:rw", "--network", "none"),
]


def docker(*arguments: str) -> "subprocess.CompletedProcess[str]":
    argv = ["/usr/bin/docker", "-H", f"unix://{PLACE}/docker.sock", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def dockerd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Docker daemon of our own, with an image "box" whose programs are the host's."""
    directory = tmp_path_factory.mktemp("docker")
    PLACE.mkdir(parents=True, exist_ok=True)
    settings = {
        "data-root": f"{directory}/data",
        "exec-root": f"{PLACE}/exec",
        "pidfile": f"{PLACE}/pid",
        "hosts": [f"unix://{PLACE}/docker.sock"],
        "bridge": "none",
        "iptables": False,
        "ip-forward": False,
        "storage-driver": "overlay2",
    }
    (directory / "daemon.json").write_text(json.dumps(settings))
    argv = ["dockerd", "--config-file", f"{directory}/daemon.json"]
    with (directory / "log").open("w") as log, subprocess.Popen(argv, stdout=log, stderr=log) as daemon:
        try:
            for _ in range(200):
                if docker("version").returncode == 0:
                    break
                assert daemon.poll() is None, (directory / "log").read_text()
                time.sleep(0.1)
            with tarfile.open(directory / "box.tar", "w") as box:
                for name in ("proc", "sys", "dev", "tmp", "run", "etc", "usr", "root", "nix", "var/tmp"):
                    entry = tarfile.TarInfo(name)
                    entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755
                    box.addfile(entry)
                for name, text in (("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n"), ("etc/group", b"root:x:0:\n")):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(text)
                    box.addfile(entry, io.BytesIO(text))
                for name in ("bin", "lib", "lib64", "sbin"):
                    box.addfile(image_archives.link(name, f"usr/{name}"))
            done = docker("import", f"{directory}/box.tar", "box")
            assert done.returncode == 0, done.stderr
            yield
        finally:
            daemon.terminate()
            daemon.wait(60)
            for pid in nodes.processes_below(PLACE):
                os.kill(pid, signal.SIGKILL)
            for mounted in reversed([*mounts.below(str(directory)), *mounts.below(str(PLACE))]):
                mounts.unmount(mounted.path)
            shutil.rmtree(PLACE, ignore_errors=True)


@contextlib.contextmanager
def box(directory: Path, *arguments: str) -> Iterator[str]:
    """A node in a container; the container's name."""
    name = f"nixlet-{directory.name.replace('_', '-')}"
    python = Path(os.path.realpath(ROOT / ".venv/bin/python")).parents[1]
    volumes = ["/usr:/usr:ro", "/etc/alternatives:/etc/alternatives:ro", f"{ROOT}:{ROOT}:ro", "/nix:/nix"]
    if not str(python).startswith("/usr"):
        volumes.append(f"{python}:{python}:ro")
    path = f"{ROOT}/.venv/bin:/usr/bin:/usr/sbin:/bin:/sbin"
    argv = ["run", "-d", "--name", name, *RIGHTS, *(part for volume in volumes for part in ("-v", volume))]
    argv += ["-e", f"PATH={path}", "-e", "NIX_CONFIG=substituters =", *arguments, "box", "nixlet", "server"]
    done = docker(*argv)
    assert done.returncode == 0, done.stderr
    try:
        yield name
    finally:
        docker("rm", "-f", name)


def wait_for(name: str, *, ready: bool) -> str:
    """Wait until the node in a container is ready, or has ended; its log."""
    state, logs = "", docker("logs", name)
    for _ in range(300):
        state = docker("inspect", "-f", "{{.State.Running}}", name).stdout.strip()
        logs = docker("logs", name)
        if "the node is ready" in logs.stdout + logs.stderr or state != "true":
            break
        time.sleep(0.1)
    assert (state == "true") is ready, logs.stdout + logs.stderr
    return logs.stdout + logs.stderr


@pytest.fixture
def configuration(tmp_path: Path) -> Path:
    # At a path that is like no other: the roots of store paths, which lie in the shared store, are named after it.
    (tmp_path / "config.yaml").write_text(f"snapshotter: nix\ndata-dir: {tmp_path}/data\n")
    return tmp_path / "config.yaml"


def test_the_node_in_a_container(dockerd: None, configuration: Path, tmp_path: Path, hello: str) -> None:
    data = tmp_path / "data"
    volumes = [f"{data}:{data}", f"{configuration}:/etc/nixlet/config.yaml:ro"]
    owner = gcroots.owner_of(f"{data}/agent/containerd/io.containerd.snapshotter.v1.nix")
    (tmp_path / "pod.yaml").write_bytes(
        nodes.manifest("nix-hello", "nix:0/tmp/nix-hello-image.tar", container={"imagePullPolicy": "Always"})
    )
    try:
        with box(tmp_path, *(part for volume in volumes for part in ("-v", volume))) as name:
            wait_for(name, ready=True)
            docker("cp", hello.removeprefix("nix:0"), f"{name}:/tmp/nix-hello-image.tar")
            docker("cp", f"{tmp_path}/pod.yaml", f"{name}:/tmp/pod.yaml")
            version = json.loads(docker("exec", name, "nixlet", "version", "--output", "json").stdout)["node"]
            # Chosen by a probe, in here.
            assert (version["snapshotter"], version["strategy"]) == ("nix", "view")
            done = docker("exec", name, "nixlet", "kube", "play", "--wait", "/tmp/pod.yaml")
            assert (done.returncode, done.stdout) == (0, "Hello, world!\n"), done.stderr
    finally:
        shutil.rmtree(Path("/nix/var/nix/gcroots/nixlet") / owner, ignore_errors=True)


def test_data_on_the_containers_own_root_is_refused(dockerd: None, configuration: Path, tmp_path: Path) -> None:
    with box(tmp_path, "-v", f"{configuration}:/etc/nixlet/config.yaml:ro") as name:
        log = wait_for(name, ready=False)
        assert "can't be given a root file system" in log
        assert f"{tmp_path}/data" in log
        assert "volume" in log
        assert docker("inspect", "-f", "{{.State.ExitCode}}", name).stdout.strip() == "125"
