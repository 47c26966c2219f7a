"""Starting the hello container: from store paths against an ordinary image, and `nixlet run` against crictl and ctr."""

import io
import itertools
import json
import os
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Any

import measure
from support import image_archives, nodes, parts

NAMESPACE = "bench"
ORDINARY = "localhost/hello-ordinary:1"
NIX = "localhost/hello-nix:1"
TARGET_RATIO = 1.1
TARGET_RUN = 350
TARGET_MEMORY = 55


def build(attribute: str) -> str:
    environment = {**os.environ, "NIX_CONFIG": "build-users-group =\nsandbox = false"}
    argv = ["nix-build", "nix/examples/hello.nix", "-A", attribute, "--no-out-link"]
    argv += ["--argstr", "nixlet", str(Path(".venv/bin/nixlet").absolute())]
    return subprocess.run(argv, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def ordinary_archive(directory: Path) -> Path:
    """An ordinary image with the very files of the Nix image: the closure's paths and the links below /."""
    closure = subprocess.run(
        ["nix-store", "--query", "--requisites", build("root")], capture_output=True, text=True, check=True
    )
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as layer:
        for path in closure.stdout.split():
            layer.add(path, path.lstrip("/"))
        hello = os.readlink(f"{build('root')}/bin/hello")
        layer.addfile(image_archives.link("bin/hello", hello))
    files = image_archives.oci([buffer.getvalue()], name=ORDINARY, config={"Entrypoint": ["/bin/hello"]})
    archive = directory / "ordinary.tar"
    archive.write_bytes(image_archives.tar(files))
    return archive


class Bench:
    def __init__(self, node: nodes.Node, containerd: Path, directory: Path) -> None:
        self.node = node
        self.ctr = [str(containerd.parent / "ctr"), "-a", str(node.containerd_socket), "-n", NAMESPACE]
        self.directory = directory
        self.numbers = itertools.count()
        self.archive = build("image")

    def load(self) -> None:
        address = ("--address", str(self.node.containerd_socket), "--namespace", NAMESPACE)
        self.node.ok("image", "load", *address, "--snapshotter", "overlayfs", str(ordinary_archive(self.directory)))
        self.node.ok("image", "load", *address, "--ref", NIX, self.archive)
        # For the CRI rows: both sides find the image there.
        self.node.ok("run", "--rm", self.archive)

    def ctr_run(self, snapshotter: str, image: str) -> float:
        argv = [*self.ctr, "run", "--rm", "--snapshotter", snapshotter, image, f"b{next(self.numbers)}"]
        start = time.perf_counter()
        done = subprocess.run(argv, capture_output=True, check=False)
        assert done.stdout == b"Hello, world!\n", done.stderr.decode()
        return (time.perf_counter() - start) * 1000

    def nixlet_run(self, *options: str) -> float:
        argv = [".venv/bin/nixlet", "run", *options, self.archive]
        start = time.perf_counter()
        done = subprocess.run(argv, env=self.node.environment, capture_output=True, check=False)
        assert done.stdout == b"Hello, world!\n", done.stderr.decode()
        return (time.perf_counter() - start) * 1000

    def crictl_pod(self) -> float:
        """runp, create, start: what crictl needs until the container runs; the removal is not counted."""
        number = next(self.numbers)
        pod, container = self.directory / "pod.json", self.directory / "container.json"
        metadata = {"name": f"crictl{number}", "namespace": "default", "uid": f"crictl{number}"}
        pod.write_text(json.dumps({"metadata": metadata, "log_directory": str(self.directory), "linux": {}}))
        image = {"image": f"nix:0{self.archive}"}
        container.write_text(json.dumps({"metadata": {"name": "c"}, "image": image, "log_path": "c.log", "linux": {}}))
        start = time.perf_counter()
        sandbox = self.node.crictl("runp", str(pod))
        made = self.node.crictl("create", sandbox, str(container), str(pod))
        self.node.crictl("start", made)
        taken = (time.perf_counter() - start) * 1000
        # Not counted, and after its end: containerd 1.6 fails to stop a container that ends at the same moment.
        while "CONTAINER_EXITED" not in self.node.crictl("inspect", made):
            time.sleep(0.02)
        self.node.crictl("rmp", "-f", sandbox)
        return taken

    def contenders(self) -> dict[str, measure.Contender]:
        return {
            "ctr run, ordinary image, overlayfs": lambda: self.ctr_run("overlayfs", ORDINARY),
            "ctr run, the same files as store paths, nix": lambda: self.ctr_run("nix", NIX),
            "crictl runp, create, start": self.crictl_pod,
            "nixlet run": self.nixlet_run,
            "nixlet run --rm": lambda: self.nixlet_run("--rm"),
        }


def memory(node: nodes.Node) -> dict[str, float]:
    """What the server alone takes at rest, in MB: resident, and its own share of it."""
    figures = {}
    for line in Path(f"/proc/{node.pid}/smaps_rollup").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in {"Rss", "Pss"}:
            figures[name.lower()] = int(rest.split()[0]) * 1024 / 1e6
    return figures


def document(report: dict[str, dict[str, Any]]) -> str:
    """The report as a section of docs/performance.md."""
    machine = ", ".join(f"{key} {value}" for key, value in measure.machine().items())
    lines = ["| containerd | row | median ms | min | max |", "|---|---|---|---|---|"]
    for version, figures in report.items():
        for name, row in figures["rows"].items():
            lines.append(f"| {version} | {name} | {row['median']:.0f} | {row['min']:.0f} | {row['max']:.0f} |")
    lines += [
        "",
        "| containerd | Nix image / ordinary image | `nixlet run` less crictl | server at rest |",
        "|---|---|---|---|",
    ]
    for version, figures in report.items():
        resident = figures["memory"]["rss"]
        lines.append(f"| {version} | {figures['ratio']:.2f} | {figures['longer_ms']:+.0f} ms | {resident:.0f} MB |")
    return "\n".join([f"Machine: {machine}.", "", *lines])


def main() -> None:
    parser = measure.arguments(__doc__ or "")
    parser.add_argument("--containerd", choices=parts.CONTAINERDS, action="append", help="only these versions")
    chosen = parser.parse_args()
    report = {}
    for version in chosen.containerd or parts.CONTAINERDS:
        containerd = parts.containerd(version)
        with measure.running_node(7, containerd) as (node, directory):
            time.sleep(3)
            at_rest = memory(node)
            bench = Bench(node, containerd, directory)
            bench.load()
            samples = measure.rounds(bench.contenders(), max(chosen.runs, 7), warm_up=2)
            node.remove_all_pods()
        rows = {name: measure.row(values) for name, values in samples.items()}
        ordinary, nix, crictl, run, _ = rows.values()
        print(f"\ncontainerd {version}\n{measure.HEAD}")
        for name, figures in rows.items():
            print(measure.shown(name, figures, ordinary if name.startswith("ctr") else crictl))
        ratio, longer = nix["median"] / ordinary["median"], run["median"] - crictl["median"]
        print(f"Nix image against ordinary image: {ratio:.2f} times (aim: at most {TARGET_RATIO})")
        print(f"nixlet run against crictl: {longer:+.0f} ms (aim: at most +{TARGET_RUN})")
        print(f"nixlet run against ctr run: {run['median'] - nix['median']:+.0f} ms (ctr makes no pod and no network)")
        print(
            f"memory of the server at rest: {at_rest['rss']:.0f} MB resident ({at_rest['pss']:.0f} MB its own; aim: at most {TARGET_MEMORY})"
        )
        report[version] = {"rows": rows, "memory": at_rest, "ratio": ratio, "longer_ms": longer}
    measure.publish(chosen, "start", report, document(report))


if __name__ == "__main__":
    main()
