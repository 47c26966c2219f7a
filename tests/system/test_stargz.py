"""Images whose layers are read lazily: the stargz snapshotter's program, supervised, and going on without its node."""

import base64
import contextlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nixlet.host import mounts
from support import image_archives, nodes, parts, registries, storeimages

pytestmark = pytest.mark.slow

DAEMON = "containerd-stargz-grpc"
PORT = 5077

#: A registry's answers for content of layers, by status.
_ANSWERS = re.compile(r'"GET /v2/lazy/blobs/sha256:[0-9a-f]+ HTTP/1\.1" (\d+)')


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[registries.Registry]:
    with registries.running(tmp_path_factory.mktemp("registry"), PORT, login=True) as running:
        yield running


@pytest.fixture(scope="module")
def lazy(
    registry: registries.Registry, archives: Path, busybox_layer: bytes, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """An image in the eStargz form in a registry that wants a login; its second layer has much that nobody reads."""
    directory = tmp_path_factory.mktemp("lazy")
    layer = image_archives.tar({"early": b"early\n", "late": b"late\n", "large": os.urandom(16 << 20)})
    files = image_archives.oci([busybox_layer, layer], name="localhost/plain:1", config={"Env": ["PATH=/bin"]})
    archive = archives / "plain.tar"
    archive.write_bytes(image_archives.tar(files))
    login = base64.b64encode(f"{registries.USER}:{registries.PASSWORD}".encode()).decode()
    (directory / "config.json").write_text(json.dumps({"auths": {registry.address: {"auth": login}}}))
    name = f"{registry.address}/lazy:1"
    node = nodes.Node(51, directory, "--containerd", str(parts.containerd(parts.CONTAINERDS[-1])))
    node.snapshotter = "overlayfs"
    with nodes.cleaned_up(node):
        node.start()
        node.ok("image", "load", str(archive))
        nerdctl = [str(parts.directories()["nerdctl"] / "nerdctl"), "--address", str(node.containerd_socket)]
        nerdctl += ["--namespace", "k8s.io", "--snapshotter", "overlayfs", "--data-root", str(directory / "nerdctl")]
        for words in (
            ["image", "convert", "--estargz", "--oci", "localhost/plain:1", name],
            ["--insecure-registry", "push", name],
        ):
            environment = {**os.environ, "DOCKER_CONFIG": str(directory)}
            done = subprocess.run([*nerdctl, *words], env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
    return name


@pytest.fixture(scope="module")
def open_registry(
    registry: registries.Registry, lazy: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[registries.Registry]:
    """One that has the same, and wants no login."""
    directory = tmp_path_factory.mktemp("open-registry")
    (directory / "content").symlink_to(registry._log.parent / "content")
    with registries.running(directory, PORT + 1) as running:
        yield running


@contextlib.contextmanager
def made(directory: Path, version: str) -> Iterator[nodes.Node]:
    node = nodes.Node(52, directory, "--containerd", str(parts.containerd(version)))
    node.snapshotter = "stargz"
    node.environment["PATH"] = os.pathsep.join((str(parts.directories()["stargz"]), os.environ["PATH"]))
    login = {"auth": {"username": registries.USER, "password": registries.PASSWORD}}
    node.registries.write_text(json.dumps({"configs": {f"127.0.0.1:{PORT}": login}}))
    with nodes.cleaned_up(node):
        yield node


@pytest.fixture(params=parts.CONTAINERD_PARAMETERS)
def fresh(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[nodes.Node]:
    """A node that is not started yet, for each containerd."""
    with made(tmp_path, request.param) as node:
        yield node


@pytest.fixture
def newest(tmp_path: Path) -> Iterator[nodes.Node]:
    with made(tmp_path, parts.CONTAINERDS[-1]) as node:
        yield node


def layers(node: nodes.Node) -> list[str]:
    """The layers that the program shows."""
    return [entry.path for entry in mounts.below(str(node.data_dir)) if entry.fstype == "fuse.rawBridge"]


def daemon(node: nodes.Node) -> int:
    """Its process."""
    (pid,) = nodes.named(node, DAEMON)
    return pid


def snapshotter_log(node: nodes.Node) -> str:
    return (node.data_dir / "agent/containerd/stargz-snapshotter.log").read_text()


def answers(registry: registries.Registry) -> list[str]:
    """How the registry answered for content of layers."""
    return _ANSWERS.findall(registry._log.read_text())


def check_lazily(node: nodes.Node, image: str, registry: registries.Registry) -> None:
    """Run an image, of whose layers only what is read is asked for."""
    before = len(answers(registry))
    assert node.ok("run", "--rm", image, "/bin/cat", "/early") == "early\n"
    # One file system for each layer, whose content came by ranges; the configuration alone is whole.
    assert len(layers(node)) == 2, snapshotter_log(node)
    asked = answers(registry)[before:]
    assert asked.count("206") > 0
    assert asked.count("200") <= 1


def test_an_image_is_pulled_lazily(fresh: nodes.Node, lazy: str, registry: registries.Registry, ordinary: Path) -> None:
    node = fresh
    node.start()
    assert node.children()[DAEMON]["pid"] == daemon(node)
    check_lazily(node, lazy, registry)
    listed = node.ok("ctr", "snapshots", "--snapshotter", "stargz", "ls").split()
    # Each stands there also as the parent of the next.
    names = {each for each in listed if "sha256:" in each}
    told = [node.ok("ctr", "snapshots", "--snapshotter", "stargz", "info", each) for each in names]
    assert sum('"containerd.io/snapshot/remote"' in each for each in told) == 2
    # Ordinary images are unpacked as ever.
    node.ok("image", "load", str(ordinary))
    assert node.ok("run", "--rm", "localhost/ordinary:1", "/bin/echo", "ordinary") == "ordinary\n"


@pytest.mark.parametrize("version", [each for each in parts.CONTAINERDS if each >= "2"])
def test_without_credentials_pulls_are_the_transfer_services(
    tmp_path: Path, version: str, open_registry: registries.Registry
) -> None:
    with made(tmp_path, version) as node:
        node.registries.unlink()
        node.start()
        check_lazily(node, f"{open_registry.address}/lazy:1", open_registry)


def test_credentials_that_come_later(newest: nodes.Node, lazy: str, registry: registries.Registry) -> None:
    node = newest
    node.registries.unlink()
    node.start()
    done = node.run("run", "--rm", lazy, "/bin/cat", "/early")
    assert done.returncode == 125
    login = {"auth": {"username": registries.USER, "password": registries.PASSWORD}}
    registries.say(node, {"configs": {registry.address: login}})
    check_lazily(node, lazy, registry)


def test_what_goes_on_without_the_node(newest: nodes.Node, lazy: str) -> None:
    node = newest
    node.start()
    script = "while [ ! -e /go ]; do sleep 0.1; done; cat /late; exec sleep 1000"
    node.ok("run", "-d", "--name", "kept", lazy, "/bin/sh", "-c", script)
    pid, shown = daemon(node), layers(node)
    for end in (node.kill, node.stop):
        end()
        assert (daemon(node), layers(node)) == (pid, shown)
        node.start()
        assert node.children()[DAEMON]["pid"] == pid
    node.ok("exec", "kept", "/bin/sh", "-c", "echo >/go")
    nodes.until(lambda: node.ok("logs", "kept") == "late\n", "what was never read before is there")
    assert node.ok("run", "--rm", lazy, "/bin/cat", "/early") == "early\n"
    node.ok("rm", "-f", "kept")


def test_a_daemon_that_is_killed_is_started_again(newest: nodes.Node, lazy: str) -> None:
    node = newest
    node.start()
    node.ok("run", "-d", "--name", "broken", lazy, "/bin/sleep", "1000")
    pid, containerd = daemon(node), node.children()["containerd"]["pid"]
    os.kill(pid, signal.SIGKILL)
    nodes.until(lambda: node.children()[DAEMON]["pid"] not in {0, pid}, "it is started again")
    nodes.until(lambda: node.children()[DAEMON]["state"] == "ready", "it is ready again")
    assert node.children()["containerd"]["pid"] == containerd
    # Its running containers have lost what they hadn't read; new ones have all.
    # (a containerd that was refused a connection waits a second for its next try)
    nodes.until(lambda: node.run("run", "--rm", lazy, "/bin/cat", "/late").stdout == b"late\n", "the next one runs")
    node.ok("rm", "-f", "broken")
    assert len(layers(node)) == 2


def test_it_goes_when_its_node_is_uninstalled(newest: nodes.Node, lazy: str) -> None:
    node = newest
    node.start()
    node.ok("run", "-d", "--name", "left", lazy, "/bin/sleep", "1000")
    node.kill()
    assert layers(node)
    node.ok("uninstall", "--yes", "--data-dir", str(node.data_dir))
    assert nodes.named(node, DAEMON) == []
    assert node.mounts() == []
    assert not node.data_dir.exists()


@pytest.mark.parametrize("version", [pytest.param(each, id=each) for each in parts.CONTAINERDS if each >= "1.7"])
def test_beside_ours_on_one_node(
    tmp_path: Path, version: str, lazy: str, ordinary: Path, store_images: dict[int, storeimages.StoreImage]
) -> None:
    """Each pod has the snapshotter that its runtime class is named after."""
    image = store_images[50]
    with made(tmp_path, version) as node:
        node.snapshotter = "nix"
        node.arguments += ["--also-snapshotter", "stargz", "--also-snapshotter", "overlayfs"]
        node.start()
        assert node.ok("run", "--rm", image.reference, "--", "/bin/cat", image.link) == "a plain file\n"
        assert layers(node) == []
        assert node.ok("run", "--rm", "--runtime", "stargz", lazy, "/bin/cat", "/early") == "early\n"
        assert len(layers(node)) == 2
        node.ok("image", "load", str(ordinary))
        assert node.ok("run", "--rm", "localhost/ordinary:1", "/bin/echo", "ordinary") == "ordinary\n"
        done = node.run("run", "--rm", "--runtime", "stargz", image.reference, "--", "/bin/true")
        assert done.returncode == 125
        assert "which the snapshotter stargz can't run" in done.stderr.decode()
        assert set(node.children()) == {"containerd", DAEMON}
