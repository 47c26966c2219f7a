"""What pods take from the node: where they look names up, and the runtimes that it found."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import nodes, parts, storeimages


@pytest.fixture
def own(tmp_path: Path) -> Iterator[nodes.Node]:
    """A node that is not started yet."""
    made = nodes.Node(34, tmp_path, "--containerd", str(parts.containerd(parts.CONTAINERDS[-1])))
    with nodes.cleaned_up(made):
        yield made


def test_pods_look_names_up_where_the_node_says(
    own: nodes.Node, tmp_path: Path, store_images: dict[int, storeimages.StoreImage]
) -> None:
    file = tmp_path / "resolv.conf"
    own.arguments += ["--resolv-conf", str(file)]
    assert own.launch().wait(60) == 125
    assert f"{file}, where pods are to look names up, can't be read" in own.log.read_text()
    file.write_text("# of the node\nsearch a.example\nnameserver 192.0.2.7\noptions ndots:3\n")
    own.start()

    def seen(*options: str) -> str:
        return own.ok("run", "--rm", *options, store_images[1].reference, "--", "/bin/cat", "/etc/resolv.conf")

    assert seen() == "search a.example\nnameserver 192.0.2.7\noptions ndots:3\n"
    assert seen("--network", "host") == Path("/etc/resolv.conf").read_text()


@pytest.mark.parametrize("loopback", [True, False])
def test_a_host_that_looks_names_up_in_itself(
    own: nodes.Node, tmp_path: Path, store_images: dict[int, storeimages.StoreImage], *, loopback: bool
) -> None:
    """With a mount namespace of its own for the node, in which the host's file is another."""
    text = "nameserver 127.0.0.53\n" if loopback else "nameserver 192.0.2.9\n"
    (tmp_path / "host").write_text(text)
    own.wrapper = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        'mount --bind "$0" /etc/resolv.conf && exec "$@"',
        f"{tmp_path}/host",
    ]
    own.start()
    assert ("names no server that pods can reach: they look names up at 8.8.8.8" in own.log.read_text()) is loopback
    image = store_images[1].reference
    seen = own.ok("run", "--rm", image, "--", "/bin/cat", "/etc/resolv.conf")
    assert seen == ("nameserver 8.8.8.8\n" if loopback else text)


@pytest.mark.slow
def test_every_containerd_runs_a_pod_by_another_runtime(
    node: nodes.Node, store_images: dict[int, storeimages.StoreImage]
) -> None:
    """By the name that the node found for it: in a manifest, and on the command line."""
    image = store_images[1].reference
    manifest = nodes.manifest("by-crun", image, command=["/bin/sh", "-c", "exec sleep 1000"], runtimeClassName="crun")
    played = json.loads(node.ok("kube", "play", "--output", "json", "-", stdin=manifest))
    try:
        assert json.loads(node.crictl("inspectp", played[0]["id"]))["status"]["runtimeHandler"] == "crun"
        details = json.loads(node.crictl("inspect", played[0]["containers"][0]["id"]))["info"]
        assert details["runtimeOptions"]["binary_name"] == shutil.which("crun")
    finally:
        node.remove_all_pods()
    assert node.ok("run", "--rm", "--runtime", "crun", image, "--", "/bin/echo", "hello") == "hello\n"
    done = node.run("run", "--rm", "--runtime", "kata", image, "--", "/bin/true")
    assert done.returncode == 125
    assert done.stderr.decode().startswith("error: the node's containerd has no runtime kata\n")
    assert node.crictl("pods", "-q") == ""
