"""Nodes and images for the system tests; each is made once a run."""

import contextlib
import fcntl
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nixlet.host import files, mounts
from support import image_archives, nodes, parts, storeimages

#: The name of the ordinary image.
ORDINARY = "localhost/ordinary:1"

ROOT = Path(__file__).parents[2]

#: Where k3s's test copies the image archive to.
K3S_ARCHIVE = Path("/tmp/nix-hello-image.tar")


@pytest.fixture(scope="session", autouse=True)
def machine() -> Iterator[None]:
    """The machine for ourselves: the tests have directories, bridges and addresses that two runs would share."""
    assert os.geteuid() == 0, "system tests mount and start containers: run them as root"
    with open("/run/nixlet-test.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # A run that was killed leaves its nodes' state, and no node takes over another one's.
        for left in Path("/run/nixlet-test").glob("*"):
            if not nodes.processes_below(left) and not mounts.below(str(left)):
                subprocess.run(["rm", "-rf", "--one-file-system", str(left)], check=True)
        yield


@pytest.fixture(scope="session", params=parts.CONTAINERD_PARAMETERS)
def node(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[nodes.Node]:
    """A running node, for each containerd."""
    version: str = request.param
    number = 10 + parts.CONTAINERDS.index(version)
    directory = tmp_path_factory.mktemp(f"node-{version}")
    made = nodes.Node(number, directory, "--containerd", str(parts.containerd(version)))
    with nodes.cleaned_up(made):
        made.start()
        yield made


@pytest.fixture(scope="session")
def any_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[nodes.Node]:
    """A running node with the system's containerd, for what doesn't depend on its version."""
    made = nodes.Node(9, tmp_path_factory.mktemp("node"))
    with nodes.cleaned_up(made):
        made.start()
        yield made


@pytest.fixture(scope="session")
def hello() -> str:
    """The reference of the hello image, built by Nix as the quickstart does."""
    environment = {**os.environ, "NIX_CONFIG": "build-users-group =\nsandbox = false\nsubstituters ="}
    argv = ["nix-build", "nix/examples/hello.nix", "-A", "image", "--no-out-link"]
    argv += ["--argstr", "nixlet", str(Path(sys.executable).parent / "nixlet")]
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return f"nix:0{done.stdout.strip()}"


@pytest.fixture(scope="session")
def archives() -> Iterator[Path]:
    """A directory below /tmp for image archives, where nodes accept them."""
    directory = Path("/tmp/nixlet-test-images")
    directory.mkdir(exist_ok=True)
    # Emptied, not replaced: it may be a mount.
    empty = ["find", str(directory), "-mindepth", "1", "-delete"]
    subprocess.run(empty, check=True)
    yield directory
    subprocess.run(empty, check=True)
    with contextlib.suppress(OSError):
        directory.rmdir()


@pytest.fixture(scope="session")
def store_images(archives: Path) -> dict[int, storeimages.StoreImage]:
    """Images by the number of paths in their closures."""
    return {count: storeimages.make(archives, count) for count in (1, 50, 500)}


@pytest.fixture(scope="session")
def busybox_layer() -> bytes:
    """A layer that holds busybox, by several names."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as layer:
        layer.add(storeimages.BUSYBOX, "bin/busybox")
        for name in ("sh", "sleep", "ls", "cat", "true", "echo"):
            layer.addfile(image_archives.link(f"bin/{name}", "busybox"))
    return buffer.getvalue()


@pytest.fixture(scope="session")
def ordinary(archives: Path, busybox_layer: bytes) -> Path:
    """The archive of an ordinary image that holds busybox."""
    files = image_archives.oci([busybox_layer], name=ORDINARY, config={"Cmd": ["/bin/sh"], "Env": ["PATH=/bin"]})
    archive = archives / "ordinary.tar"
    archive.write_bytes(image_archives.tar(files))
    return archive


@pytest.fixture
def archive(hello: str) -> Iterator[Path]:
    """The hello image where k3s's test has it. Runs beside each other have one /tmp: who leaves last removes it."""
    source = Path(hello.removeprefix("nix:0")).read_bytes()
    with open("/run/nixlet-test-archive.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        files.write_atomically(str(K3S_ARCHIVE), source)
        yield K3S_ARCHIVE
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            K3S_ARCHIVE.unlink()
