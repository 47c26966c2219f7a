"""Agents of a test's cluster: `nixlet agent` on this machine as on another one, with a network and mounts of its own."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from support import kubernetes, nodes, parts

#: Has its own view of the network in /sys, and its own of the places that all kubelets share, until its standard input ends.
_APART = """
set -e
aside=$(mktemp -d)
mount --rbind /sys/fs/cgroup $aside
mount -t sysfs sysfs /sys
mount --rbind $aside /sys/fs/cgroup
umount -l $aside
rmdir $aside
for each in /var/log/pods /var/log/containers /var/lib/kubelet /var/lib/cni /run/netns; do mkdir -p $each; mount -t tmpfs tmpfs $each; done
mount --make-rshared /
echo 1 > /proc/sys/net/ipv4/ip_forward
echo ready
exec cat
"""


class Agent(nodes.Node):
    """A node that joins a cluster.

    Attributes:
        name: The node's.
        address: The node's, on the cluster's bridge.
        wrapper: Enters the machine that it is on, which is there as long as ``cleaned_up`` lasts.
    """

    verb = "agent"

    def __init__(self, number: int, directory: Path, cluster: kubernetes.Cluster, *arguments: str) -> None:
        self.name = f"node-{number}"
        self.address = f"{cluster.address.rpartition('.')[0]}.{number}"
        self.cluster = cluster
        self.namespace = f"nixagent{number}"
        self.link = f"nixveth{number}"
        self.cgroup = f"{cluster.cgroup}-{number}"
        super().__init__(
            number,
            directory,
            *("--kubernetes-bin-dir", str(parts.kubernetes()), "--node-ip", self.address, "--node-name", self.name),
            *("--kubelet-arg", f"cgroup-root=/{self.cgroup}"),
            *arguments,
        )

    @property
    def server_url(self) -> str:
        return f"https://{self.cluster.address}:6443"

    @property
    def token_file(self) -> Path:
        return self.cluster.data_dir / "server" / "node-token"

    def is_ready(self) -> bool:
        """Whether the cluster says so."""
        if self.name not in self.cluster.kubectl("get", "nodes", "--output=name"):
            return False
        status = self.cluster.get("node", self.name)["status"]
        return any(each["type"] == "Ready" and each["status"] == "True" for each in status.get("conditions", []))


@contextlib.contextmanager
def cleaned_up(agent: Agent) -> Iterator[Agent]:
    """An agent of which nothing stays, whatever happens to the test. Its mounts and rules are in namespaces that end with it."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_network(agent))
        stack.enter_context(_machine(agent))
        stack.enter_context(kubernetes._cgroups(agent.cgroup))
        stack.enter_context(nodes.cleaned_up(agent))
        try:
            yield agent
        finally:
            kubernetes.end_processes(agent)


@contextlib.contextmanager
def _machine(agent: Agent) -> Iterator[None]:
    """Mounts of its own, which outlive its node: those of its pods' networks are among them."""
    argv = ["nsenter", f"--net=/run/netns/{agent.namespace}", "unshare", "-m", "--propagation", "private"]
    with subprocess.Popen([*argv, "sh", "-c", _APART], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holding:
        assert holding.stdout is not None
        assert holding.stdout.readline() == b"ready\n"
        agent.wrapper = ["nsenter", f"--target={holding.pid}", "--mount", "--net"]
        yield


@contextlib.contextmanager
def _network(agent: Agent) -> Iterator[None]:
    """A network of its own, which is on the bridge that the server's address is on."""
    inside = ["ip", "-n", agent.namespace]
    run = subprocess.run
    run(["ip", "netns", "add", agent.namespace], check=True)
    try:
        for command in (
            ["ip", "link", "add", agent.link, "type", "veth", "peer", "name", "eth0", "netns", agent.namespace],
            ["ip", "link", "set", agent.link, "master", agent.cluster.interface, "up"],
            [*inside, "link", "set", "lo", "up"],
            [*inside, "address", "add", f"{agent.address}/24", "dev", "eth0"],
            [*inside, "link", "set", "eth0", "up"],
            [*inside, "route", "add", "default", "via", agent.cluster.address],
        ):
            run(command, check=True)
        yield
    finally:
        run(["ip", "link", "delete", agent.link], check=False)
        run(["ip", "netns", "delete", agent.namespace], check=True)
