"""A node with snapshotters of containerd's own, with a person's templates and drop-ins, and with images of one's choice."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import image_archives, nodes, parts

pytestmark = pytest.mark.slow

PAUSE = "localhost/pause:1"


@pytest.fixture(params=parts.CONTAINERD_PARAMETERS)
def fresh(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[nodes.Node]:
    """A node that is not started yet, for each containerd."""
    version: str = request.param
    made = nodes.Node(31, tmp_path, "--containerd", str(parts.containerd(version)))
    with nodes.cleaned_up(made):
        yield made


def config_dir(node: nodes.Node) -> Path:
    directory = node.data_dir / "agent/etc/containerd"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def user_files(node: nodes.Node) -> str:
    """What the names of a person's files begin with, for the configuration that this node's containerd speaks."""
    argv = [node.arguments[node.arguments.index("--containerd") + 1], "config", "default"]
    printed = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    (version,) = (line.split()[-1] for line in printed.splitlines() if line.startswith("version = "))
    return "config" if version == "2" else f"config-v{version}"


@pytest.mark.parametrize("snapshotter", ["overlayfs", "native"])
def test_containerds_own_snapshotters(fresh: nodes.Node, ordinary: Path, hello: str, snapshotter: str) -> None:
    fresh.arguments += ["--snapshotter", snapshotter]
    fresh.start()
    fresh.ok("image", "load", str(ordinary))
    assert "bin" in fresh.ok("run", "--rm", "localhost/ordinary:1", "/bin/ls", "/").split()
    used = fresh.ok("ctr", "snapshots", "--snapshotter", snapshotter, "ls").splitlines()[1:]
    assert used
    # Images of store paths need ours, and the node says so.
    done = fresh.run("run", "--rm", hello)
    assert done.returncode == 125
    assert f"which the snapshotter {snapshotter} can't run" in done.stderr.decode()
    assert "start the node with --snapshotter nix" in done.stderr.decode()


def test_a_snapshotter_that_containerd_does_not_know(fresh: nodes.Node) -> None:
    """Other names are containerd's business, and it says what is wrong."""
    fresh.arguments += ["--snapshotter", "no-such-thing"]
    assert fresh.launch().wait(90) == 125
    assert "no-such-thing" in fresh.log.read_text()
    assert "Traceback" not in fresh.log.read_text()
    assert fresh.mounts() == []


def test_templates_drop_ins_and_a_runtime_of_ones_own(fresh: nodes.Node, ordinary: Path) -> None:
    directory, stem = config_dir(fresh), user_files(fresh)
    plugin = "io.containerd.grpc.v1.cri" if stem == "config" else "io.containerd.cri.v1.runtime"
    runtimes = f"plugins.'{plugin}'.containerd.runtimes"
    (directory / f"{stem}.toml.tmpl").write_text(
        '{{ template "base" . }}\n'
        f"[{runtimes}.other]\nruntime_type = 'io.containerd.runc.v2'\n"
        f"[{runtimes}.other.options]\nBinaryName = '/usr/sbin/runc'\nRoot = '{fresh.state_dir}/other'\n"
    )
    drop_ins = directory / f"{stem}.toml.d"
    drop_ins.mkdir()
    (drop_ins / "10-shims.toml").write_text(f"[plugins.'{plugin}'.containerd]\ndefault_runtime_name = 'other'\n")
    fresh.start()
    fresh.ok("image", "load", str(ordinary))
    fresh.ok("run", "-d", "--name", "up", "localhost/ordinary:1", "/bin/sleep", "1000")
    # The runtime's own state says that it was this one.
    assert len(list((fresh.state_dir / "other/k8s.io").iterdir())) == 2
    rendered = (directory / "config.toml").read_text()
    assert f"# With {directory}/{stem}.toml.tmpl\n" in rendered
    assert fresh.ok("config", "render", *fresh.arguments) == rendered


def test_a_pause_image_of_ones_own(fresh: nodes.Node, ordinary: Path, archives: Path, busybox_layer: bytes) -> None:
    fresh.arguments += ["--pause-image", PAUSE]
    fresh.start()
    files = image_archives.oci([busybox_layer], name=PAUSE, config={"Entrypoint": ["/bin/sleep", "100000"]})
    archive = archives / "pause.tar"
    archive.write_bytes(image_archives.tar(files))
    for each in (ordinary, archive):
        fresh.ok("image", "load", str(each))
    assert fresh.ok("run", "--rm", "localhost/ordinary:1", "/bin/echo", "up") == "up\n"
    fresh.ok("run", "-d", "--name", "held", "localhost/ordinary:1", "/bin/sleep", "1000")
    (sandbox,) = json.loads(fresh.crictl("pods", "-o", "json"))["items"]
    info = json.loads(fresh.crictl("inspectp", sandbox["id"]))["info"]
    assert info["image"] == PAUSE
    assert Path(f"/proc/{info['pid']}/cmdline").read_bytes().split(b"\0")[:2] == [b"/bin/sleep", b"100000"]


def test_two_changes_that_contradict_each_other(fresh: nodes.Node) -> None:
    directory, stem = config_dir(fresh), user_files(fresh)
    drop_ins = directory / f"{stem}.toml.d"
    drop_ins.mkdir()
    (drop_ins / "10.toml").write_text("oom_score = 1\n")
    (drop_ins / "20.toml").write_text("oom_score = { a = 1 }\n")
    assert fresh.launch().wait(60) == 2
    assert f"error: {drop_ins}/20.toml: oom_score is a table here, and a number in {drop_ins}/10.toml" in (
        fresh.log.read_text()
    )
