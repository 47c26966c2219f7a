"""Pods of two nodes reach each other by flannel: by host-gw, then by vxlan, through the deaths of what makes it, until nothing of it is left."""

import contextlib
import functools
import http.client
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from nixlet.cluster import kubeconfigs
from support import kubeagents, kubernetes, nodes, parts, storeimages

pytestmark = pytest.mark.timeout(600)

CONTAINERD = ("--containerd", str(parts.containerd(parts.CONTAINERDS[-1])))

#: Answers with its name, and with whom it takes the asking one for.
WHO = """
cd /; /bin/busybox mkdir -p www/cgi-bin
printf '#!/bin/sh\\necho; echo "$HOSTNAME $REMOTE_ADDR"\\n' >www/cgi-bin/who; /bin/busybox chmod 755 www/cgi-bin/who
exec /bin/busybox httpd -f -p 0.0.0.0:8080 -h /www
"""


class Two(NamedTuple):
    """A server and an agent, with a pod on each."""

    server: kubernetes.Cluster
    agent: kubeagents.Agent
    image: str

    @property
    def pods(self) -> dict[str, str]:
        """The pods, and the node of each."""
        return {"first": "node-66", "second": self.agent.name}

    def start_pods(self) -> None:
        for name, node in self.pods.items():
            more: dict[str, Any] = {"metadata": {"labels": {"app": "who"}}, "nodeName": node}
            manifest = nodes.manifest(name, self.image, command=["/bin/sh", "-c", WHO], **more)
            self.server.kubectl("apply", "-f", "-", stdin=manifest)
        for name in self.pods:
            self.server.await_phase(name, "Running")

    def addresses(self) -> dict[str, str]:
        found = {name: self.server.get("pod", name)["status"] for name in self.pods}
        return {name: each["podIP"] for name, each in found.items()}

    def asked(self, pod: str, address: str) -> str:
        """What a pod is answered at an address; empty: nothing yet."""
        ask = f"printf 'GET /cgi-bin/who HTTP/1.0\\r\\n\\r\\n' | /bin/busybox nc -w 5 {address} 8080"
        said = self.server.kubectl("exec", pod, "--", "/bin/sh", "-c", ask, check=False)
        return said.strip().rpartition("\n")[2]

    def check(self) -> None:
        """Pods reach each other, and a service that is both, and are known by their own addresses."""
        found = self.addresses()
        for asking in found:
            self._check(asking, found)
        # From the node as well, also to the pod of the other one.
        for name, address in found.items():
            assert answer(address).startswith(f"{name} ")

    def _check(self, asking: str, found: Mapping[str, str]) -> None:
        (other,) = set(found) - {asking}
        wanted, seen = f"{other} {found[asking]}", set[str]()
        service = self.server.get("service", "who")["spec"]["clusterIP"]

        def both() -> bool:
            seen.add(self.asked(asking, service))
            return {each.partition(" ")[0] for each in seen} >= set(found)

        kubernetes.until(lambda: self.asked(asking, found[other]) == wanted, f"{asking} reaches {other}")
        kubernetes.until(both, f"{asking} reaches both through the service: {seen}")
        assert {each for each in seen if each.startswith(other)} == {wanted}


def answer(address: str) -> str:
    connection = http.client.HTTPConnection(address, 8080, timeout=30)
    with contextlib.closing(connection):
        connection.request("GET", "/cgi-bin/who")
        return connection.getresponse().read().decode().strip()


def is_back(node: nodes.Node, killed: int) -> bool:
    """Whether its flannel is ready, by another process."""
    return node.ready_child("flanneld") not in {0, killed}


def command(node: nodes.Node, name: str) -> list[str]:
    """The command line of one of a node's children."""
    return Path(f"/proc/{node.children()[name]['pid']}/cmdline").read_text().split("\0")


def inside(two: Two) -> dict[nodes.Node, list[str]]:
    """How a program gets onto the machine of each node."""
    return {two.server: [], two.agent: two.agent.wrapper}


def printed(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def traces(way: Sequence[str]) -> list[str]:
    """What flannel has made in a network: interfaces, routes to other nodes' pods, rules."""
    links = [line for line in printed(*way, "ip", "-o", "link").splitlines() if "flannel" in line]
    routes = [line for line in printed(*way, "ip", "route").splitlines() if line.startswith("10.42.") and "via" in line]
    rules = [line for line in printed(*way, "iptables-save").splitlines() if "FLANNEL" in line]
    return [*links, *routes, *rules]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    directory = tmp_path_factory.mktemp("programs")
    (directory / "flanneld").symlink_to(parts.directories()["flannel"] / "flannel")
    server = kubernetes.Cluster(66, tmp_path_factory.mktemp("server"), *CONTAINERD, "--flannel-backend", "host-gw")
    agent = kubeagents.Agent(67, tmp_path_factory.mktemp("agent"), server, *CONTAINERD)
    # The agent's machine first, which would have the server's mounts otherwise.
    with kubernetes.cleaned_up(server), kubeagents.cleaned_up(agent):
        agent.arguments += ["--server", agent.server_url, "--token-file", str(agent.token_file)]
        for node in (server, agent):
            node.environment["PATH"] = f"{directory}:{node.environment['PATH']}"
        server.start()
        server.await_node()
        agent.start()
        kubernetes.until(agent.is_ready, f"the agent is ready: {agent.log}")
        image = storeimages.make(Path(tmp_path_factory.mktemp("images")), 3, salt="flannel")
        made = Two(server, agent, image.reference)
        made.start_pods()
        server.kubectl("apply", "-f", "-", stdin=json.dumps(SERVICE).encode())
        yield made


SERVICE = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "who"},
    "spec": {"selector": {"app": "who"}, "ports": [{"port": 8080}]},
}


def test_by_routes_from_node_to_node(two: Two) -> None:
    two.check()
    for node, way in inside(two).items():
        assert any("via 10.199.66." in each for each in traces(way)), node.log.read_text()
        assert "flannel.1" not in printed(*way, "ip", "link")
    # No plugin masquerades what flannel does.
    assert two.server.packet_rules() == []


def test_a_flannel_writes_into_its_own_node_alone(two: Two) -> None:
    """By what it writes there others send it packets; and who could write labels would choose what runs where."""
    (path,) = [each.partition("=")[2] for each in command(two.agent, "flanneld") if "kubeconfig-file" in each]
    known = kubeconfigs.read(path)
    way = ["--cacert", known.authority, "--cert", known.credentials.certificate, "--key", known.credentials.key]
    change = {"labels": {"mine": "yes"}, "annotations": {"mine": "yes"}}

    def patched(node: str) -> dict[str, Any]:
        argv = [
            *two.agent.wrapper,
            "curl",
            "-sS",
            *way,
            "-X",
            "PATCH",
            "-H",
            "Content-Type: application/merge-patch+json",
        ]
        argv += ["--data", json.dumps({"metadata": change}), f"{known.server}/api/v1/nodes/{node}/status"]
        answer: dict[str, Any] = json.loads(printed(*argv))
        return answer

    assert "is not allowed to modify node" in patched("node-66")["message"]
    assert "mine" not in two.server.get("node", "node-66")["metadata"]["labels"]
    assert patched(two.agent.name)["metadata"]["annotations"]["mine"] == "yes"


def test_what_leaves_the_cluster_is_masqueraded(two: Two) -> None:
    seen: list[str] = []

    class Outside(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.client_address[0])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer((two.server.address, 8080), Outside) as outside:
        threading.Thread(target=outside.serve_forever, daemon=True).start()
        two.asked("second", two.server.address)
        outside.shutdown()
    assert seen == [two.agent.address]


def test_a_killed_flannel_costs_nothing_and_comes_back(two: Two) -> None:
    for node in (two.server, two.agent):
        killed = kubernetes.until(functools.partial(node.ready_child, "flanneld"), "flanneld is there")
        os.kill(killed, signal.SIGKILL)
        # What it has made goes on.
        for name, address in two.addresses().items():
            assert answer(address).startswith(f"{name} ")
        kubernetes.until(functools.partial(is_back, node, killed), f"flanneld is back: {node.log}")
    two.check()


def test_by_vxlan_after_a_change_of_mind(two: Two) -> None:
    two.agent.stop()
    two.server.stop()
    two.server.arguments[two.server.arguments.index("host-gw")] = "vxlan"
    two.server.start()
    two.agent.start()
    kubernetes.until(two.agent.is_ready, f"the agent is ready: {two.agent.log}")
    # Pods that have been there all the time.
    two.check()
    for way in inside(two).values():
        assert any("flannel.1" in each for each in traces(way))
        assert not any("via 10.199.66." in each for each in traces(way))
    two.server.kubectl("delete", "pod", *two.pods, "--now")
    two.start_pods()
    two.check()
    for name in two.pods:
        assert two.server.kubectl("exec", name, "--", "/bin/cat", "/sys/class/net/eth0/mtu") == "1450\n"
    assert "flanneld" in two.server.ok("doctor", *two.server.arguments)


def test_the_server_s_death_costs_no_pod_and_no_packet(two: Two) -> None:
    before = two.server.get("pod", "second")["status"]["containerStatuses"][0]["containerID"]
    addresses = two.addresses()
    two.server.kill()
    for name, address in addresses.items():
        assert answer(address).startswith(f"{name} ")
    two.agent.stop()
    two.agent.start()
    assert "flanneld isn't waited for" in two.agent.log.read_text()
    for name, address in addresses.items():
        assert answer(address).startswith(f"{name} ")
    two.server.start()
    kubernetes.until(two.agent.is_ready, f"the agent is ready: {two.agent.log}")
    after = two.server.get("pod", "second")["status"]["containerStatuses"][0]
    assert (after["containerID"], after["restartCount"]) == (before, 0)
    assert two.addresses() == addresses
    two.check()


def test_nothing_is_left_after_uninstall(two: Two) -> None:
    """The last one: afterwards the cluster is gone."""
    two.agent.stop()
    two.server.stop()
    for node, way in inside(two).items():
        assert traces(way)
        argv = [*way, sys.executable, "-m", "nixlet", "uninstall", "--data-dir", str(node.data_dir), "--yes"]
        done = subprocess.run(argv, env=node.environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert traces(way) == [], done.stdout + done.stderr
        assert "CNI-" not in printed(*way, "iptables-save", "-t", "nat").replace("CNI-HOSTPORT", "")
        assert not node.data_dir.exists(), done.stdout
        assert not (node.state_dir / "flannel").exists()
