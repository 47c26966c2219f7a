"""Containers without a network: no plugin makes one, and what the container has of its own comes with its record."""

import copy
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nixlet import errors
from nixlet.containerd import client
from nixlet.pods import nonetwork
from nixlet.rpc import channel as channels
from support import nodes, parts, storeimages

pytestmark = pytest.mark.slow

NONE = ("--network", "none")

#: What a container knows of its network and its names, each on lines of its own.
LOOK = """
busybox hostname; cat /etc/hostname; echo "$HOSTNAME"; cat /etc/hosts /etc/resolv.conf
cd /proc/sys/net/ipv4; cat ip_unprivileged_port_start ping_group_range ip_forward; ls /sys/class/net
"""


@pytest.fixture
def image(store_images: dict[int, storeimages.StoreImage]) -> str:
    return store_images[50].reference


@pytest.fixture
def version() -> str:
    return parts.CONTAINERDS[-1]


@pytest.fixture
def own_node(tmp_path: Path, version: str) -> Iterator[nodes.Node]:
    """A node that is not started yet."""
    made = nodes.Node(41, tmp_path, "--containerd", str(parts.containerd(version)))
    with nodes.cleaned_up(made):
        yield made


def asked_of_plugins(node: nodes.Node) -> set[str]:
    """What the CNI plugins, their library and containerd keep of pods' networks, also other nodes', of which some may go at any time."""
    kept = [*node.state_dir.glob("cni/**/*"), *Path("/var/lib/cni").rglob("*"), *Path("/run/netns").iterdir()]
    kept += node.state_dir.rglob("netns/*")
    interfaces = {name for _, name in socket.if_nameindex()}
    return {str(path) for path in kept} | {" ".join(rule) for rule in node.packet_rules()} | interfaces


def namespace_of(pid: int | str, kind: str) -> str:
    return os.readlink(f"/proc/{pid}/ns/{kind}")


def details(node: nodes.Node, container: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(node.crictl("inspect", container))["info"]
    return found


def test_no_plugin_is_asked_for_a_network(node: nodes.Node, image: str) -> None:
    node.ok("run", "--rm", image, "--", "/bin/true")
    nodes.until(lambda: not node.packet_rules(), "earlier pods' networks are given back")
    before = asked_of_plugins(node)
    container = node.ok("run", "-d", "--name", "alone", *NONE, image, "--", "/bin/sleep", "1000").strip()
    try:
        pid = details(node, container)["pid"]
        assert asked_of_plugins(node) <= before
        for kind in ("net", "uts"):
            assert namespace_of(pid, kind) != namespace_of("self", kind)
            # Further processes, ours and those of CRI's other clients, are where the first is.
            assert node.ok("exec", "alone", "/bin/readlink", f"/proc/self/ns/{kind}") == f"{namespace_of(pid, kind)}\n"
            assert node.crictl("exec", container, "/bin/readlink", f"/proc/self/ns/{kind}") == namespace_of(pid, kind)
        assert node.ok("exec", "alone", "/bin/ls", "/sys/class/net") == "lo\n"
        # IFF_UP (netdevice(7)).
        assert int(node.ok("exec", "alone", "/bin/cat", "/sys/class/net/lo/flags"), 16) & 1
        assert ", 0% packet loss" in node.ok("exec", "alone", "/bin/busybox", "ping", "-c", "1", "127.0.0.1")
        assert node.run("exec", "alone", "/bin/busybox", "ping", "-c", "1", "1.1.1.1").returncode != 0
        # What is said of it.
        (said,) = json.loads(node.ok("inspect", "alone"))
        assert (said["state"]["pid"], said["network"]) == (pid, {"mode": "none", "addresses": [], "ports": []})
        assert node.ok("ps", "-q").split() == [container]
        (pod,) = node.crictl("pods", "-q", "--name", "alone").split()
        status = json.loads(node.crictl("inspectp", pod))["status"]
        assert status["annotations"]["nixlet.io/no-network"] == "true"
        assert not status.get("network", {}).get("ip")
        node.ok("stop", "-t", "0", "alone")
        with pytest.raises(AssertionError, match="container is in CONTAINER_EXITED state"):
            node.crictl("start", container)
    finally:
        node.ok("rm", "-f", "alone")
    assert asked_of_plugins(node) <= before
    nodes.until(lambda: node.crictl("pods", "-q", "--name", "alone") == "", "the pod is gone")


@pytest.mark.parametrize("hostname", ["", "front.example"])
def test_a_container_without_a_network_sees_what_others_see(node: nodes.Node, image: str, hostname: str) -> None:
    options = ["--rm", "--name", "web", "--add-host", "db:192.0.2.1", *(["--hostname", hostname] if hostname else [])]
    with_one, without = (
        node.ok("run", *options, *network, image, "--", "/bin/sh", "-c", LOOK) for network in ((), NONE)
    )
    assert with_one.startswith(f"{hostname or 'web'}\n" * 3)
    assert with_one.endswith("\neth0\nlo\n")
    assert without == re.sub(r"\n10\.163\.\S+\t\S+\n", "\n", with_one).replace("\neth0\n", "\n")


def test_nothing_else_of_the_specification_changes(node: nodes.Node, image: str) -> None:
    """The container's own names, and what the network of its pod is, apart."""

    def specification(*options: str) -> dict[str, Any]:
        node.ok("run", "-d", "--name", "same", *options, image, "--", "/bin/sleep", "1000")
        try:
            (container,) = node.crictl("ps", "-q").split()
            spec: dict[str, Any] = copy.deepcopy(details(node, container)["runtimeSpec"])
        finally:
            node.ok("rm", "-f", "same")
        namespaces = {each["type"] for each in spec["linux"].pop("namespaces")}
        assert {"network", "uts", "ipc", "pid", "mount"} <= namespaces
        for key in ("hostname", "root", "annotations"):
            spec.pop(key, None)
        for key in ("cgroupsPath", "sysctl"):
            spec["linux"].pop(key, None)
        spec["mounts"] = sorted(each["destination"] for each in spec["mounts"])
        return spec

    for options in ((), ("--privileged",), ("--read-only", "-u", "1000:5", "--security-opt", "no-new-privileges")):
        assert specification(*options, *NONE) == specification(*options)


def test_privileged_containers_change_their_own_network_alone(node: nodes.Node, image: str) -> None:
    setting = "/proc/sys/net/ipv4/ip_default_ttl"
    before = Path(setting).read_text()
    script = f"echo 77 > {setting}; cat {setting}; busybox hostname other; busybox hostname; ls /sys/class/net"
    output = node.ok("run", "--rm", "--privileged", *NONE, image, "--", "/bin/sh", "-c", script)
    assert output == "77\nother\nlo\n"
    assert (Path(setting).read_text(), socket.gethostname()) == (before, os.uname().nodename)
    assert socket.gethostname() != "other"


def test_a_container_may_have_another_file_of_its_name(node: nodes.Node, image: str, tmp_path: Path) -> None:
    file = tmp_path / "name"
    file.write_text("its own\n")
    volume = ["-v", f"{file}:/etc/hostname:ro"]
    assert node.ok("run", "--rm", *volume, *NONE, image, "--", "/bin/cat", "/etc/hostname") == "its own\n"
    readonly = node.run("run", "--rm", "--read-only", *NONE, image, "--", "/bin/sh", "-c", "echo x > /etc/hostname")
    assert b"Read-only file system" in readonly.stderr


def test_no_address_is_needed(own_node: nodes.Node, image: str) -> None:
    """All addresses for pods are given away."""
    own_node.arguments[own_node.arguments.index("--pod-cidr") + 1] = "10.163.41.0/29"
    own_node.start()
    for _ in range(5):
        own_node.ok("run", "-d", image, "--", "/bin/sleep", "1000")
    refused = own_node.run("run", "--rm", image, "--", "/bin/true")
    assert (refused.returncode, b"all addresses for pods are given away" in refused.stderr) == (125, True)
    assert own_node.ok("run", "--rm", *NONE, image, "--", "/bin/ls", "/sys/class/net") == "lo\n"


@pytest.mark.parametrize("version", parts.CONTAINERD_PARAMETERS)
async def test_a_runtime_that_need_not_go_by_the_record_gets_no_such_container(
    own_node: nodes.Node, version: str, tmp_path: Path, image: str
) -> None:
    # A real shim, under a name by which nobody can know it to be runc's.
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "containerd-shim-odd-v1").symlink_to(parts.containerd(version).with_name("containerd-shim-runc-v2"))
    own_node.environment["PATH"] = f"{programs}:{own_node.environment['PATH']}"
    drop_ins = own_node.data_dir / "agent/etc/containerd/config.toml.d"
    drop_ins.mkdir(parents=True)
    runtime = "plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.odd"
    (drop_ins / "odd.toml").write_text(f"[{runtime}]\nruntime_type = 'io.containerd.odd.v1'\n")
    own_node.start()
    run = ("run", "--rm", "--runtime", "odd", "-v", f"{tmp_path}:/data")
    script = ("--", "/bin/sh", "-c", "echo ran > /data/ran")
    own_node.ok(*run, image, *script)
    (tmp_path / "ran").unlink()
    sandboxes = own_node.containerd_log.read_text().count("RunPodSandbox for")
    assert sandboxes
    refused = own_node.run(*run, *NONE, image, *script)
    assert refused.returncode == 125
    assert b"needs a runtime that works like runc, which io.containerd.odd.v1 need not" in refused.stderr
    assert not (tmp_path / "ran").exists()
    nodes.until(lambda: own_node.crictl("pods", "-q") == "", "nothing of it is left")
    assert own_node.containerd_log.read_text().count("RunPodSandbox for") == sandboxes
    # Also when only its record tells.
    container = own_node.ok("run", "-d", "--runtime", "odd", image, "--", "/bin/sleep", "1000").strip()
    socket_path = str(own_node.containerd_socket)
    async with channels.connect(socket_path) as channel:
        with pytest.raises(errors.UnsupportedError, match=r"which io\.containerd\.odd\.v1 need not"):
            await nonetwork.separate(client.Containerd(channel, socket_path), container, "web")


def test_an_annotation_alone_takes_no_network_away(node: nodes.Node, tmp_path: Path, image: str) -> None:
    """A pod of another client's, on the host's network, whatever it says of itself."""
    sandbox = {
        "metadata": {"name": "theirs", "namespace": "default", "uid": "theirs"},
        "annotations": {"nixlet.io/no-network": "true"},
        "labels": {"nixlet.io/made-by": "nixlet"},
        "linux": {"security_context": {"namespace_options": {"network": 2}}},
    }
    container = {"metadata": {"name": "theirs"}, "image": {"image": image}, "command": ["/bin/true"], "linux": {}}
    for name, config in (("sandbox", sandbox), ("container", container)):
        (tmp_path / name).write_text(json.dumps(config))
    node.crictl("pull", image)
    pod = node.crictl("runp", str(tmp_path / "sandbox"))
    try:
        made = node.crictl("create", "--no-pull", pod, str(tmp_path / "container"), str(tmp_path / "sandbox"))
        (said,) = json.loads(node.ok("inspect", made))
        assert said["network"]["mode"] == "host"
    finally:
        node.crictl("rmp", "-f", pod)


async def test_a_record_that_is_gone_is_told(any_node: nodes.Node) -> None:
    socket_path = str(any_node.containerd_socket)
    async with channels.connect(socket_path) as channel:
        with pytest.raises(errors.NotFoundError, match="container gone is gone"):
            await nonetwork.separate(client.Containerd(channel, socket_path), "gone", "web")


@pytest.mark.parametrize("version", parts.CONTAINERD_PARAMETERS)
@pytest.mark.parametrize("delay", [0.0, 0.02])
def test_a_containerd_that_dies_meanwhile_starts_nothing_on_the_hosts_network(
    own_node: nodes.Node, version: str, tmp_path: Path, image: str, delay: float
) -> None:
    own_node.start()
    seen = tmp_path / "seen"
    script = ("--", "/bin/sh", "-c", "readlink /proc/self/ns/net >> /data/seen")
    run = ("run", "--rm", "-v", f"{tmp_path}:/data", *NONE, image, *script)
    own_node.ok(*run)
    assert len(seen.read_text().splitlines()) == 1
    argv = [str(parts.containerd(version).with_name("ctr")), "--address", str(own_node.containerd_socket)]
    with subprocess.Popen([*argv, "-n", "k8s.io", "events"], stdout=subprocess.PIPE) as events:
        try:
            assert events.stdout is not None
            time.sleep(0.5)
            with own_node.started(*run) as running:
                # The first is the sandbox, the second its container.
                made = (line for line in events.stdout if b" /containers/create " in line)
                assert next(made) != next(made)
                time.sleep(delay)
                (containerd,) = nodes.named(own_node, "containerd")
                os.kill(containerd, signal.SIGKILL)
                running.wait(120)
        finally:
            events.kill()
    nodes.until(lambda: own_node.run("ps").returncode == 0, "containerd is back")
    nodes.until(lambda: own_node.crictl("pods", "-q") == "", "nothing of it is left")
    found = seen.read_text().splitlines()
    assert namespace_of("self", "net") not in found
    assert len(found) in {1, 2}
