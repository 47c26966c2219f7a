"""The calls of a snapshotter, as containerd makes them: nixlet's, the Go nix-snapshotter's, and containerd's own overlayfs."""

import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import measure
from nixlet.host import mounts, unixsocket
from nixlet.rpc import channel as channels
from nixlet.rpc.gen import containerd_snapshots_grpc
from nixlet.rpc.gen import containerd_snapshots_pb2 as pb
from nixlet.store import roots as gcroots
from support import parts, storeimages

CONTAINERD = "1.7.35"
RUN = Path("/run/nixlet-test/b")
METHODS = ("Prepare", "Commit", "View", "Remove", "Mounts", "Stat")
REF = "containerd.io/snapshot.ref"

#: How many times as long as the Go snapshotter's a call may take, by the number of clients, where that isn't LIMIT.
LIMITS: dict[int, dict[str, float]] = {1: {}, 16: {"Stat": 2.0, "Mounts": 2.0}}
LIMIT = 1.0


class Contender:
    """A snapshotter that serves on a socket, and its process."""

    def __init__(self, name: str, socket: Path, process: "subprocess.Popen[bytes]", snapshotter: str = "") -> None:
        self.name = name
        self.socket = socket
        self.process = process
        self.snapshotter = snapshotter

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[containerd_snapshots_grpc.SnapshotsStub]:
        async with channels.connect(str(self.socket)) as channel:
            yield containerd_snapshots_grpc.SnapshotsStub(channel)

    def resident(self) -> float:
        """Its memory, in MB."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024 / 1e6
        raise AssertionError(f"{self.name} has ended")

    def calls(self, clients: int, cycles: int, parent: str = "") -> dict[str, dict[str, float]]:
        """Times of calls in microseconds, by a client in Go, as containerd is one."""
        environment = {
            **os.environ,
            "CALLS_ADDRESS": str(self.socket),
            "CALLS_CLIENTS": str(clients),
            "CALLS_CYCLES": str(cycles),
            "CALLS_PARENT": parent,
            "CALLS_SNAPSHOTTER": self.snapshotter,
        }
        argv = [str(parts.directories()["conformance"] / "conformance"), "-test.run", "^TestCallTimes$"]
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
        found = [line for line in done.stdout.splitlines() if line.startswith("calls ")]
        assert found, done.stdout + done.stderr
        times: dict[str, dict[str, float]] = json.loads(found[0].removeprefix("calls "))
        return times


@contextlib.contextmanager
def started(argv: Sequence[str], socket: Path, log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    with log.open("ab") as out, subprocess.Popen(argv, stdout=out, stderr=out) as process:
        try:
            for _ in range(500):
                if unixsocket.is_served(str(socket)):
                    break
                assert process.poll() is None, log.read_text()
                time.sleep(0.02)
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


@contextlib.contextmanager
def contenders(directory: Path) -> Iterator[dict[str, Contender]]:
    """All three, at the same time, each with a directory and a socket of its own."""
    RUN.mkdir(parents=True, exist_ok=True)
    (directory / "go.toml").write_text(
        f'root = "{directory}/go"\naddress = "{RUN}/go.sock"\n'
        f'[image_service]\nenable = false\ncontainerd_address = "{RUN}/none.sock"\n'
    )
    (directory / "containerd.toml").write_text(
        f'version = 2\nroot = "{directory}/containerd"\nstate = "{RUN}/state"\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
        f'[grpc]\naddress = "{RUN}/containerd.sock"\n[plugins."io.containerd.internal.v1.opt"]\npath = "{directory}/opt"\n'
    )
    commands = {
        "nixlet": ([sys.executable, "-m", "nixlet", "snapshotter", "--root", f"{directory}/nixlet"], "nixlet.sock", ""),
        "Go nix-snapshotter": ([str(parts.tool("nix-snapshotter")), "--config", f"{directory}/go.toml"], "go.sock", ""),
        "overlayfs": (
            [str(parts.containerd(CONTAINERD)), f"--config={directory}/containerd.toml"],
            "containerd.sock",
            "overlayfs",
        ),
    }
    commands["nixlet"][0].extend(["--address", f"{RUN}/nixlet.sock"])
    try:
        with contextlib.ExitStack() as stack:
            made = {}
            for name, (argv, socket, snapshotter) in commands.items():
                process = stack.enter_context(started(argv, RUN / socket, directory / "log"))
                made[name] = Contender(name, RUN / socket, process, snapshotter)
            yield made
    finally:
        for entry in reversed(mounts.below(str(directory))):
            mounts.unmount(entry.path)
        roots = Path("/nix/var/nix/gcroots/nixlet") / gcroots.owner_of(f"{directory}/nixlet")
        subprocess.run(["rm", "-rf", str(RUN), str(roots)], check=True)


def annotations(archive: Path) -> dict[str, str]:
    """What an image's topmost layer with annotations says, as the labels of its snapshot."""
    with tarfile.open(archive) as tar:

        def read(name: str) -> dict[str, Any]:
            member = tar.extractfile(name)
            assert member is not None
            content: dict[str, Any] = json.load(member)
            return content

        digest = read("index.json")["manifests"][0]["digest"].removeprefix("sha256:")
        layers = read(f"blobs/sha256/{digest}")["layers"]
    return next(layer["annotations"] for layer in reversed(layers) if layer.get("annotations"))


async def unpacking(contender: Contender, labels: dict[str, str], rounds: int) -> list[float]:
    """Times of an unpack's Prepare of a Nix layer whose paths are all present, in milliseconds."""
    times = []
    async with contender.client() as stub:
        for number in range(rounds):
            key = f"bench/1/extract-{time.time_ns()}-{number}"
            request = pb.PrepareSnapshotRequest(key=key, labels={**labels, REF: key})
            start = time.perf_counter()
            await stub.Prepare(request)
            times.append((time.perf_counter() - start) * 1000)
            await stub.Remove(pb.RemoveSnapshotRequest(key=key))
            await stub.Cleanup(pb.CleanupRequest())
    return times


async def layer(contender: Contender, labels: dict[str, str]) -> str:
    """Unpack a Nix layer; its name."""
    async with contender.client() as stub:
        await stub.Prepare(pb.PrepareSnapshotRequest(key="bench/1/extract-layer", labels={**labels, REF: "layer"}))
        await stub.Commit(pb.CommitSnapshotRequest(key="bench/1/extract-layer", name="layer", labels=labels))
    return "layer"


async def fill(contender: Contender, begin: int, end: int) -> None:
    """Snapshots with numbers from ``begin`` to below ``end``, by 16 callers at once."""
    gate = asyncio.Semaphore(16)
    async with contender.client() as stub:

        async def one(number: int) -> None:
            async with gate:
                await stub.Prepare(
                    pb.PrepareSnapshotRequest(key=f"fill-{number}", labels={"containerd.io/x": "y" * 60})
                )

        await asyncio.gather(*(one(number) for number in range(begin, end)))


async def looking(contender: Contender, rounds: int = 5) -> tuple[float, float]:
    """The median times of a List, for each snapshot, and of a Stat, in microseconds, while 16 callers do nothing else."""

    async def timed(call: Callable[[], Awaitable[object]]) -> float:
        start = time.perf_counter()
        await call()
        return (time.perf_counter() - start) * 1e6

    async with contender.client() as stub:

        async def listing() -> object:
            return sum(len(page.info) for page in await stub.List(pb.ListSnapshotsRequest()))

        count = await listing()
        assert isinstance(count, int)
        lists = [await timed(listing) for _ in range(rounds)]
        asked = [await timed(lambda: stub.Stat(pb.StatSnapshotRequest(key="fill-7"))) for _ in range(200)]
        # And all at once: nobody is locked out.
        await asyncio.gather(*(listing() for _ in range(16)))
    return statistics.median(lists) / max(count, 1), statistics.median(asked)


def call_rows(made: dict[str, Contender], rounds: int, cycles: int) -> dict[str, Any]:
    """Medians of the rounds' p50 and p99, by clients, method and contender."""
    report: dict[str, Any] = {}
    for clients in (1, 16):
        seen: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in made}
        for _ in range(rounds):
            for name, contender in made.items():
                seen[name].append(contender.calls(clients, cycles if clients == 1 else max(cycles // 8, 10)))
        report[str(clients)] = {
            method: {
                name: {which: statistics.median(each[method][which] for each in times) for which in ("p50", "p99")}
                | {"spread": [min(each[method]["p50"] for each in times), max(each[method]["p50"] for each in times)]}
                for name, times in seen.items()
            }
            for method in METHODS
        }
    return report


async def nix_rows(made: dict[str, Contender], directory: Path, rounds: int) -> dict[str, Any]:
    """What Nix layers cost: unpacking, and preparing a container on one of 200 paths."""
    both = {name: made[name] for name in ("nixlet", "Go nix-snapshotter")}
    report: dict[str, Any] = {}
    for form, closure_form, count in (("one annotation a path", False, 3), ("closure", True, rounds)):
        image = await asyncio.to_thread(storeimages.make, directory, 200, closure_form=closure_form)
        labels = annotations(image.archive)
        report[f"unpack Prepare, {form}"] = {
            name: measure.row((await unpacking(each, labels, count + 1))[1:]) for name, each in both.items()
        }
        if closure_form:
            prepared: dict[str, list[float]] = {name: [] for name in both}
            for each in both.values():
                await layer(each, labels)
            for _ in range(3):
                for name, each in both.items():
                    times = await asyncio.to_thread(each.calls, 1, 100, "layer")
                    prepared[name].append(times["Prepare"]["p50"] / 1000)
            report["a container's Prepare"] = {name: measure.row(values) for name, values in prepared.items()}
    return report


async def scale_rows(made: dict[str, Contender], sizes: Sequence[int]) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for name in ("nixlet", "Go nix-snapshotter"):
        rows, have = {}, 0
        for size in sizes:
            await fill(made[name], have, size)
            have = size
            per_entry, stat = await looking(made[name])
            rows[str(size)] = {"list_us_per_snapshot": per_entry, "stat_us": stat, "rss_mb": made[name].resident()}
        report[name] = rows
    return report


def document(report: dict[str, Any]) -> str:
    """The report as a section of docs/performance.md, with verdicts."""
    machine = ", ".join(f"{key} {value}" for key, value in measure.machine().items())
    lines = [f"Machine: {machine}; containerd {CONTAINERD}, nix-snapshotter v0.4.0.", ""]
    for clients, methods in report["calls"].items():
        lines += [
            f"Calls with {clients} client{'s' * (clients != '1')}, p50 / p99 in µs (in brackets: the rounds' lowest and highest p50):",
            "",
            "| call | nixlet | Go nix-snapshotter | overlayfs | nixlet / Go | at most |",
            "|---|---|---|---|---|---|",
        ]
        for method, by_name in methods.items():
            cells = [
                f"{row['p50']:.0f} / {row['p99']:.0f} ({row['spread'][0]:.0f} to {row['spread'][1]:.0f})"
                for row in by_name.values()
            ]
            ratio = by_name["nixlet"]["p50"] / by_name["Go nix-snapshotter"]["p50"]
            limit = LIMITS[int(clients)].get(method, LIMIT)
            lines.append(f"| {method} | {' | '.join(cells)} | {ratio:.2f} | {limit} |")
        lines.append("")
    lines += [
        "A Nix layer of 200 paths, all present; ms:",
        "",
        "| | nixlet | Go nix-snapshotter | nixlet / Go | at most |",
        "|---|---|---|---|---|",
    ]
    limits = {
        "unpack Prepare, one annotation a path": 1 / 30,
        "unpack Prepare, closure": 1.0,
        "a container's Prepare": 1.0,
    }
    for name, by_name in report["nix"].items():
        cells = [f"{row['median']:.1f} ({row['min']:.1f} to {row['max']:.1f})" for row in by_name.values()]
        ratio = by_name["nixlet"]["median"] / by_name["Go nix-snapshotter"]["median"]
        lines.append(f"| {name} | {' | '.join(cells)} | {ratio:.3f} | {limits[name]:.3f} |")
    lines += [
        "",
        "With many snapshots (16 listings at once pass meanwhile):",
        "",
        "| snapshots | snapshotter | List, µs a snapshot | Stat, µs | resident MB |",
        "|---|---|---|---|---|",
    ]
    for name, rows in report["scale"].items():
        for size, row in rows.items():
            lines.append(
                f"| {size} | {name} | {row['list_us_per_snapshot']:.1f} | {row['stat_us']:.0f} | {row['rss_mb']:.0f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = measure.arguments(__doc__ or "")
    parser.add_argument("--quick", action="store_true", help="few rounds and small numbers: to see that it works")
    chosen = parser.parse_args()
    rounds, cycles, sizes = (1, 20, (20, 40)) if chosen.quick else (5, 300, (100, 1000, 10_000))
    with tempfile.TemporaryDirectory(prefix="nixlet-calls-") as name, contenders(Path(name)) as made:
        report = {
            "calls": call_rows(made, rounds, cycles),
            "nix": asyncio.run(nix_rows(made, Path(name), 3 if chosen.quick else 9)),
            "scale": asyncio.run(scale_rows(made, sizes)),
        }
    measure.publish(chosen, "calls", report, document(report))


if __name__ == "__main__":
    main()
