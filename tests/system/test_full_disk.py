"""The disk of a running node gets full: nothing that was promised is lost, and all goes on when there is room."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import disks, nodes, storeimages

pytestmark = pytest.mark.slow


@pytest.fixture
def small_node(tmp_path: Path) -> Iterator[nodes.Node]:
    """A node whose data are on a disk of 96 MiB."""
    made = nodes.Node(6, tmp_path)
    with disks.disk("ext4", made.data_dir, 96), nodes.cleaned_up(made):
        made.start()
        yield made


def ask(node: nodes.Node) -> str:
    """Whether the node is ready, and why not."""
    argv = ["curl", "-s", "--unix-socket", str(node.state_dir / "health.sock"), "http://localhost/readyz"]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def test_a_node_whose_disk_gets_full(small_node: nodes.Node, store_images: dict[int, storeimages.StoreImage]) -> None:
    node, image, other = small_node, store_images[50], store_images[500]
    node.ok("run", "-d", "--name", "steady", image.reference, "--", "/bin/sleep", "1000")
    assert ask(node) == "ok"
    disks.fill(node.data_dir)
    for argv in (["run", "--rm", image.reference, "--", "/bin/true"], ["image", "load", str(other.archive)]):
        done = node.run(*argv)
        assert done.returncode == 125
        said = done.stderr.decode()
        assert str(node.data_dir) in said
        assert "no space left on device" in said.lower()
        assert "internal error" not in said
    assert f"[-]disk failed: {node.data_dir} is full" in ask(node)
    # What runs goes on, and what is not needed can be taken away.
    assert node.ok("exec", "steady", "/bin/echo", "here") == "here\n"
    node.ok("stop", "-t", "0", "steady")
    node.ok("rm", "steady")
    disks.make_room(node.data_dir)
    # Without a restart, all goes on.
    assert ask(node) == "ok"
    node.ok("image", "load", str(other.archive))
    assert node.ok("run", "--rm", image.reference, "--", "/bin/cat", image.link) == "a plain file\n"
    nodes.until(lambda: node.crictl("pods", "-q") == "", "nothing of it is left")
