"""The verbs that people type: nixlet's against nerdctl's and nix2container's, on the same containerd."""

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import alone
import commands
import crowd
import loading
import measure
import throughput
from support import parts, storeimages

#: A program that ends as soon as it is asked to.
STAYING = ("sh", "-c", 'trap "exit 0" TERM; echo ready; while true; do sleep 1 & wait; done')

#: At most so many times nerdctl's time (or nix2container's), at least so much of its throughput; and milliseconds of CPU.
LIKE, ASKING, THROUGHPUT = 1.0, 3.0, 0.8
CPU_MS = 80

#: Seconds until the next command after one that takes containers away: what goes on behind an answer is not for the next one to bear.
SETTLING = 0.5

CHANGING = (
    *("run --rm, bridge", "run --rm, --network none", "run --rm, --network host"),
    *("run -d", "exec", "stop", "rm"),
)
LOOKING = ("ps", "images", "version", "logs")


@dataclasses.dataclass(frozen=True, slots=True)
class Size:
    """How much is measured: rounds, bytes of output, paths of the image that is loaded, containers and clients of the crowd."""

    rounds: int
    output: int
    paths: int
    containers: int
    clients: int


FULL = Size(rounds=9, output=1_000_000_000, paths=500, containers=100, clients=16)
QUICK = Size(rounds=1, output=2_000_000, paths=20, containers=4, clients=2)


class Round:
    """What one tool does in one round."""

    def __init__(self, tool: commands.Tool) -> None:
        self._tool = tool
        self._number = 0

    def changing(self) -> dict[str, commands.Ran]:
        """Containers that end at once, and the life of one that stays."""
        tool = self._tool
        self._number += 1
        name = f"life{self._number}"
        networks = {"bridge": (), "--network none": ("--network", "none"), "--network host": ("--network", "host")}
        ran = {}
        for network, options in networks.items():
            ran[f"run --rm, {network}"] = tool.ran("run", "--rm", *options, tool.image, "true")
            time.sleep(SETTLING)
        ran |= {
            "run -d": tool.ran("run", "-d", "--name", name, tool.image, *STAYING),
            "exec": tool.ran("exec", name, "true"),
            "stop": tool.ran("stop", name),
            "rm": tool.ran("rm", name),
        }
        time.sleep(SETTLING)
        return ran

    def looking(self) -> dict[str, commands.Ran]:
        """The verbs that change nothing; "staying" runs meanwhile."""
        ran = {verb: self._tool.ran(verb) for verb in ("ps", "images", "version")}
        return ran | {"logs": self._tool.ran("logs", "staying")}


def verb_rows(tools: Sequence[commands.Tool], rounds: int) -> dict[str, Any]:
    """What each verb takes, by verb and tool: time and CPU in milliseconds."""
    by_name = {tool.name: Round(tool) for tool in tools}
    for tool in tools:
        tool.ran("run", "-d", "--name", "staying", tool.image, *STAYING)
    warm_up = min(rounds - 1, 2)
    changing = measure.rounds({name: each.changing for name, each in by_name.items()}, rounds, warm_up=warm_up)
    looking = measure.rounds({name: each.looking for name, each in by_name.items()}, rounds, warm_up=warm_up)
    for tool in tools:
        tool.ran("rm", "-f", "staying")
    return {
        verb: {
            name: {
                **measure.row([ran[verb].ms for ran in samples[name]]),
                "cpu_ms": measure.row([ran[verb].cpu_ms for ran in samples[name]])["median"],
            }
            for name in by_name
        }
        for samples, verbs in ((changing, CHANGING), (looking, LOOKING))
        for verb in verbs
    }


#: The node's option by which all that a container prints is in its log.
WHOLE_LOGS = ("--container-log-max-size", "16Gi")


def measured(containerd: Path, size: Size) -> dict[str, Any]:
    """All figures on one containerd."""
    with (
        measure.running_node(17, containerd, *WHOLE_LOGS) as (node, directory),
        commands.nerdctl(node, directory) as nerdctl,
    ):
        image = storeimages.make(directory, 7)
        address = ("--address", str(node.containerd_socket), "--namespace", commands.NAMESPACE)
        node.ok("image", "load", *address, "--ref", commands.IMAGE, str(image.archive))
        node.ok("image", "load", str(image.archive))
        tools = [commands.nixlet(node, str(image.archive)), nerdctl]
        return {
            "verbs": verb_rows(tools, size.rounds),
            "output": throughput.rows(tools, size.output, min(size.rounds, 2)),
            "load": loading.rows(node, storeimages.make(directory, size.paths), containerd, size.rounds),
            "crowd": crowd.rows(tools, size.containers, size.clients, min(size.rounds, 2)),
        }


def table(version: str, figures: Mapping[str, Any], size: Size) -> list[str]:
    """One containerd's rows of the table."""
    lines = []

    def add(what: str, row: Mapping[str, Any], unit: str, aim: str, digits: int = 0) -> None:
        (ours, other) = row.values()
        cells = [
            f"{each['median']:.{digits}f} ({each['min']:.{digits}f} to {each['max']:.{digits}f})"
            for each in row.values()
        ]
        ratio = ours["median"] / other["median"]
        lines.append(f"| {version} | {what}, {unit} | {' | '.join(cells)} | {ratio:.2f} | {aim} |")

    for verb, row in figures["verbs"].items():
        add(verb, row, "ms", f"at most {LIKE}" if verb in CHANGING else f"below {ASKING}")
    for verb, row in figures["verbs"].items():
        if verb in LOOKING:
            cells = [f"{each['cpu_ms']:.0f}" for each in row.values()]
            ratio = row["nixlet"]["cpu_ms"] / row["nerdctl"]["cpu_ms"]
            lines.append(f"| {version} | {verb}, CPU ms | {' | '.join(cells)} | {ratio:.2f} | below {CPU_MS} ms |")
    for what, row in figures["output"].items():
        add(f"{what} of {size.output / 1e6:.0f} MB", row, "MB/s", f"at least {THROUGHPUT}")
    for what, row in figures["load"].items():
        add(f"load of {size.paths} paths, {what}", row, "ms", f"at most {LIKE}")
    add(f"{size.containers} containers by {size.clients} clients", figures["crowd"], "s", f"at most {LIKE}", digits=1)
    return lines


def document(report: Mapping[str, Mapping[str, Any]], size: Size) -> str:
    """The report as a section of docs/performance.md."""
    machine = ", ".join(f"{key} {value}" for key, value in measure.machine().items())
    lines = [
        f"Machine: {machine}; nerdctl 2.0.5.",
        "",
        "| containerd | what | nixlet | nerdctl; for loads nix2container | ratio | aim |",
        "|---|---|---|---|---|---|",
    ]
    for version, figures in report.items():
        lines += table(version, figures, size)
    return "\n".join(lines)


def main() -> None:
    chosen = commands.arguments(__doc__ or "", "few rounds and small numbers").parse_args()
    alone.on_the_network()
    size = QUICK if chosen.quick else dataclasses.replace(FULL, rounds=max(chosen.runs, 7))
    versions = commands.versions(chosen)
    report = {}
    for version in versions:
        report[version] = measured(parts.containerd(version), size)
        # The whole takes half an hour.
        print("\n".join(table(version, report[version], size)), file=sys.stderr, flush=True)
    measure.publish(chosen, "verbs", report, document(report, size))


if __name__ == "__main__":
    sys.exit(main())
