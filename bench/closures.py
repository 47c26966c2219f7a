"""Starting containers from closures of many sizes, alone and beside others: nixlet, the Go nix-snapshotter, overlayfs."""

import contextlib
import functools
import io
import itertools
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measure
import plots
from calls import CONTAINERD, started
from nixlet.host import mounts
from nixlet.store import roots as gcroots
from support import image_archives, nodes, parts, storeimages

RUN = Path("/run/nixlet-test/b")
#: Contender to its name among containerd's snapshotters.
NAMES = {"nixlet": "nixlet", "Go nix-snapshotter": "gonix", "ordinary image, overlayfs": "overlayfs"}
TARGET = 1.1


class Machine:
    """One containerd with all three snapshotters, and the images of each size."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ctr = [str(parts.containerd(CONTAINERD).parent / "ctr"), "-a", f"{RUN}/containerd.sock", "-n", "bench"]
        self.numbers = itertools.count()

    def load(self, size: int) -> None:
        image = storeimages.make(self.directory, size)
        for name in ("nixlet", "gonix"):
            self._load(image.archive, f"localhost/{name}-{size}:1", name)
        self._load(self._ordinary(image, size), f"localhost/overlayfs-{size}:1", "overlayfs")

    def _load(self, archive: Path, reference: str, snapshotter: str) -> None:
        argv = [sys.executable, "-m", "nixlet", "image", "load", "--address", f"{RUN}/containerd.sock"]
        argv += ["--namespace", "bench", "--snapshotter", snapshotter, "--ref", reference, str(archive)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def _ordinary(self, image: storeimages.StoreImage, size: int) -> Path:
        """An ordinary image with the very files of the Nix image."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as layer:
            for path in image.paths:
                layer.add(str(path), str(path).lstrip("/"))
            for applet in os.listdir(f"{image.paths[0]}/bin"):
                layer.addfile(image_archives.link(f"bin/{applet}", f"{image.paths[0]}/bin/{applet}"))
        files = image_archives.oci(
            [buffer.getvalue()], name="ordinary", config={"Cmd": ["/bin/sh"], "Env": ["PATH=/bin"]}
        )
        archive = self.directory / f"ordinary-{size}.tar"
        archive.write_bytes(image_archives.tar(files))
        return archive

    def run(self, name: str, size: int) -> float:
        """Start a container that ends at once; ms."""
        argv = [
            *self.ctr,
            "run",
            "--rm",
            "--snapshotter",
            name,
            f"localhost/{name}-{size}:1",
            f"b{next(self.numbers)}",
            "/bin/true",
        ]
        return measure.timed(lambda: subprocess.run(argv, capture_output=True, check=True))

    def start(self, name: str, size: int) -> tuple[str, float]:
        """Start a container that goes on; its name, and ms."""
        container = f"r{next(self.numbers)}"
        argv = [
            *self.ctr,
            "run",
            "-d",
            "--snapshotter",
            name,
            f"localhost/{name}-{size}:1",
            container,
            "/bin/sleep",
            "10000",
        ]
        return container, measure.timed(lambda: subprocess.run(argv, capture_output=True, check=True))

    def remove(self, container: str) -> float:
        """End and remove one; ms."""

        def remove() -> None:
            subprocess.run([*self.ctr, "task", "delete", "--force", container], capture_output=True, check=True)
            subprocess.run([*self.ctr, "container", "delete", container], capture_output=True, check=True)

        return measure.timed(remove)


@contextlib.contextmanager
def machine(directory: Path) -> Iterator[Machine]:
    RUN.mkdir(parents=True, exist_ok=True)
    (directory / "go.toml").write_text(
        f'root = "{directory}/gonix"\naddress = "{RUN}/go.sock"\n'
        f'[image_service]\nenable = false\ncontainerd_address = "{RUN}/none.sock"\n'
    )
    plugins = "".join(
        f'[proxy_plugins.{name}]\ntype = "snapshot"\naddress = "{RUN}/{socket}"\n'
        for name, socket in (("nixlet", "nixlet.sock"), ("gonix", "go.sock"))
    )
    (directory / "containerd.toml").write_text(
        f'version = 2\nroot = "{directory}/containerd"\nstate = "{RUN}/state"\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
        f'[grpc]\naddress = "{RUN}/containerd.sock"\n[plugins."io.containerd.internal.v1.opt"]\npath = "{directory}/opt"\n{plugins}'
    )
    ours = [
        sys.executable,
        "-m",
        "nixlet",
        "snapshotter",
        "--root",
        f"{directory}/nixlet",
        "--address",
        f"{RUN}/nixlet.sock",
    ]
    go = [str(parts.tool("nix-snapshotter")), "--config", f"{directory}/go.toml"]
    program = parts.containerd(CONTAINERD)
    # A containerd takes the shim from its path; the one beside it is of its own version.
    os.environ["PATH"] = f"{program.parent}:{os.environ['PATH']}"
    log = directory / "log"
    try:
        with (
            started(ours, RUN / "nixlet.sock", log),
            started(go, RUN / "go.sock", log),
            started([str(program), f"--config={directory}/containerd.toml"], RUN / "containerd.sock", log),
        ):
            yield Machine(directory)
    finally:
        for pid in nodes.processes_below(RUN):
            os.kill(pid, 9)
        for entry in reversed([*mounts.below(str(directory)), *mounts.below(str(RUN))]):
            mounts.unmount(entry.path)
        roots = Path("/nix/var/nix/gcroots/nixlet") / gcroots.owner_of(f"{directory}/nixlet")
        subprocess.run(["rm", "-rf", str(RUN), str(roots)], check=True)


def alone(bench: Machine, sizes: list[int], rounds: int) -> dict[str, dict[str, Any]]:
    report = {}
    for size in sizes:
        samples = measure.rounds(
            {name: functools.partial(bench.run, short, size) for name, short in NAMES.items()}, rounds, warm_up=2
        )
        report[str(size)] = {name: measure.row(values) for name, values in samples.items()}
        print(
            f"alone, {size} paths: " + ", ".join(f"{n} {r['median']:.0f} ms" for n, r in report[str(size)].items()),
            flush=True,
        )
    return report


def beside(bench: Machine, sizes: list[int], others: int, rounds: int) -> dict[str, dict[str, Any]]:
    """With ``others`` containers of the same image running: a start, and what starting and removing the others took each."""
    report: dict[str, dict[str, Any]] = {}
    for size in sizes:
        row: dict[str, Any] = {}
        for name, short in NAMES.items():
            began = [bench.start(short, size) for _ in range(others)]
            runs = [bench.run(short, size) for _ in range(rounds + 1)][1:]
            hosts = len(list(mounts.table()))
            removals = [bench.remove(container) for container, _ in began]
            row[name] = {
                "run": measure.row(runs),
                "start": measure.row([taken for _, taken in began]),
                "remove": measure.row(removals),
                "host_mounts": hosts,
            }
        report[str(size)] = row
        print(
            f"beside {others}, {size} paths: " + ", ".join(f"{n} {r['run']['median']:.0f} ms" for n, r in row.items()),
            flush=True,
        )
    return report


def growing(bench: Machine, size: int, steps: list[int], rounds: int) -> dict[str, list[float]]:
    """The median start over the number of containers that run already."""
    lines: dict[str, list[float]] = {}
    for name, short in NAMES.items():
        running: list[str] = []
        lines[name] = []
        for step in steps:
            while len(running) < step:
                running.append(bench.start(short, size)[0])
            lines[name].append(measure.row([bench.run(short, size) for _ in range(rounds + 1)][1:])["median"])
        for container in running:
            bench.remove(container)
    return lines


def document(report: dict[str, Any], others: int) -> str:
    """The report as a section of docs/performance.md, with verdicts."""
    about = ", ".join(f"{key} {value}" for key, value in measure.machine().items())
    lines = [f"Machine: {about}; containerd {CONTAINERD}, nix-snapshotter v0.4.0.", ""]
    lines += [
        "`ctr run --rm … /bin/true`, median ms (lowest to highest):",
        "",
        "| running | paths | nixlet | Go nix-snapshotter | ordinary image, overlayfs | nixlet / ordinary | Go / ordinary |",
        "|---|---|---|---|---|---|---|",
    ]

    def row(running: int, size: str, rows: list[dict[str, float]]) -> str:
        cells = [f"{each['median']:.0f} ({each['min']:.0f} to {each['max']:.0f})" for each in rows]
        ratios = [f"{each['median'] / rows[2]['median']:.2f}" for each in rows[:2]]
        return f"| {running} | {size} | {' | '.join([*cells, *ratios])} |"

    lines += [row(0, size, list(by_name.values())) for size, by_name in report["alone"].items()]
    lines += [
        row(others, size, [each["run"] for each in by_name.values()]) for size, by_name in report["beside"].items()
    ]
    lines += [
        "",
        f"Starting and removing the {others}, each, median ms; and the mounts of the host meanwhile:",
        "",
        "| paths | | nixlet | Go nix-snapshotter | ordinary image, overlayfs | nixlet / ordinary |",
        "|---|---|---|---|---|---|",
    ]
    for size, by_name in report["beside"].items():
        for what in ("start", "remove"):
            rows = [each[what] for each in by_name.values()]
            cells = " | ".join(f"{each['median']:.0f} ({each['min']:.0f} to {each['max']:.0f})" for each in rows)
            lines.append(f"| {size} | {what} | {cells} | {rows[0]['median'] / rows[2]['median']:.2f} |")
        lines.append(f"| {size} | mounts | {' | '.join(str(each['host_mounts']) for each in by_name.values())} | |")
    lines += ["", f"The aim is at most {TARGET} times the ordinary image, in every row."]
    lines += ["", "![Start time over the closure's size](start-by-size.svg)", ""]
    lines += ["![Start time over the number of running containers](start-by-running.svg)"]
    return "\n".join(lines)


def main() -> None:
    parser = measure.arguments(__doc__ or "")
    parser.add_argument("--quick", action="store_true", help="few rounds and small numbers: to see that it works")
    chosen = parser.parse_args()
    sizes, others, rounds = ([1, 10], 2, 2) if chosen.quick else ([1, 50, 200, 500, 1000], 30, max(chosen.runs, 7))
    steps, middle = ([0, 2], 10) if chosen.quick else ([0, 10, 20, 30], 200)
    with tempfile.TemporaryDirectory(prefix="nixlet-closures-") as name, machine(Path(name)) as bench:
        for size in sizes:
            bench.load(size)
        report = {
            "alone": alone(bench, sizes, rounds),
            "beside": beside(bench, sizes, others, rounds),
            "growing": growing(bench, middle, steps, rounds),
        }
    measure.publish(chosen, "closures", report, document(report, others))
    if chosen.docs:
        by_size = {name: [report["alone"][str(size)][name]["median"] for size in sizes] for name in NAMES}
        plots.write(
            Path("docs/start-by-size.svg"),
            title="Starting a container over the size of its closure",
            across="store paths in the closure",
            upwards="ctr run --rm, ms",
            points=sizes,
            lines=by_size,
        )
        plots.write(
            Path("docs/start-by-running.svg"),
            title=f"Starting a container of {middle} store paths beside others",
            across="containers running already",
            upwards="ctr run --rm, ms",
            points=steps,
            lines=report["growing"],
        )


if __name__ == "__main__":
    main()
