"""Real clusters for tests: `nixlet server` with Kubernetes' own programs, on an address and in cgroups of its own."""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nixlet.host import mounts
from support import nodes, parts

#: Seconds for what a cluster does by itself.
PATIENCE = 90

#: What a kubelet sets for the whole machine (k8s.io/component-helpers, node/util/sysctl).
_SYSCTLS = (
    "vm/overcommit_memory",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
    "vm/panic_on_oom",
)

#: Where a kubelet and its runtime put things whatever they are told.
_SHARED = ("/var/log/pods", "/var/log/containers", "/var/lib/kubelet")


class Cluster(nodes.Node):
    """A node that is a cluster.

    Attributes:
        address: The node's, on a bridge without ports.
        kubeconfig: The administrator's.
    """

    def __init__(self, number: int, directory: Path, *arguments: str) -> None:
        self.number = number
        self.address = f"10.199.{number}.1"
        self.interface = f"nixkube{number}"
        # Cgroups have no namespace here: another run may have a node of this number.
        self.cgroup = f"nixtest{number}-{secrets.token_hex(3)}"
        self.kubeconfig = directory / "kubeconfig"
        super().__init__(
            number,
            directory,
            *(
                "--kubernetes-bin-dir",
                str(parts.kubernetes()),
                "--node-ip",
                self.address,
                "--node-name",
                f"node-{number}",
            ),
            *("--write-kubeconfig", str(self.kubeconfig), "--kubelet-arg", f"cgroup-root=/{self.cgroup}"),
            *arguments,
            # The cluster's DNS is made of it.
            environment={"PATH": f"{parts.directories()['coredns']}:{os.environ['PATH']}"},
        )

    @property
    def administrator(self) -> list[str]:
        """The beginning of a command line of the real kubectl, as the administrator."""
        return [str(parts.kubernetes() / "kubectl"), "--kubeconfig", str(self.kubeconfig)]

    def await_dns(self) -> None:
        """Wait until pods can look names up."""
        of_all = ("--namespace=kube-system", "deployment/coredns", f"--timeout={PATIENCE}s")
        self.kubectl("wait", "--for=create", *of_all)
        self.kubectl("rollout", "status", *of_all)

    def kubectl(self, *arguments: str, stdin: bytes | None = None, check: bool = True) -> str:
        """Run the real kubectl as the administrator; what it printed."""
        argv = [*self.administrator, *arguments]
        done = subprocess.run(argv, input=stdin, capture_output=True, timeout=400, check=False)
        assert done.returncode == 0 or not check, f"{arguments}: {done.stdout.decode()}{done.stderr.decode()}"
        return done.stdout.decode()

    def keeps(self, name: str) -> bool:
        """Whether the cluster takes a new object."""
        said = self.kubectl("create", "configmap", name, "--request-timeout=5s", "-o", "name", check=False)
        return said == f"configmap/{name}\n"

    def apply(self, *objects: dict[str, Any]) -> None:
        """Have objects be in the cluster."""
        listed = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self.kubectl("apply", "-f", "-", stdin=json.dumps(listed).encode())

    def get(self, *arguments: str) -> dict[str, Any]:
        """An object, or a list of them."""
        found: dict[str, Any] = json.loads(self.kubectl("get", "-o", "json", *arguments))
        return found

    def await_node(self) -> None:
        """Wait until its node is ready, and pods can be made."""
        until(lambda: "True" in self._conditions(), f"the node is ready: {self.log}")
        accounts = ("get", "serviceaccounts", "--output=name")
        until(lambda: "serviceaccount/default" in self.kubectl(*accounts), "there is a default service account")

    def _conditions(self) -> list[str]:
        status = self.get("node", f"node-{self.state_dir.name}")["status"]
        return [each["status"] for each in status.get("conditions", []) if each["type"] == "Ready"]

    def await_phase(self, pod: str, phase: str) -> None:
        """Wait until a pod is in a phase."""
        found = ""
        deadline = time.monotonic() + PATIENCE
        while found != phase:
            assert time.monotonic() < deadline, f"{pod} is {found}: {self.kubectl('describe', 'pod', pod)}"
            time.sleep(0.1)
            found = self.get("pod", pod)["status"].get("phase", "")

    def cgroups(self, name: str) -> list[str]:
        """The cgroups of a name in its own, by hierarchy."""
        return [str(found) for hierarchy in _hierarchies() for found in (hierarchy / self.cgroup).glob(name)]

    def packet_tables(self) -> str:
        """nftables' tables."""
        return subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout

    def log_of(self, program: str) -> str:
        """What one of its programs printed."""
        return (self.data_dir / "agent" / "logs" / f"{program}.log").read_text()


def until(condition: "Any", what: str) -> Any:
    """Wait until something is so; what is."""
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.1)
    return found


@contextlib.contextmanager
def cleaned_up(cluster: Cluster) -> Iterator[Cluster]:
    """A cluster of which nothing stays, whatever happens to the test."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(nodes.cleaned_up(cluster))
        stack.enter_context(apart())
        stack.enter_context(_address(cluster))
        stack.enter_context(_cgroups(cluster.cgroup))
        try:
            yield cluster
        finally:
            _end(cluster)


@contextlib.contextmanager
def _address(cluster: Cluster) -> Iterator[None]:
    subprocess.run(["ip", "link", "add", cluster.interface, "type", "bridge"], check=True)
    try:
        for command in (
            ["ip", "address", "add", f"{cluster.address}/24", "dev", cluster.interface],
            ["ip", "link", "set", cluster.interface, "up"],
            # As a default route leads to services on other machines. Clusters that are there at a time have one each.
            ["ip", "route", "add", "10.43.0.0/16", "dev", cluster.interface, "metric", str(cluster.number)],
        ):
            subprocess.run(command, check=True)
        yield
    finally:
        subprocess.run(["ip", "link", "delete", cluster.interface], check=True)


def _hierarchies() -> list[Path]:
    return [Path(entry.path) for entry in mounts.table() if entry.fstype in {"cgroup", "cgroup2"}]


@contextlib.contextmanager
def _cgroups(name: str) -> Iterator[None]:
    """A cgroup in each hierarchy, which a kubelet wants to find."""
    made = []
    for hierarchy in _hierarchies():
        (hierarchy / name).mkdir(exist_ok=True)
        made.append(hierarchy / name)
    try:
        yield
    finally:
        for directory in made:
            # From the leaves on: cgroups are removed by rmdir alone.
            for path, _, _ in sorted(os.walk(directory), key=lambda each: -len(each[0])):
                with contextlib.suppress(FileNotFoundError):
                    os.rmdir(path)


def end_processes(node: nodes.Node) -> None:
    """Stop a node, and end what goes on without it: its pods would keep its cgroups."""
    process = node._process
    if process is not None and process.poll() is None:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for pid in nodes.with_descendants(nodes.processes_below(node.state_dir)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    time.sleep(0.2)


def _end(cluster: Cluster) -> None:
    """Stop the node, and end what goes on without it."""
    end_processes(cluster)
    # With what is left on it: the next cluster's pods have the same addresses.
    subprocess.run(["ip", "link", "delete", cluster.bridge], stderr=subprocess.DEVNULL, check=False)
    for family in ("ip", "ip6"):
        subprocess.run(["nft", "delete", "table", family, "kube-proxy"], stderr=subprocess.DEVNULL, check=False)


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """A machine for a kubelet: what it sets for the whole of it is put back afterwards.

    The places that all kubelets of a machine share are empty ones of our own: other tests may run a kubelet meanwhile.
    """
    kept = {name: Path("/proc/sys", name).read_text() for name in _SYSCTLS if Path("/proc/sys", name).exists()}
    with contextlib.ExitStack() as stack:
        stack.callback(_put_back, kept)
        for place in map(Path, _SHARED):
            if not place.exists():
                place.mkdir(parents=True)
                stack.callback(place.rmdir)
            mounts.mount("tmpfs", str(place), "tmpfs", 0, "mode=755")
            stack.callback(mounts.unmount, str(place))
        yield


def _put_back(sysctls: dict[str, str]) -> None:
    for name, value in sysctls.items():
        Path("/proc/sys", name).write_text(value)
