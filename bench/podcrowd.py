"""A hundred pods of one closure on one node of a cluster: how long each takes to start beside all that are there."""

import contextlib
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import commands
import measure
from support import footprint, image_archives, kubernetes, parts, storeimages

#: The aim: the last pods take at most so many times what the first take.
TARGET_RATIO = 1.3

#: Pods of which the first and the last are compared by their medians: a kubelet looks at volumes every 0.3 s.
SOME = 10

#: The name of an ordinary image.
ORDINARY = "localhost/crowd-ordinary:1"


class Crowd:
    """Pods that are made one after the other, and stay."""

    def __init__(self, cluster: kubernetes.Cluster, api: str) -> None:
        self._cluster = cluster
        self._pods = f"{api}/api/v1/namespaces/default/pods"

    def add(self, name: str, image: str) -> float:
        """The milliseconds from a pod's creation at the API server until containerd has started its container."""
        container = {"name": "main", "image": image, "command": ["/bin/sleep", "100000"]}
        spec = {"containers": [container], "terminationGracePeriodSeconds": 0}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": "crowd"}}, "spec": spec}
        head = {"Content-Type": "application/json"}
        begun = time.time()
        self._ask(urllib.request.Request(self._pods, json.dumps(pod).encode(), head))
        while not (running := self._running(name)):
            time.sleep(0.05)
        said = json.loads(self._cluster.crictl("inspect", running))["status"]["startedAt"]
        # Python's clock has microseconds, containerd's nanoseconds.
        return (datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", said)).timestamp() - begun) * 1000

    def passing(self, name: str, image: str) -> float:
        """The same, and the pod is removed."""
        taken = self.add(name, image)
        self._cluster.kubectl("delete", "pod", name, "--now")
        return taken

    def _running(self, name: str) -> str:
        for status in self._ask(f"{self._pods}/{name}")["status"].get("containerStatuses", []):
            if "running" in status["state"]:
                return str(status["containerID"]).removeprefix("containerd://")
        return ""

    @staticmethod
    def _ask(request: str | urllib.request.Request) -> dict[str, Any]:
        with urllib.request.urlopen(request, timeout=60) as answer:
            found: dict[str, Any] = json.load(answer)
        return found


@contextlib.contextmanager
def proxied(cluster: kubernetes.Cluster) -> Iterator[str]:
    """The API server's URL without a login, for the time of the context."""
    argv = [*cluster.administrator, "proxy", "--port=0"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"http://{process.stdout.readline().split()[-1]}"
        finally:
            process.terminate()


def ordinary_archive(directory: Path) -> Path:
    """An ordinary image of busybox, by which the machine is told from the closure."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as layer:
        layer.add(storeimages.BUSYBOX, "bin/busybox")
        layer.addfile(image_archives.link("bin/sleep", "busybox"))
    archive = directory / "ordinary.tar"
    archive.write_bytes(image_archives.tar(image_archives.oci([buffer.getvalue()], name=ORDINARY)))
    return archive


def measured(containerd: Path, pods: int, paths: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="nixlet-bench-") as name:
        directory = Path(name)
        cluster = kubernetes.Cluster(
            71, directory, "--containerd", str(containerd), "--kubelet-arg", f"max-pods={pods + 30}"
        )
        with kubernetes.cleaned_up(cluster):
            cluster.start()
            cluster.await_node()
            cluster.await_dns()
            image = storeimages.make(directory, paths)
            ordinary = ordinary_archive(directory)
            cluster.ok("image", "load", str(ordinary))
            before = footprint.of(cluster)
            samples: list[float] = []
            beside: dict[int, float] = {}
            with proxied(cluster) as api:
                crowd = Crowd(cluster, api)
                for number in range(1, pods + 1):
                    samples.append(crowd.add(f"crowd{number}", image.reference))
                    if number in {*range(2, SOME + 2), *range(pods - SOME + 1, pods + 1)}:
                        beside[number] = crowd.passing(f"ordinary{number}", ORDINARY)
            there = footprint.more(footprint.of(cluster), before)
            begun = time.monotonic()
            cluster.kubectl("delete", "pods", "-l", "app=crowd")
            removal = time.monotonic() - begun
            footprint.await_no_more_containers(cluster, before)
            cluster.crictl("rmi", image.reference)
            while left := footprint.more(footprint.of(cluster), before):
                assert time.monotonic() - begun < 180, left
                time.sleep(1)
            return {
                "samples": samples,
                "ordinary": [beside[number] for number in sorted(beside)],
                "there": {kind: len(members) for kind, members in there.items()},
                "views": len([place for place in there["mounts"] if "/views/" in place]),
                "removal": removal,
                "until nothing is left": time.monotonic() - begun,
            }


def document(found: dict[str, Any], paths: int) -> str:
    """The report as a section of docs/performance.md."""
    samples, ordinary = found["samples"], found["ordinary"]
    pods = len(samples)
    first, last = measure.row(samples[1 : SOME + 1]), measure.row(samples[-SOME:])
    other_first, other_last = measure.row(ordinary[:SOME]), measure.row(ordinary[SOME:])
    machine = ", ".join(f"{key} {value}" for key, value in measure.machine().items())
    lines = [
        f"Machine: {machine}; containerd {parts.CONTAINERDS[-1]}, {pods} pods of a closure of {paths} paths.",
        "",
        "| pods | median ms | min | max |",
        "|---|---|---|---|",
        f"| 1, with the image's pull | {samples[0]:.0f} | | |",
    ]
    beginning, end = f"2 to {SOME + 1}", f"{pods - SOME + 1} to {pods}"
    for numbers, row in (
        (beginning, first),
        (f"of the ordinary image, beside {beginning}", other_first),
        (end, last),
        (f"of the ordinary image, beside {end}", other_last),
    ):
        lines.append(f"| {numbers} | {row['median']:.0f} | {row['min']:.0f} | {row['max']:.0f} |")
    ratio, other_ratio = last["median"] / first["median"], other_last["median"] / other_first["median"]
    lines += [
        "",
        (
            f"The last are to the first as {ratio:.2f} to 1 (aim: at most {TARGET_RATIO}), of the ordinary image as {other_ratio:.2f} to 1. All together: {found['there']['mounts']} mounts, of which"
            f" {found['views']} a view of the closure and 5 for each pod (the roots of its container and its sandbox, that one's shared memory and network"
            f" namespace, and the token's volume), {found['there']['snapshots']} snapshots, {found['there']['addresses']} addresses. All pods were removed"
            f" after {found['removal']:.0f} s, and {found['until nothing is left']:.0f} s after that had begun nothing of them and their image was left: no mount,"
            " namespace, process, cgroup, rule, address, directory, snapshot, GC root or log (a kubelet takes a minute for logs)."
        ),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = commands.arguments(__doc__ or "", "20 pods")
    parser.add_argument("--paths", type=int, default=300, help="store paths of the closure")
    chosen = parser.parse_args()
    found = measured(parts.containerd(parts.CONTAINERDS[-1]), 2 * SOME if chosen.quick else 100, chosen.paths)
    measure.publish(chosen, "podcrowd", found, document(found, chosen.paths))


if __name__ == "__main__":
    sys.exit(main())
