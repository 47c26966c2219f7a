"""``nixlet doctor`` on this machine, as it is and with something missing."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from support import nodes

pytestmark = pytest.mark.slow

DOCTOR = [sys.executable, "-m", "nixlet", "doctor"]


def doctor(
    node: nodes.Node, *more: str, before: tuple[str, ...] = (), environment: dict[str, str] | None = None
) -> tuple[int, dict[tuple[str, str], dict[str, str]]]:
    """Its exit status, and the findings by group and name."""
    done = subprocess.run(
        [*before, *DOCTOR, "--json", *node.arguments, *more],
        env={**node.environment, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert done.stdout, done.stderr
    return done.returncode, {(each["group"], each["name"]): each for each in json.loads(done.stdout)}


@pytest.fixture
def fresh(tmp_path: Path) -> nodes.Node:
    """A node that is never started."""
    return nodes.Node(32, tmp_path)


def test_a_machine_that_has_it_all(fresh: nodes.Node) -> None:
    status, found = doctor(fresh)
    assert status == 0, found
    assert {each["status"] for each in found.values()} <= {"ok", "warning"}
    assert found["Nix", "store"]["status"] == found["mount strategy", "view"]["status"] == "ok"
    assert {group for group, _ in found} == {
        *("rights", "binaries", "kernel", "cgroups", "limits", "network", "Nix", "containerd", "sockets", "disk"),
        *("mount strategy", "Kubernetes"),
    }
    # Each warning says what to do.
    assert all(each["remedy"] for each in found.values() if each["status"] == "warning")
    assert not fresh.data_dir.exists()
    assert not fresh.state_dir.exists()
    assert fresh.mounts() == []


def test_for_people(fresh: nodes.Node) -> None:
    argv = [sys.executable, "-m", "nixlet", "check-config", *fresh.arguments]
    done = subprocess.run(argv, env=fresh.environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert "binaries" in lines
    assert lines[-1] == "a node can run here"
    assert any(line.split()[:2] == ["ok", "containerd"] for line in lines)


def test_without_nix(fresh: nodes.Node, tmp_path: Path) -> None:
    """The sentence is the one that start-up has."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("containerd", "runc", "catatonit", "iptables"):
        (path,) = [f"{each}/{name}" for each in ("/usr/bin", "/usr/sbin") if os.path.exists(f"{each}/{name}")][:1]
        (programs / name).symlink_to(path)
    nowhere = {"PATH": str(programs), "NIX_STATE_DIR": str(tmp_path)}
    status, found = doctor(fresh, environment=nowhere)
    assert status == 1
    assert found["Nix", "store"]["status"] == "missing"
    sentence = "nix-store not found in PATH: install nix (https://nixos.org/download) to use the nix snapshotter"
    assert found["Nix", "store"]["evidence"] == sentence
    started = subprocess.run(
        [sys.executable, "-m", "nixlet", "server", "--snapshotter", "nix", *fresh.arguments],
        env={**fresh.environment, **nowhere},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert started.returncode == 125
    root = f"{fresh.data_dir}/agent/containerd"
    assert started.stderr.splitlines()[0] == (
        f'error: "nix" snapshotter cannot be enabled for "{root}", try using "overlayfs" or "native": {sentence}'
    )
    assert not fresh.data_dir.exists()


def test_programs_that_are_missing(fresh: nodes.Node) -> None:
    status, found = doctor(fresh, "--containerd", "/no/containerd", "--runc", "/no/runc", "--pause", "/no/pause")
    assert status == 1
    for name in ("containerd", "runc", "pause"):
        assert found["binaries", name]["status"] == "missing"
        assert f"/no/{name}" in found["binaries", name]["evidence"]
        assert "apt install" in found["binaries", name]["remedy"]


def test_a_pause_program_that_would_not_start(fresh: nodes.Node) -> None:
    status, found = doctor(fresh, "--pause", "/bin/ls")
    assert status == 1
    assert "/bin/ls can't hold a pod's namespaces" in found["binaries", "pause"]["evidence"]


def test_a_firewall_that_drops_what_pods_send(fresh: nodes.Node) -> None:
    """In a network of its own: the machine's rules are not ours to change."""
    for rules, outcome in (
        ("iptables -P FORWARD DROP", "warning"),
        (f"iptables -P FORWARD DROP; iptables -A FORWARD -i {fresh.bridge} -j ACCEPT", "ok"),
    ):
        status, found = doctor(fresh, before=("unshare", "--net", "sh", "-ec", f'{rules}; exec "$@"', "sh"))
        assert status == 0
        assert found["network", "firewall"]["status"] == outcome
        assert found["network", "masquerading"]["status"] == found["network", "interfaces"]["status"] == "ok"
    assert (
        f"-i {fresh.bridge} -j ACCEPT"
        in doctor(fresh, before=("unshare", "--net", "sh", "-ec", 'iptables -P FORWARD DROP; exec "$@"', "sh"))[1][
            "network", "firewall"
        ]["remedy"]
    )


def test_somebody_elses_containerd(fresh: nodes.Node, any_node: nodes.Node) -> None:
    endpoint = str(any_node.containerd_socket)
    status, found = doctor(fresh, "--container-runtime-endpoint", endpoint)
    # Debian's containerd 1.6, of which there is something to be said.
    assert (status, found["sockets", "containerd"]["status"]) == (0, "warning")
    assert "1.6.20" in found["sockets", "containerd"]["evidence"]
    assert ("binaries", "containerd") not in found
    # In another mount namespace than ours it would not see what we mount.
    status, found = doctor(fresh, "--container-runtime-endpoint", endpoint, before=("unshare", "--mount"))
    assert (status, found["sockets", "containerd"]["status"]) == (1, "missing")
    assert "is in another mount namespace" in found["sockets", "containerd"]["evidence"]
    status, found = doctor(fresh, "--container-runtime-endpoint", f"{fresh.state_dir}/nobody.sock")
    assert (status, found["sockets", "containerd"]["status"]) == (1, "missing")


def test_without_root_it_says_what_it_could_not_see(fresh: nodes.Node) -> None:
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    status, found = doctor(fresh, before=nobody)
    assert found["rights", "root"]["status"] == "unknown"
    assert found["mount strategy", "view"]["status"] == "unknown"
    assert status == 3, [each for each in found.values() if each["status"] == "missing"]


def test_a_mistake_in_a_drop_in_and_in_the_registries(fresh: nodes.Node) -> None:
    directory = fresh.data_dir / "agent/etc/containerd/config.toml.d"
    directory.mkdir(parents=True)
    (directory / "10.toml").write_text("oops\n")
    fresh.registries.write_text("mirrors: 1\n")
    status, found = doctor(fresh)
    assert status == 1
    assert f"{directory}/10.toml, line 1, column 5" in found["containerd", "configuration"]["evidence"]
    assert f"{fresh.registries}, line 1: mirrors must be a mapping" in found["containerd", "registries"]["evidence"]


def test_beside_a_node_that_runs(any_node: nodes.Node) -> None:
    status, found = doctor(any_node)
    assert status == 0, found
    for name in ("node", "containerd", "health"):
        assert f"(process {any_node.pid})" in found["sockets", name]["evidence"]
    assert f"in use by process {any_node.pid}" in found["disk", "data directory"]["evidence"]
    assert " ready since " in found["children", "containerd"]["evidence"]
    # It still runs.
    assert any_node.version()["node"] is not None
    # Nor does a health address that the node has disturb it.
    found = doctor(any_node, "--health-address", "127.0.0.1:9")[1]
    assert f"(process {any_node.pid})" in found["sockets", "health"]["evidence"]


def test_a_health_address_that_somebody_has(fresh: nodes.Node) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        status, found = doctor(fresh, "--health-address", address)
        assert (status, found["sockets", "health"]["status"]) == (1, "missing")
        assert "Address already in use" in found["sockets", "health"]["evidence"]
    status, found = doctor(fresh, "--health-address", address)
    assert (status, found["sockets", "health"]["evidence"]) == (0, f"{address} is free")
    assert ("sockets", "health") not in doctor(fresh, "--health-address", "none")[1]


def test_a_data_directory_that_can_not_be(fresh: nodes.Node, tmp_path: Path) -> None:
    """What can't be tried for that reason keeps nobody from hearing the rest."""
    (tmp_path / "file").write_text("")
    status, found = doctor(fresh, "--data-dir", str(tmp_path / "file" / "below"))
    assert status == 1
    assert "is no directory" in found["disk", "data directory"]["evidence"]
    assert found["containerd", "snapshotter"]["status"] == "unknown"
    assert "Not a directory" in found["containerd", "snapshotter"]["evidence"]
    assert found["kernel", "namespaces"]["status"] == "ok"
