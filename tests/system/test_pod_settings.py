"""What pods take from the node: where they look names up, and the runtimes that it found."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import nodes, parts, storeimages

pytestmark = pytest.mark.slow


@pytest.fixture
def version() -> str:
    return parts.CONTAINERDS[-1]


@pytest.fixture
def own(tmp_path: Path, version: str) -> Iterator[nodes.Node]:
    """A node that is not started yet."""
    made = nodes.Node(34, tmp_path, "--containerd", str(parts.containerd(version)))
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


@pytest.mark.parametrize("version", parts.CONTAINERD_PARAMETERS)
def test_every_containerd_runs_a_pod_by_another_runtime(
    own: nodes.Node, tmp_path: Path, store_images: dict[int, storeimages.StoreImage]
) -> None:
    # Like NVIDIA's, it has a real runc behind it; crun refuses machines that have both versions of cgroups, as this one.
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "nvidia-container-runtime").symlink_to("/usr/sbin/runc")
    own.environment["PATH"] = f"{programs}:{own.environment['PATH']}"
    own.start()
    manifest = nodes.manifest(
        "gpu", store_images[1].reference, command=["/bin/sleep", "1000"], runtimeClassName="nvidia"
    )
    played = json.loads(own.ok("kube", "play", "--output", "json", "-", stdin=manifest))
    assert runtime_of(own, played[0]) == ("nvidia", f"{programs}/nvidia-container-runtime")
    image = store_images[1].reference
    assert own.ok("run", "--rm", "--runtime", "nvidia", image, "--", "/bin/echo", "hello") == "hello\n"
    done = own.run("run", "--rm", "--runtime", "kata", image, "--", "/bin/true")
    assert done.returncode == 125
    assert done.stderr.decode().startswith("error: the node's containerd has no runtime kata\n")
    assert len(own.crictl("pods", "-q").split()) == 1


def runtime_of(node: nodes.Node, played: dict[str, Any]) -> tuple[str, str]:
    """The runtime of a pod, and the program that ran its container."""
    handler = json.loads(node.crictl("inspectp", played["id"]))["status"]["runtimeHandler"]
    details = json.loads(node.crictl("inspect", played["containers"][0]["id"]))["info"]
    return handler, details["runtimeOptions"]["binary_name"]
