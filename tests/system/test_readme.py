"""Every block of commands of the README does what it is there for, word for word but for the places and names of the test's own."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from nixlet.node.settings import registries_file
from support import alone, kubeagents, kubernetes, nodes, parts, readme, storeimages, systemd

pytestmark = pytest.mark.slow

VENV = Path(sys.executable).parents[1]

#: The blocks, by their headings, and what runs them.
RUN_BY = {
    "Try it": "test_quickstart.py",
    "Install it": "test_install.py",
    "Use it": "test_the_verbs",
    "Without root": "test_rootless.py",
    "Under systemd": "test_a_node_under_systemd",
    "A Kubernetes cluster": "test_a_cluster",
    "With a containerd of your own": "test_a_containerd_of_ones_own",
    "Work on it": "what runs this test",
}


def test_no_block_is_left_out() -> None:
    text = (readme.ROOT / "README.md").read_text()
    assert text.count("```sh\n") == sum(len(readme.blocks("sh", heading)) for heading in RUN_BY)
    # Nor are there commands in blocks of other kinds.
    assert not re.findall(r"^    (?:\./|nixlet |systemctl |crictl )", text, re.MULTILINE)


@pytest.fixture
def tools(tmp_path: Path, ordinary: Path) -> Path:
    """Programs that the README takes to be there."""
    directory = tmp_path / "tools"
    directory.mkdir()
    (directory / "crictl").symlink_to(parts.tool("crictl"))
    # Docker's own daemon isn't what this is about: what it would save is.
    (directory / "docker").write_text(f'#!/bin/sh\n[ "$1" = save ] && exec cat {ordinary}\n')
    (directory / "docker").chmod(0o755)
    return directory


def shell(command: str, cwd: Path, environment: Mapping[str, str], given: str = "") -> str:
    argv = ["bash", "-c", f"set -o pipefail; {command}"]
    done = subprocess.run(argv, cwd=cwd, env=environment, input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture
def node(tmp_path: Path) -> Iterator[nodes.Node]:
    """A node whose places are said by variables alone, so that no command needs flags for them."""
    made = nodes.Node(7, tmp_path)
    flags = made.arguments
    for flag, value in zip(flags[::2], flags[1::2], strict=True):
        made.environment[f"NIXLET_{flag.removeprefix('--').replace('-', '_').upper()}"] = value
    made.environment["NIX_CONFIG"] = "build-users-group =\nsandbox = false\nsubstituters ="
    with nodes.cleaned_up(made):
        yield made


def test_the_verbs(node: nodes.Node, tools: Path, ordinary: Path, tmp_path: Path) -> None:
    environment = {**node.environment, "PATH": f"{VENV}/bin:{tools}:{os.environ['PATH']}"}
    file = readme.checkout(tmp_path / "checkout", readme.image_expressions()["without"])
    here = file.parent
    shell("nix-build image.nix", here, environment)
    image = f"nix:0{os.path.realpath(here / 'result')}"
    (here / "pod.yaml").write_bytes(nodes.manifest("readme", image, command=["/bin/busybox", "true"]))
    (here / "archive.tar").symlink_to(ordinary)
    first, verbs, crictl = readme.blocks("sh", "Use it")
    doctor, server = readme.commands(first)
    looked = subprocess.run(["bash", "-c", doctor], env=environment, capture_output=True, text=True, check=False)
    assert (looked.returncode, looked.stderr) == (0, ""), looked.stdout
    with (
        node.log.open("wb") as log,
        subprocess.Popen(["bash", "-c", f"exec {server}"], env=environment, stderr=log) as process,
    ):
        node._process = process
        try:
            node.await_ready()
            printed = {}
            for command in readme.commands(verbs):
                if " -it " in command:
                    terminal = f"script -qec {command!r} /dev/null"
                    assert "busybox" in shell(terminal, here, environment, "/bin/busybox\nexit\n").lower()
                    continue
                printed[command] = shell(command, here, environment)
            assert next(text for command, text in printed.items() if "echo hello" in command) == "hello\n"
            assert "web" in printed["nixlet ps -a"]
            (pull,) = readme.commands(crictl)
            assert "sha256" in shell(pull.replace("/run/nixlet", str(node.state_dir)), here, environment)
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
    assert node.ok("uninstall", "--yes").startswith("Removed:")
    (here / "result").unlink()


def test_a_node_under_systemd(node: nodes.Node, tmp_path: Path) -> None:
    here = tmp_path / "checkout"
    (here / "deploy").mkdir(parents=True)
    (here / ".venv").symlink_to(VENV)
    runtime, programs = Path("/run/nixlet-test/systemd"), tmp_path / "bin"
    programs.mkdir()
    runtime.mkdir(mode=0o700, exist_ok=True)
    own = {name: value for name, value in node.environment.items() if name.startswith(("NIXLET_", "PATH"))}
    variables = "".join(f'Environment="{name}={value}"\n' for name, value in own.items())
    unit = (readme.ROOT / "deploy/nixlet.service").read_text().replace("/usr/local/bin", str(programs))
    (here / "deploy/nixlet.service").write_text(unit.replace("[Service]\n", f"[Service]\n{variables}"))
    manager = systemd.Manager(tmp_path / "config", runtime)
    with manager.running():
        (block,) = readme.blocks("sh", "Under systemd")
        for command in readme.commands(block):
            theirs = command.replace("/usr/local/bin", str(programs)).replace("systemctl", "systemctl --user")
            shell(theirs.replace("/etc/systemd/system", str(manager.units)), here, manager.environment)
        assert manager.show("nixlet", "ActiveState") == "active"
        assert node.version()["node"] is not None
        manager.ok("disable", "--now", "nixlet")
    node.ok("uninstall", "--yes")


@contextlib.contextmanager
def running(node: nodes.Node, command: str) -> Iterator[None]:
    """A node that a command line starts, and that is ended when it was enough; its settings are variables."""
    flags = node.arguments
    settings = {}
    for flag, value in zip(flags[::2], flags[1::2], strict=True):
        if flag != "--kubernetes-bin-dir":
            settings[f"NIXLET_{flag.removeprefix('--').replace('-', '_').upper()}"] = value
    node.log.parent.mkdir(exist_ok=True)
    argv = [*node.wrapper, "bash", "-c", f"exec {command}"]
    path = f"{VENV}/bin:{node.environment['PATH']}"
    with (
        node.log.open("wb") as log,
        subprocess.Popen(argv, env={**node.environment, **settings, "PATH": path}, stderr=log) as process,
    ):
        node._process = process
        node.await_ready()
        yield
        assert node.stop() == 0


def test_a_cluster(tmp_path: Path, hello: str) -> None:
    (tmp_path / "result").symlink_to(hello.removeprefix("nix:0"))
    cluster = kubernetes.Cluster(65, tmp_path / "server")
    (first, second) = readme.blocks("sh", "A Kubernetes cluster")
    server, *further = (
        command.replace("/opt/kubernetes/bin", str(parts.kubernetes())) for command in readme.commands(first)
    )
    with kubernetes.cleaned_up(cluster), running(cluster, server):
        cluster.await_node()
        script = " ; ".join(further).replace("/etc/nixlet/kubeconfig.yaml", str(cluster.kubeconfig))
        environment = {**cluster.environment, "PATH": f"{parts.kubernetes()}:{os.environ['PATH']}"}
        shell(script, tmp_path, environment)
        cluster.await_phase("hello", "Succeeded")
        assert cluster.kubectl("logs", "hello") == "Hello, world!\n"
        agent = kubeagents.Agent(64, tmp_path / "agent", cluster)
        (join,) = readme.commands(second)
        join = join.replace("/opt/kubernetes/bin", str(parts.kubernetes())).replace("ssh SERVER ", "")
        join = join.replace("SERVER", cluster.address).replace("/var/lib/nixlet", str(cluster.data_dir))
        with kubeagents.cleaned_up(agent), running(agent, join):
            kubernetes.until(agent.is_ready, "the agent is ready")


@pytest.mark.parametrize("version", parts.CONTAINERDS)
def test_a_containerd_of_ones_own(
    tmp_path: Path, version: str, tools: Path, store_images: dict[int, storeimages.StoreImage]
) -> None:
    with alone.cleaned_up(4, tmp_path) as place:
        environment = {**os.environ, "NIX_CONFIG": "substituters =", "PATH": f"{VENV}/bin:{tools}:{os.environ['PATH']}"}

        def own(text: str) -> str:
            text = text.replace("/run/nix-snapshotter/nix-snapshotter.sock", str(place.socket))
            text = text.replace("/run/containerd/containerd.sock", str(place.containerd_socket))
            return text.replace("/var/lib/containerd/io.containerd.snapshotter.v1.nix", str(place.root))

        ours, old, new = map(own, readme.blocks("toml", "With a containerd of your own"))
        theirs = old if version.startswith("1.") else new
        (tmp_path / "ours.toml").write_text(ours)
        # The machine's own places stay as they are.
        (tmp_path / "theirs.toml").write_text(
            f'{theirs}\n[plugins."io.containerd.internal.v1.opt"]\n  path = "{tmp_path}/opt"\n'
        )
        load, uninstall = (
            own(readme.commands(block)[0]) for block in readme.blocks("sh", "With a containerd of your own")
        )
        program = parts.containerd(version)
        dump = [str(program), "--config", f"{tmp_path}/theirs.toml", "config", "dump"]
        dumped = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
        assert re.search(r"^ *snapshotter = .nix.$", dumped, re.MULTILINE)
        (tmp_path / "result").symlink_to(store_images[50].archive)
        snapshotter = ["nixlet", "snapshotter", "--config", f"{tmp_path}/ours.toml"]
        containerd = [str(program), f"--config={tmp_path}/theirs.toml", f"--address={place.containerd_socket}"]
        containerd += [f"--root={tmp_path}/containerd", f"--state={place.run}/state"]
        beside = {**environment, "PATH": f"{program.parent}:{environment['PATH']}"}
        with (
            place.started(snapshotter, place.socket, environment),
            place.started(containerd, place.containerd_socket, beside) as process,
        ):
            assert process.poll() is None, place.log.read_text()
            name = shell(load, tmp_path, environment).split()[-1]
            run = f"{program.parent}/ctr -a {place.containerd_socket} -n k8s.io"
            shown = shell(f"{run} run --rm --snapshotter nix {name} x /bin/ls /nix/store", tmp_path, beside)
            assert sorted(shown.split()) == sorted(path.name for path in store_images[50].paths)
            shell(f"{run} images rm --sync {name}", tmp_path, beside)
        shell(uninstall, tmp_path, environment)
        assert not place.root.exists()
        assert not place.gc_roots.exists()


def test_registries_are_read_as_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (block,) = readme.blocks("yaml", "containerd's configuration, and registries")
    (tmp_path / "registries.yaml").write_text(block)
    (tmp_path / "registries.yaml").chmod(0o600)
    said = registries_file.read(str(tmp_path / "registries.yaml"))
    assert "docker.io" in repr(said)
    # Nothing in it is passed over.
    assert caplog.records == []
