"""From a process's start until pods can be run: `nixlet server` against a bare containerd; and what a node at rest costs."""

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

import measure
from nixlet.containerd import cri
from nixlet.host import mounts
from nixlet.rpc import channel as channels
from support import nodes, parts

#: The aim: at most so many milliseconds more than containerd's own start.
TARGET_MORE = 350
#: The aim for a node at rest, in percent of one core.
TARGET_IDLE = 0.5

#: Seconds that a node gets to come to rest, and seconds that a start may take.
SETTLE, PATIENCE = 5.0, 60.0

NIX = "the node"
BARE = "containerd alone"


class Contenders:
    """A node and a bare containerd of one version, each with directories of its own that stay from round to round."""

    def __init__(self, containerd: Path, directory: Path) -> None:
        self.directory = directory
        self.containerd = containerd
        self.node = nodes.Node(15, directory, "--containerd", str(containerd))
        self.bare_data, self.bare_state = directory / "bare", Path("/run/nixlet-test/16")

    @contextlib.contextmanager
    def ready_node(self) -> Iterator[float]:
        """A running node, and the milliseconds from its process's start until it told its service manager READY=1."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            place = self.directory / "notify"
            place.unlink(missing_ok=True)
            manager.bind(str(place))
            manager.settimeout(PATIENCE)
            self.node.environment["NOTIFY_SOCKET"] = str(place)
            start = time.perf_counter()
            process = self.node.launch()
            try:
                while b"READY=1" not in manager.recv(4096).split(b"\n"):
                    assert process.poll() is None, self.node.log.read_text()
                yield (time.perf_counter() - start) * 1000
            finally:
                process.terminate()
                assert process.wait(PATIENCE) == 0, self.node.log.read_text()

    def start_node(self) -> float:
        with self.ready_node() as taken:
            return taken

    def start_bare(self) -> float:
        """The milliseconds from a containerd's start until its CRI answers for its version."""
        config = self.bare_config()
        argv = [str(self.containerd), f"--config={config}", f"--address={self.bare_state}/containerd/containerd.sock"]
        path = os.pathsep.join([str(self.containerd.parent), os.environ["PATH"], "/usr/sbin"])
        with (self.directory / "bare.log").open("ab") as log:
            start = time.perf_counter()
            process = subprocess.Popen(argv, env={**os.environ, "PATH": path}, stdout=log, stderr=log)
            try:
                asyncio.run(self.answered(process))
                return (time.perf_counter() - start) * 1000
            finally:
                process.terminate()
                process.wait(PATIENCE)

    async def answered(self, process: "subprocess.Popen[bytes]") -> None:
        address = f"{self.bare_state}/containerd/containerd.sock"
        async with asyncio.timeout(PATIENCE), channels.connect(address) as channel:
            await channels.wait_until_answered(cri.RuntimeClient(channel, address).version)
        assert process.poll() is None

    def bare_config(self) -> Path:
        """The node's own configuration, moved to other directories; images lie on overlayfs, since nobody serves the snapshotter.

        The plugins are the same, also the proxy to the snapshotter, which containerd doesn't call at its start.
        """
        etc = self.bare_data / "agent" / "etc"
        config = etc / "containerd" / "config.toml"
        if config.exists():
            return config
        shutil.copytree(self.node.data_dir / "agent" / "etc", etc)
        self.bare_state.mkdir(parents=True, exist_ok=True)
        text = config.read_text().replace(str(self.node.data_dir), str(self.bare_data))
        table = tomllib.loads(text.replace(str(self.node.state_dir), str(self.bare_state)))
        plugins = table["plugins"]
        images = plugins["io.containerd.grpc.v1.cri"]["containerd"] if table["version"] == 2 else None
        (images or plugins["io.containerd.cri.v1.images"])["snapshotter"] = "overlayfs"
        config.write_text(tomli_w.dumps(table))
        return config

    def clean_up(self) -> None:
        for place in (self.bare_data, self.bare_state):
            for entry in reversed(mounts.below(str(place))):
                mounts.unmount(entry.path)
            subprocess.run(["rm", "-rf", str(place)], check=True)


@contextlib.contextmanager
def contenders(containerd: Path) -> Iterator[Contenders]:
    with tempfile.TemporaryDirectory(prefix="nixlet-ready-") as name:
        made = Contenders(containerd, Path(name))
        try:
            with nodes.cleaned_up(made.node):
                yield made
        finally:
            made.clean_up()


def cpu_seconds(pids: Sequence[int]) -> float:
    """What processes used so far, with those of their children that have ended (proc_pid_stat(5): utime to cstime)."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def at_rest(made: Contenders, seconds: float) -> dict[str, float]:
    """The share of one core, in percent, that nixlet's processes take at rest, and containerd's."""
    with made.ready_node():
        time.sleep(min(SETTLE, seconds))
        family = nodes.with_descendants([made.node.pid])
        theirs = [pid for pid in family if Path(f"/proc/{pid}/comm").read_text().strip() == "containerd"]
        ours = [pid for pid in family if pid not in theirs]
        before = cpu_seconds(ours), cpu_seconds(theirs)
        time.sleep(seconds)
        after = cpu_seconds(ours), cpu_seconds(theirs)
    used = [100 * (b - a) / seconds for a, b in zip(before, after, strict=True)]
    return {"nixlet": used[0], "containerd": used[1]}


def document(report: Mapping[str, Mapping[str, Any]], seconds: float) -> str:
    """The report as a section of docs/performance.md."""
    machine = ", ".join(f"{key} {value}" for key, value in measure.machine().items())
    lines = [
        f"Machine: {machine}.",
        "",
        (
            "| containerd | `nixlet server` ms | containerd alone ms | more ms | aim, at most ms |"
            f" nixlet at rest, % of a core in {seconds:g} s | containerd at rest |"
        ),
        "|---|---|---|---|---|---|---|",
    ]
    for version, figures in report.items():
        node, bare = figures["rows"][NIX], figures["rows"][BARE]
        cells = [f"{row['median']:.0f} ({row['min']:.0f} to {row['max']:.0f})" for row in (node, bare)]
        cells += [f"{node['median'] - bare['median']:+.0f}", f"{figures['aim_ms']:.0f}"]
        cells += [f"{figures['idle'][name]:.2f}" for name in ("nixlet", "containerd")]
        lines.append(f"| {version} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = measure.arguments(__doc__ or "")
    parser.add_argument("--containerd", choices=parts.CONTAINERDS, action="append", help="only these versions")
    parser.add_argument("--quick", action="store_true", help="few rounds and short ones: to see that it works")
    chosen = parser.parse_args()
    versions = chosen.containerd or (parts.CONTAINERDS[-1:] if chosen.quick else parts.CONTAINERDS)
    rounds, seconds = (1, 2.0) if chosen.quick else (max(chosen.runs, 7), 30.0)
    report = {}
    for version in versions:
        with contenders(parts.containerd(version)) as made:
            samples = measure.rounds({NIX: made.start_node, BARE: made.start_bare}, rounds, warm_up=2)
            idle = at_rest(made, seconds)
        rows = {name: measure.row(values) for name, values in samples.items()}
        aim = rows[BARE]["median"] + TARGET_MORE
        print(f"\ncontainerd {version}\n{measure.HEAD}")
        for name, figures in rows.items():
            print(measure.shown(name, figures, rows[BARE]))
        print(f"a node's start: {rows[NIX]['median']:.0f} ms (aim: at most {aim:.0f})")
        print(
            f"at rest: {idle['nixlet']:.2f} % of a core (aim: below {TARGET_IDLE}); containerd {idle['containerd']:.2f} %"
        )
        report[version] = {"rows": rows, "aim_ms": aim, "idle": idle}
    measure.publish(chosen, "ready", report, document(report, seconds))


if __name__ == "__main__":
    sys.exit(main())
