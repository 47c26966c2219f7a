"""Real kubelets for tests, without a cluster: static pods from files, on the sockets of a node.

What a kubelet would tell an API server it writes to its log: events are read from there.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nixlet.host import mounts
from support import kubernetes, nodes, parts

_START_SECONDS = 60

#: The newest kubelet that tests run with, by the name of its family of parts.
FAMILY = "kubernetes-1.36"


class Event(NamedTuple):
    """What a kubelet says of a pod, as ``kubectl describe`` would show it."""

    pod: str
    reason: str
    message: str


class Kubelet:
    """A kubelet that a test starts and stops.

    Attributes:
        directory: All that is its own, but for the pods' logs.
        name: The name of its node.
        log: What it printed: JSON, a record a line.
    """

    def __init__(self, node: nodes.Node, directory: Path, *, family: str = FAMILY, **settings: Any) -> None:
        """A kubelet on a node's sockets; ``settings`` are more keys of its configuration."""
        self.directory = directory
        self.name = f"k{os.getpid()}"
        self.log = directory / "kubelet.log"
        self._root = directory / "root"
        self._manifests = directory / "manifests"
        self._logs = directory / "podlogs"
        self._program = parts.directories()[family] / "kubelet"
        self._settings = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "containerRuntimeEndpoint": f"unix://{node.containerd_socket}",
            "imageServiceEndpoint": f"unix://{node.node_socket}",
            "staticPodPath": str(self._manifests),
            "podLogsDir": str(self._logs),
            "enableServer": False,
            "authentication": {"anonymous": {"enabled": False}, "webhook": {"enabled": False}},
            "authorization": {"mode": "AlwaysAllow"},
            "failCgroupV1": False,
            "failSwapOn": False,
            "makeIPTablesUtilChains": False,
            # Cgroups of pods would be at the machine's own place, which another kubelet has.
            "cgroupDriver": "cgroupfs",
            "cgroupsPerQOS": False,
            "enforceNodeAllocatable": [],
            # The disk is not what these tests are about, and it may be full enough for a kubelet to clean up.
            "imageGCHighThresholdPercent": 100,
            "evictionHard": {"memory.available": "1Mi"},
            "logging": {"format": "json", "verbosity": 3},
            **settings,
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it is healthy."""
        for made in (self._root, self._manifests, self._logs):
            made.mkdir(parents=True, exist_ok=True)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        file = self.directory / "kubelet.yaml"
        file.write_text(json.dumps({**self._settings, "healthzPort": port}))
        argv = [str(self._program), "--config", str(file), "--root-dir", str(self._root)]
        argv += ["--cert-dir", str(self._root / "pki"), "--hostname-override", self.name]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + _START_SECONDS
        while not _is_healthy(port):
            assert self._process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < deadline, self.log.read_text()[-4000:]
            time.sleep(0.05)

    def stop(self) -> None:
        """End it; its pods go on."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def play(self, manifest: bytes) -> str:
        """Have a pod; the name that it gets."""
        name: str = json.loads(manifest)["metadata"]["name"]
        # It looks at a file as soon as it is there.
        written = self.directory / "manifest"
        written.write_bytes(manifest)
        written.rename(self._manifests / f"{name}.json")
        return f"{name}-{self.name}"

    def withdraw(self, pod: str) -> None:
        """Have a pod no more."""
        (self._manifests / f"{pod.removesuffix(f'-{self.name}')}.json").unlink()

    def events(self, pod: str) -> list[Event]:
        """What it has said of a pod so far."""
        return [event for event in self._said() if event.pod == pod]

    def until_said(self, pod: str, reason: str, count: int = 1) -> str:
        """Wait until it has said something of a pod, so many times; the message of the last."""

        def found() -> list[str]:
            return [event.message for event in self.events(pod) if event.reason == reason]

        nodes.until(lambda: len(found()) >= count, f"{reason} of {pod} is not among {self.events(pod)}")
        return found()[count - 1]

    def output(self, pod: str, container: str = "main") -> str:
        """What a pod's container printed: the whole of its first log, without the marks of CRI."""
        files = self._logs.glob(f"default_{pod}_*/{container}/0.log")
        lines = [line.split(" ", 3) for file in files for line in file.read_text().splitlines(keepends=True)]
        return "".join(line[3] for line in lines)

    def until_ended(self, pod: str, node: nodes.Node, container: str = "main") -> str:
        """Wait until a pod's container has ended; what it printed."""

        def ended() -> bool:
            listed = ["ps", "-a", "-o", "json", "--state", "Exited", "--name", f"^{container}$"]
            labels = {"io.kubernetes.pod.name": pod}
            found = json.loads(node.crictl(*listed))["containers"] or []
            return any(labels.items() <= each["labels"].items() for each in found)

        nodes.until(ended, f"{pod} does not end: {self.events(pod)}")
        return self.output(pod, container)

    def _said(self) -> Iterator[Event]:
        for line in self.log.read_text(errors="replace").splitlines():
            if '"Event occurred"' in line:
                said = json.loads(line)
                name = said["object"]["name"] if isinstance(said["object"], dict) else said["object"].split("/")[-1]
                yield Event(name, said["reason"], said["message"])


def _is_healthy(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as asking:
        asking.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        return b" 200 " in asking.recv(4096)
    return False


@contextlib.contextmanager
def running(node: nodes.Node, directory: Path, *, family: str = FAMILY, **settings: Any) -> Iterator[Kubelet]:
    """A kubelet for the time of the context, and then nothing of it, nor of any pod of the node."""
    made = Kubelet(node, directory, family=family, **settings)
    with kubernetes.apart():
        try:
            made.start()
            yield made
        finally:
            made.stop()
            try:
                node.remove_all_pods()
            finally:
                for entry in reversed(mounts.below(str(directory))):
                    mounts.unmount(entry.path)
