"""How often a node starts a Nix daemon, or connects to one: at most once for an image, however many layers it has."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nixlet.store import closures, paths
from support import image_archives, nixdaemons, nixstore, nodes, parts, registries, storeimages

#: Gives a node, and how many daemons were asked so far.
Asked = tuple[nodes.Node, Callable[[], int]]


@pytest.fixture(
    params=[("processes", "1.6.20"), ("processes", parts.CONTAINERDS[-1]), ("connections", "1.6.20")], ids=str
)
def asked(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Asked]:
    """A node that starts its daemons itself, and one that finds a socket."""
    how, version = request.param
    arguments = ["--containerd", str(parts.containerd(version))]
    (tmp_path / "bin").mkdir()
    started = nixdaemons.Started(tmp_path / "bin", os.environ)
    if how == "processes":
        node = nodes.Node(35, tmp_path, *arguments, environment=started.environment)
        with nodes.cleaned_up(node):
            node.start()
            yield node, lambda: len(started.pids)
            nodes.until(lambda: not started.running, "a Nix daemon stays beside a node at rest")
            node.stop()
    else:
        with nixdaemons.Listening.at(tmp_path / "nix.sock", os.environ) as listening:
            node = nodes.Node(35, tmp_path, *arguments, environment={"NIX_DAEMON_SOCKET_PATH": str(listening.socket)})
            with nodes.cleaned_up(node):
                node.start()
                yield node, lambda: listening.connections
                node.stop()


def image_of_three(archives: Path) -> Path:
    """An image with three Nix layers that share no closure, and an ordinary one."""
    annotations: list[dict[str, str] | None] = [None]
    layers = [image_archives.tar({"own": b""})]
    for number in range(3):
        made = storeimages.make(archives, 5, salt=f"three{number}")
        annotations.append(dict(closures.ClosureReference(paths.parse(made.info)).annotations()))
        layers.append(image_archives.tar({f"own{number}": b""}))
    manifest, blobs = image_archives.image(layers, annotations=annotations)
    files = {
        "oci-layout": b'{"imageLayoutVersion":"1.0.0"}',
        "index.json": image_archives.index_json(image_archives.entry(manifest)),
        **blobs,
    }
    archive = archives / "three.tar"
    archive.write_bytes(image_archives.tar(files))
    return archive


def test_an_image_takes_one_daemon_at_most(asked: Asked, archives: Path, tmp_path: Path) -> None:
    """Pulled as an archive, as one in the store, or from a registry, of which containerd unpacks layer by layer; or loaded."""
    node, count = asked
    archive = image_of_three(archives)
    stored = subprocess.run(["nix-store", "--add", str(archive)], capture_output=True, text=True, check=True)
    in_store = stored.stdout.strip()
    try:
        with registries.running(tmp_path / "registry", 5035) as registry:
            registry.push(archive, "three:1")
            names = (f"nix:0{archive}", f"nix:0{in_store}", f"{registry.address}/three:1", "localhost/three:1")
            for name in names:
                before = count()
                if name.startswith("localhost/"):
                    node.ok("image", "load", "--ref", name, str(archive))
                else:
                    node.crictl("pull", name)
                assert count() - before <= 1
                assert count()
                shown = json.loads(node.crictl("inspecti", name))
                assert len(shown["info"]["imageSpec"]["rootfs"]["diff_ids"]) == 4
                # Nothing of it is left for the next.
                node.crictl("rmi", name)
    finally:
        nixstore.delete(in_store)
