"""What pods take from the node: where they look names up, and the runtimes that it found."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nixlet.containers import model
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


@pytest.mark.parametrize("version", parts.CONTAINERD_PARAMETERS)
def test_a_pod_has_names_of_its_own(own: nodes.Node, store_images: dict[int, storeimages.StoreImage]) -> None:
    own.start()
    image, cat = store_images[1].reference, ["--", "/bin/cat", "/etc/hosts", "/etc/hostname"]
    local = "127.0.0.1\tlocalhost\n"
    text = own.ok("run", "--rm", "--name", "web", "--add-host", "db:192.0.2.1", image, *cat)
    assert text.startswith(local)
    assert re.search(r"\n10\.163\.34\.\d+\tweb\n192\.0\.2\.1\tdb\nweb\n$", text)
    alone = own.ok("run", "--rm", "--name", "web", "--network", "none", image, *cat)
    assert alone.startswith(local)
    assert alone.endswith("ip6-allrouters\nweb\n")
    host = own.ok("run", "--rm", "--network", "host", "--add-host", "db:192.0.2.1", image, *cat)
    assert host == f"{Path('/etc/hosts').read_text()}192.0.2.1\tdb\n{Path('/etc/hostname').read_text()}"
    # Its containers share the file, but for one that has its own.
    aliases = [{"ip": "192.0.2.1", "hostnames": ["db", "db.example"]}]
    script = "echo 192.0.2.2 more >> /etc/hosts"
    volumes = [{"name": "own", "hostPath": {"path": "/etc/hostname"}}]
    first: dict[str, Any] = {"name": "first", "image": image, "command": ["/bin/sh", "-c", script]}
    second: dict[str, Any] = {"name": "second", "image": image, "command": ["/bin/cat", "/etc/hosts"]}
    second["volumeMounts"] = [{"name": "own", "mountPath": "/etc/hosts"}]
    manifest = nodes.manifest(
        "shared", image, command=["/bin/cat", "/etc/hosts"], hostAliases=aliases, volumes=volumes, hostname="front",
        initContainers=[first, second], container={"securityContext": {"readOnlyRootFilesystem": True}},
    )  # fmt: skip
    shared = own.ok("kube", "play", "--wait", "-", stdin=manifest)
    assert re.search(r"\tfront\n192\.0\.2\.1\tdb db\.example\n192\.0\.2\.2 more\n$", shared)
    refused = own.run("run", "--rm", "-p", "[2001:db8::1]:8080:80", image, *cat)
    assert (refused.returncode, b"pods have no IPv6 addresses here" in refused.stderr) == (125, True), refused.stderr
    nodes.until(lambda: own.crictl("pods", "-q") == "", "nothing of them is left")


def test_a_full_bridge_is_told_in_words(own: nodes.Node, store_images: dict[int, storeimages.StoreImage]) -> None:
    own.start()
    image = store_images[1].reference
    own.ok("run", "--rm", image, "--", "/bin/true")
    batch = []
    for number in range(model.BRIDGE_PORTS):
        batch += [
            f"link add nixf{number} type veth peer name nixg{number}",
            f"link set nixf{number} master {own.bridge}",
        ]
    try:
        # The last may find the bridge full already.
        subprocess.run(
            ["ip", "-force", "-batch", "-"], input="\n".join(batch).encode(), capture_output=True, check=False
        )
        full = own.run("run", "--rm", image, "--", "/bin/true")
        assert full.returncode == 125
        assert f"error: the bridge {own.bridge} is full: the kernel connects 1,023 pods" in full.stderr.decode()
        found = own.run("doctor", "--bridge", own.bridge).stdout.decode()
        assert f"the bridge is full: {own.bridge}: 1,023 of 1,023 ports are in use" in found
    finally:
        ends = "\n".join(f"link del nixf{number}" for number in range(model.BRIDGE_PORTS)).encode()
        subprocess.run(["ip", "-force", "-batch", "-"], input=ends, capture_output=True, check=False)
    assert own.ok("run", "--rm", image, "--", "/bin/echo", "room") == "room\n"


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
    nodes.until(lambda: len(own.crictl("pods", "-q").split()) == 1, "nothing of the others is left")


def runtime_of(node: nodes.Node, played: dict[str, Any]) -> tuple[str, str]:
    """The runtime of a pod, and the program that ran its container."""
    handler = json.loads(node.crictl("inspectp", played["id"]))["status"]["runtimeHandler"]
    details = json.loads(node.crictl("inspect", played["containers"][0]["id"]))["info"]
    return handler, details["runtimeOptions"]["binary_name"]
