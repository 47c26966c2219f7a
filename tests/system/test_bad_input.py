"""Bad input gets one clear sentence, the right exit status, no traceback, and leaves nothing behind."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nixlet.host import mounts
from support import image_archives, nodes, parts, storeimages

pytestmark = pytest.mark.slow

HASH = "0" * 32


def trace(node: nodes.Node) -> dict[str, object]:
    """What a node has, to compare before and after."""
    node.collect_garbage()
    agent = node.data_dir / "agent"
    return {
        "mounts": sorted(node.mounts()),
        "containers": node.crictl("ps", "-aq"),
        "pods": node.crictl("pods", "-q"),
        "images": sorted(node.crictl("images", "-q").split()),
        "roots": sorted(str(path) for path in node.gc_roots.rglob("*")) if node.gc_roots.exists() else [],
        "snapshots": sorted(os.listdir(agent / "containerd/io.containerd.snapshotter.v1.nix/snapshots")),
        "logs": sorted(os.listdir(agent / "pods")),
        "temporary": sorted(str(path) for path in Path("/tmp").glob("nixlet*")),
    }


@pytest.fixture
def unchanged(any_node: nodes.Node) -> Iterator[nodes.Node]:
    """A node that is afterwards as it was before."""
    # What ran before gives back what it held in the background.
    seen = [trace(any_node)]

    def settled() -> bool:
        seen.append(trace(any_node))
        return seen[-1] == seen[-2] and seen[-1]["pods"] == ""

    nodes.until(settled, f"the node comes to rest: {seen[-1]}")
    before = seen[-1]
    yield any_node
    after = trace(any_node)
    for _ in range(100):
        if after == before:
            break
        # Snapshots and roots are freed in the background.
        time.sleep(0.1)
        after = trace(any_node)
    assert after == before


def refused(node: nodes.Node, image: str, *, status: int = 125) -> str:
    """Running an image must fail; the one sentence that says why."""
    done = node.run("run", "--rm", image)
    text = done.stderr.decode()
    assert done.returncode == status, text
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, text
    assert not done.stdout
    # crictl, which is to get no less, sees it too.
    assert told_to_crictl(node, image)
    return lines[0].removeprefix("error: ")


def told_to_crictl(node: nodes.Node, image: str) -> str:
    """What CRI says of an image that can't be pulled."""
    done = subprocess.run([*parts.crictl(node.node_socket), "pull", image], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    return done.stderr


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (
            "nix:0/tmp/nixlet-test-images/missing.tar",
            "/tmp/nixlet-test-images/missing.tar can't be opened: No such file",
        ),
        ("nix:0/etc/passwd", "/etc/passwd lies below none of the archive directories"),
        ("nix:0/tmp", "/tmp lies below none of the archive directories"),
        ("nix:0/etc/no-such-file", "/etc/no-such-file lies below none of the archive directories"),
        (f"nix:/nix/store/{HASH}-a.tar", "is not an image reference: its 0 is missing"),
        (f"nix:0/nix/store/{HASH}-nowhere.tar", f"{HASH}-nowhere.tar is not in the Nix store and can't be fetched"),
        ("nix:0/nix/store/../../etc/passwd", "is not an image reference"),
        ("nix:0/nix/store/short-x", "is not a store path below /nix/store"),
        ("nix:0", "is not an image reference"),
        ("UPPER", "is not an image reference|invalid reference|repository name must be lowercase"),
    ],
)
def test_references(unchanged: nodes.Node, image: str, sentence: str) -> None:
    assert re.search(sentence, refused(unchanged, image))


def test_an_archive_outside_the_store_has_one_answer(unchanged: nodes.Node, archives: Path, ordinary: Path) -> None:
    """Whoever creates a pod gets the same for all, but for the name; root at the command line, and the log, get the reason."""
    (archives / "text.tar").write_text("this is no archive\n" * 100)
    (archives / "cut.tar").write_bytes(ordinary.read_bytes()[:20_000])
    (archives / "link.tar").symlink_to(ordinary)
    (archives / "foreign.tar").write_bytes(ordinary.read_bytes())
    os.chown(archives / "foreign.tar", 65534, 65534)
    os.mkfifo(archives / "pipe.tar")
    reasons = {
        "text": "PATH is not an image archive: it is no tar file",
        "cut": "the image archive PATH ends too early",
        "link": "PATH is a symbolic link, which isn't followed",
        "foreign": "the image archive PATH belongs to user 65534, whom the node doesn't trust",
        "pipe": "PATH is not an image archive: it is no regular file",
        "absent": "the image archive PATH can't be opened: No such file or directory",
    }
    answers = set()
    for name, reason in reasons.items():
        path = f"{archives}/{name}.tar"
        assert refused(unchanged, f"nix:0{path}").replace(path, "PATH") == reason
        assert reason.replace("PATH", path) in unchanged.log.read_text()
        told = told_to_crictl(unchanged, f"nix:0{path}")
        (answer,) = set(re.findall("there is no image archive PATH.* on the way", told.replace(path, "PATH")))
        answers.add(answer)
        (archives / f"{name}.tar").unlink(missing_ok=True)
    assert len(answers) == 1


def test_a_store_path_that_is_no_archive(unchanged: nodes.Node) -> None:
    source = Path("/tmp/nixlet-test-images/no-archive.tar")
    source.write_text("this is no archive\n" * 100)
    path = subprocess.run(
        ["nix-store", "--add", str(source)], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert "is not an image archive" in refused(unchanged, f"nix:0{path}")
    directory = subprocess.run(["nix-store", "--add", str(source.parent)], capture_output=True, text=True, check=True)
    assert "is not an image archive" in refused(unchanged, f"nix:0{directory.stdout.strip()}")
    source.unlink()


def archive_with(annotations: dict[str, str], path: Path, **config: object) -> str:
    """An archive whose one layer has annotations; its reference."""
    layer = image_archives.tar({"etc/hello": b"x"})
    files = image_archives.oci([layer], name=None, annotations=[annotations], **config)
    path.write_bytes(image_archives.tar(files))
    return f"nix:0{path}"


@pytest.mark.parametrize(
    "named",
    ["/etc", "../..", "--help", "/tmp/x", "/nix/store", "/nix/store/../../etc", f"/nix/store/{HASH}-a\n/etc", ""],
)
@pytest.mark.parametrize("form", ["closure", "paths"])
def test_annotations_that_name_something_else_than_store_paths(
    unchanged: nodes.Node, archives: Path, named: str, form: str
) -> None:
    prefix = "containerd.io/snapshot"
    annotations = {f"{prefix}/nix-closure": named}
    if form == "paths":
        annotations = {f"{prefix}/nix-layer": "true", f"{prefix}/nix-store-path.0": named}
    image = archive_with(annotations, archives / "annotated.tar")
    assert "is not a store path below /nix/store" in refused(unchanged, image)


def test_an_annotation_that_names_a_path_which_nobody_has(unchanged: nodes.Node, archives: Path) -> None:
    prefix = "containerd.io/snapshot"
    annotations = {f"{prefix}/nix-layer": "true", f"{prefix}/nix-store-path.0": f"/nix/store/{HASH}-gone"}
    sentence = refused(unchanged, archive_with(annotations, archives / "gone.tar"))
    assert f"the store path /nix/store/{HASH}-gone is not in the Nix store and can't be fetched" in sentence


def test_a_layer_with_a_mount_point_that_its_closure_lacks(
    unchanged: nodes.Node, archives: Path, store_images: dict[int, storeimages.StoreImage]
) -> None:
    """Layers of equal content are one snapshot: a closure that leaves mount points empty would spoil other images."""
    real = store_images[1].paths[0]
    layer = image_archives.tar({f"nix/store/{HASH}-unfilled/x": b""})
    prefix = "containerd.io/snapshot"
    annotations = {f"{prefix}/nix-layer": "true", f"{prefix}/nix-store-path.0": str(real)}
    files = image_archives.oci([layer], name=None, annotations=[annotations])
    path = archives / "unfilled.tar"
    path.write_bytes(image_archives.tar(files))
    assert f"mount point for /nix/store/{HASH}-unfilled" in refused(unchanged, f"nix:0{path}")


def test_an_image_for_another_architecture(unchanged: nodes.Node, archives: Path) -> None:
    image = archive_with({}, archives / "arm.tar", architecture="arm64")
    assert "the image is for linux/arm64, this machine is linux/amd64" in refused(unchanged, image)


def test_a_manifest_that_asks_for_too_much(unchanged: nodes.Node, hello: str) -> None:
    manifest = f"""apiVersion: v1
kind: Pod
metadata:
  name: p
spec:
  containers:
    - name: c
      image: {hello}
      livenessProbe:
        exec: {{command: ["true"]}}
"""
    done = unchanged.run("kube", "play", "-", stdin=manifest.encode())
    assert done.returncode == 2
    sentence, hint = done.stderr.decode().splitlines()
    assert sentence == "error: standard input, line 9: spec.containers[0].livenessProbe is not supported"
    assert hint.startswith("hint: ")


@pytest.fixture
def loaded(any_node: nodes.Node, hello: str) -> str:
    any_node.ok("run", "--rm", hello)
    return hello


def test_a_container_that_cannot_start_leaves_no_pod(loaded: str, unchanged: nodes.Node, hello: str) -> None:
    done = unchanged.run("kube", "play", "-", stdin=nodes.manifest("bad", hello, command=["/no-such-command"]))
    assert done.returncode == 127


def test_without_a_node_the_verbs_say_so(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "nixlet", "ps", "--state-dir", str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 125
    assert done.stderr.startswith(f"error: no node runs at {tmp_path}\n")


# The start of a node.


def start_refused(directory: Path, *arguments: str, environment: dict[str, str] | None = None) -> str:
    """A node that must not start; what it says, in one sentence."""
    node = nodes.Node(6, directory, *arguments, environment=environment)
    with nodes.cleaned_up(node):
        process = node.launch()
        assert process.wait(60) in {125, 2}
        text = node.log.read_text()
        assert "Traceback" not in text
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, text
        assert node.mounts() == []
        assert nodes.processes_below(node.state_dir) == []
        return errors[0].removeprefix("error: ")


def test_containerd_is_not_installed(tmp_path: Path) -> None:
    assert start_refused(tmp_path, "--containerd", "no-containerd") == "no-containerd is not installed"


def test_the_cni_plugins_are_not_installed(tmp_path: Path) -> None:
    assert "the CNI plugins bridge, host-local" in start_refused(tmp_path, "--cni-bin-dir", str(tmp_path))


def test_nix_is_not_installed(tmp_path: Path) -> None:
    """A mount namespace without Nix's programs: what a machine without Nix looks like to the node."""
    hidden = [name for name in ("/usr/bin/nix-daemon", "/usr/bin/nix-store") if os.path.exists(name)]
    assert hidden
    script = "".join(f"mount --bind /dev/null {name}; " for name in hidden)
    node = nodes.Node(6, tmp_path)
    server = [sys.executable, "-m", "nixlet", "server", *node.arguments]
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", f'{script}exec "$@"', "sh", *server],
        env={**node.environment, "NIX_STATE_DIR": str(tmp_path / "no-state")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    shutil.rmtree(node.state_dir, ignore_errors=True)
    assert done.returncode == 125
    assert done.stderr.startswith(
        f'error: "nix" snapshotter cannot be enabled for "{node.data_dir}/agent/containerd", '
        'try using "overlayfs" or "native": nix-store not found in PATH: install nix (https://nixos.org/download) '
    )
    assert "hint: PATH is " in done.stderr


def test_no_root_rights(tmp_path: Path) -> None:
    """Root without the capability to mount, as in a container."""
    node = nodes.Node(6, tmp_path)
    argv = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-all", sys.executable, "-m", "nixlet", "server"]
    done = subprocess.run([*argv, *node.arguments], env=node.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 125
    assert done.stderr.startswith("error: a node needs root rights (CAP_SYS_ADMIN)\n")
    assert not node.data_dir.exists()


def test_a_socket_that_is_taken(tmp_path: Path) -> None:
    import socket

    node = nodes.Node(6, tmp_path)
    node.node_socket.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(str(node.node_socket))
        taken.listen()
        assert f"another process serves the socket {node.node_socket}" in start_refused(tmp_path)


def test_a_stale_socket_is_no_obstacle(tmp_path: Path) -> None:
    import socket

    node = nodes.Node(6, tmp_path)
    node.node_socket.parent.mkdir(parents=True)
    for path in (node.node_socket, node.containerd_socket):
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(path))
    with nodes.cleaned_up(node):
        node.start()


def test_a_data_directory_on_an_overlay(tmp_path: Path) -> None:
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    options = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    mounts.mount("overlay", str(tmp_path / "merged"), "overlay", 0, options)
    try:
        sentence = start_refused(tmp_path / "merged")
        root = f"{tmp_path}/merged/data/agent/containerd"
        assert sentence.startswith(
            f'"nix" snapshotter cannot be enabled for "{root}", try using "overlayfs" or "native": '
            f"containers can't be given a root file system below {root}"
        )
    finally:
        mounts.unmount(str(tmp_path / "merged"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--pod-cidr", "10.0.0.0/33"], "--pod-cidr '10.0.0.0/33' is not a network"),
        (["--bridge", "a/b"], "--bridge 'a/b' is no interface name"),
        (["--state-dir", "/run/" + "x" * 80], "is longer than 60 characters"),
        (["--snapshotter", "Zfs"], "--snapshotter 'Zfs' is no snapshotter's name"),
        (["--strategy", "best"], "--strategy 'best' is not known"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    assert sentence in start_refused(tmp_path, *arguments)
