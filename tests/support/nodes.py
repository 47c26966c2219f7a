"""Real nodes for tests: `nixlet server` as a process of its own, with everything at places of its own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nixlet.host import iptables, mounts, network
from nixlet.services import nodeaddress
from nixlet.store import roots as gcroots
from nixlet.varlink import client
from support import parts

START_SECONDS = 60


class Node:
    """A node that a test starts, asks and stops.

    Attributes:
        data_dir: Its persistent directory.
        state_dir: Its running directory, short since sockets lie in it.
        log: What it printed.
        registries: How it reaches registries; not there unless a test writes it.
        wrapper: A program with arguments that the server is started by, and that becomes it.
        verb: ``server`` or ``agent``.
        snapshotter: Its snapshotter.
    """

    verb = "server"
    snapshotter = "nix"

    def __init__(
        self, number: int, directory: Path, *arguments: str, environment: dict[str, str] | None = None
    ) -> None:
        self.data_dir = directory / "data"
        self.state_dir = Path(f"/run/nixlet-test/{number}")
        self.bridge = f"nixtest{number}"
        self.log = directory / "server.log"
        self.registries = directory / "registries.yaml"
        self.arguments = [
            *("--data-dir", str(self.data_dir), "--state-dir", str(self.state_dir), "--bridge", self.bridge),
            *("--pod-cidr", f"10.163.{number}.0/24", "--private-registry", str(self.registries), *arguments),
        ]
        # No caches: tests talk to this machine only, and Nix would try for seconds to reach what isn't there.
        own = {
            "NIXLET_STATE_DIR": str(self.state_dir),
            "NIX_CONFIG": "substituters =",
            "NIXLET_CONFIG_FILE": "/dev/null",
        }
        self.environment = {**os.environ, **own, **(environment or {})}
        self.wrapper: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def containerd_socket(self) -> Path:
        return self.state_dir / "containerd" / "containerd.sock"

    @property
    def node_socket(self) -> Path:
        return self.state_dir / "containerd" / "nix-snapshotter.sock"

    @property
    def control_socket(self) -> Path:
        return self.state_dir / nodeaddress.SOCKET

    @property
    def containerd_log(self) -> Path:
        return self.data_dir / "agent" / "containerd" / "containerd.log"

    @property
    def gc_roots(self) -> Path:
        """Where Nix finds what this node needs."""
        root = self.data_dir / "agent" / "containerd" / f"io.containerd.snapshotter.v1.{self.snapshotter}"
        return Path("/nix/var/nix/gcroots/nixlet") / gcroots.owner_of(str(root))

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def launch(self) -> "subprocess.Popen[bytes]":
        """Start the server without waiting for it."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            verb = [self.verb, "--snapshotter", self.snapshotter]
            argv = [*self.wrapper, sys.executable, "-m", "nixlet", *verb, *self.arguments]
            # A careful administrator's umask: what containers see must not depend on it.
            self._process = subprocess.Popen(
                argv, env=self.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, umask=0o077
            )
        return self._process

    def start(self) -> None:
        """Start the server and wait until it is ready."""
        self.launch()
        self.await_ready()

    def await_ready(self) -> None:
        """Wait until a server that was launched is ready."""
        process = self._process
        assert process is not None
        deadline = time.monotonic() + START_SECONDS
        while self.version()["node"] is None:
            assert process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def stop(self) -> int:
        """End it in order; its exit status."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(60)

    def kill(self) -> None:
        """End it as the kernel would when memory runs out."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(60)

    def run(self, *arguments: str, stdin: bytes | None = None) -> "subprocess.CompletedProcess[bytes]":
        """Run a verb of the command line."""
        argv = [sys.executable, "-m", "nixlet", *arguments]
        return subprocess.run(argv, env=self.environment, input=stdin, capture_output=True, timeout=120, check=False)

    def children(self) -> dict[str, dict[str, Any]]:
        """How the programs do that it keeps running, by name."""
        with client.Connection(str(self.control_socket), peer="the node") as node:
            node.send(f"{nodeaddress.INTERFACE}.GetChildren")
            reply, _ = node.receive(30)
        return {child["name"]: child for child in reply["children"]}

    def ready_child(self, name: str) -> int:
        """The process of a program that it keeps running and that is ready; 0: it isn't."""
        child = self.children()[name]
        return int(child["pid"]) if child["state"] == "ready" else 0

    @contextlib.contextmanager
    def started(self, *arguments: str) -> Iterator["subprocess.Popen[bytes]"]:
        """A verb that runs meanwhile, and is killed afterwards if it still does."""
        argv = [sys.executable, "-m", "nixlet", *arguments]
        with subprocess.Popen(argv, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            try:
                yield process
            finally:
                process.kill()

    def ok(self, *arguments: str, stdin: bytes | None = None) -> str:
        """Run a verb that must work; what it printed."""
        done = self.run(*arguments, stdin=stdin)
        assert done.returncode == 0, f"{arguments}: {done.stdout.decode()}{done.stderr.decode()}"
        return done.stdout.decode()

    def version(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.ok("version", "--output", "json"))
        return answer

    def crictl(self, *arguments: str) -> str:
        """Run the real crictl against the node; what it printed."""
        argv = [*parts.crictl(self.node_socket, self.containerd_socket), *arguments]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, f"{arguments}: {done.stderr}"
        return done.stdout.strip()

    def collect_garbage(self) -> None:
        """Let containerd delete now what it would delete after a hundred changes: a lease's synchronous end asks for that."""
        ctr = ["ctr", "-a", str(self.containerd_socket), "-n", "k8s.io", "leases"]
        subprocess.run([*ctr, "create", "--id", "test"], check=True, capture_output=True)
        subprocess.run([*ctr, "delete", "--sync", "test"], check=True, capture_output=True)

    def mounts(self) -> list[str]:
        """The mounts of this node, by their place."""
        places = (str(self.state_dir), str(self.data_dir))
        return [entry.path for place in places for entry in mounts.below(place)]

    def packet_rules(self) -> list[list[str]]:
        """What it takes to remove the rules of the packet filter that are there for its pods: iptables' arguments."""
        saved = subprocess.run(["iptables-save", "-t", "nat"], capture_output=True, text=True, check=True).stdout
        return iptables.removals(saved, network=f"nixlet-{self.bridge}")

    def remove_all_pods(self) -> None:
        """Remove every pod, also those that a failed test left."""
        containers = self.ok("ps", "-aq").split()
        if containers:
            self.ok("rm", "-f", *containers)
        ids = self.crictl("pods", "-q").split()
        for each in ids:
            self.crictl("stopp", each)
            self.crictl("rmp", "-f", each)


def until(condition: Callable[[], object], what: str) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def processes_below(directory: Path) -> list[int]:
    """The processes whose command lines name a directory, without those of other runs beside this one, whose nodes have the same directories."""
    found = []
    ours = os.readlink("/proc/self/ns/pid")
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{entry}/cmdline").read_bytes()
                if os.fsencode(str(directory)) in command and os.readlink(f"/proc/{entry}/ns/pid") == ours:
                    found.append(int(entry))
    return found


def named(node: "Node", name: str, below: Path | None = None) -> list[int]:
    """A node's processes by their programs' name (proc_pid_comm(5), which keeps 15 characters of it).

    Args:
        node: The node.
        name: The name.
        below: What their command lines name; None: its state directory.
    """
    parents = {}
    for pid in processes_below(below or node.state_dir):
        # Some end just now.
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text().strip() == name[:15]:
                parents[pid] = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    # Between fork and exec a child has its parent's name and arguments.
    return [pid for pid, parent in parents.items() if parent not in parents]


def with_descendants(pids: Sequence[int]) -> list[int]:
    """Processes and all that they started, the deepest last: a shim's containers don't name the node's directory."""
    found = list(pids)
    for pid in found:
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{pid}/task"):
                found.extend(map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split()))
    return found


@contextlib.contextmanager
def cleaned_up(node: Node) -> Iterator[Node]:
    """A node of which nothing stays, whatever happens to the test."""
    left: list[list[str]] = []
    try:
        yield node
    finally:
        process = node._process
        if process is not None and process.poll() is None:
            with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                node.remove_all_pods()
                left = node.packet_rules()
                # What verbs began to give back goes on by itself.
                until(lambda: not node.packet_rules(), "rules are gone")
                left = []
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pid in with_descendants(processes_below(node.state_dir)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
        for place in sorted(node.mounts(), key=len, reverse=True):
            with contextlib.suppress(Exception):
                mounts.unmount(place)
        # The kernel takes the interfaces away of pods that have ended, in a moment.
        with contextlib.suppress(AssertionError):
            until(lambda: not network.bridge_members(node.bridge), "its bridge is empty")
        network.remove_bridge(node.bridge)
        for rule in node.packet_rules():
            subprocess.run(["iptables", "-w", "-t", "nat", *rule], check=False)
        if not node.mounts():
            subprocess.run(["rm", "-rf", str(node.state_dir), str(node.data_dir), str(node.gc_roots)], check=False)
    assert left == [], f"pods that are gone have rules in the packet filter: {left}"
    on_it = network.bridge_members(node.bridge)
    assert not network.bridge_exists(node.bridge), f"the bridge {node.bridge} is still there, with {on_it}"


def manifest(name: str, image: str, *, command: Sequence[str] = (), args: Sequence[str] = (), **more: Any) -> bytes:
    """A pod manifest; JSON is YAML."""
    container: dict[str, Any] = {"name": "main", "image": image, **more.pop("container", {})}
    if command:
        container["command"] = list(command)
    if args:
        container["args"] = list(args)
    metadata = {"name": name, **more.pop("metadata", {})}
    spec = {"restartPolicy": "Never", "containers": [container], **more}
    return json.dumps({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}).encode()
