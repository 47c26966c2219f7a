"""A cluster: from an empty directory until its node is ready, what its programs cost at rest, replicas of a Nix image, and an agent."""

import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import measure
import ready as nodeready
from support import kubeagents, kubernetes, nodes, parts, storeimages

#: The aim: seconds from an empty directory to a node that is ready.
TARGET_READY = 15

#: Store paths of the image that the replicas have, and how many there are.
PATHS, REPLICAS = 200, 20

#: Seconds that a cluster gets to come to rest.
SETTLE = 20.0

#: What k3s publishes of itself (docs.k3s.io, Resource Profiling: v1.26.5 with what it packages, Prometheus, Grafana and an example;
#: the whole of a server or agent, in percent of a core and MB): by datastore.
K3S = {"kine": (6, 1596), "etcd": (6, 1606), "agent": (3, 275)}

DATASTORES = ("etcd", "kine")


CONTAINERD = ("--containerd", str(parts.containerd(parts.CONTAINERDS[-1])))


class Contender:
    """One kind of cluster, each time in a new directory."""

    def __init__(self, number: int, datastore: str) -> None:
        self.number = number
        self.datastore = datastore

    @contextlib.contextmanager
    def ready(self) -> Iterator[tuple[kubernetes.Cluster, float]]:
        """A cluster whose node is ready, and the seconds that took from its process's start."""
        with tempfile.TemporaryDirectory(prefix="nixlet-cluster-") as directory:
            made = kubernetes.Cluster(self.number, Path(directory), *CONTAINERD)
            if self.datastore == "kine":
                made.environment["PATH"] = f"{parts.directories()['kine']}:{made.environment['PATH']}"
            with kubernetes.cleaned_up(made):
                start = time.perf_counter()
                made.start()
                made.await_node()
                yield made, time.perf_counter() - start

    def start(self) -> float:
        with self.ready() as (_, taken):
            return taken


def costs(node: nodes.Node, seconds: float) -> dict[str, dict[str, float]]:
    """What each program of a node takes at rest: percent of a core, and MB that are its own (proportional set size), by name."""
    programs: dict[str, list[int]] = {}
    for pid in nodes.with_descendants([node.pid]):
        with contextlib.suppress(OSError):
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            programs.setdefault("nixlet" if pid == node.pid else name, []).append(pid)
    before = {name: nodeready.cpu_seconds(pids) for name, pids in programs.items()}
    time.sleep(seconds)
    return {
        name: {
            "cpu": 100 * (nodeready.cpu_seconds(pids) - before[name]) / seconds,
            "mb": sum(proportional(pid) for pid in pids),
        }
        for name, pids in programs.items()
    }


def proportional(pid: int) -> float:
    """A process's proportional set size in MB (proc_pid_smaps(5))."""
    rows = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return int(rows["Pss"].split()[0]) * 1024 / 1e6


def replicas(cluster: kubernetes.Cluster, archives: Path, count: int) -> float:
    """Seconds from `kubectl create deployment` of an image that nobody pulled until all replicas are ready."""
    image = storeimages.make(archives, PATHS).reference
    start = time.perf_counter()
    create = ("create", "deployment", "many", f"--image={image}", f"--replicas={count}", "--", "/bin/sleep", "100000")
    cluster.kubectl(*create)

    def all_ready() -> bool:
        return bool(cluster.get("deployment", "many")["status"].get("readyReplicas", 0) == count)

    kubernetes.until(all_ready, "all replicas are ready")
    return time.perf_counter() - start


def measured(chosen: Contender, archives: Path, count: int, settle: float, seconds: float) -> dict[str, Any]:
    """What a cluster costs at rest, with a pod of its DNS; its replicas' time; an agent's start and costs."""
    with chosen.ready() as (cluster, _):
        cluster.await_dns()
        time.sleep(settle)
        found: dict[str, Any] = {
            "version": cluster.get("nodes")["items"][0]["status"]["nodeInfo"]["kubeletVersion"],
            "server": costs(cluster, seconds),
            "replicas": replicas(cluster, archives, count),
        }
        with tempfile.TemporaryDirectory(prefix="nixlet-cluster-") as directory:
            joining = ("--server", f"https://{cluster.address}:6443", "--token-file")
            agent = kubeagents.Agent(18, Path(directory), cluster, *CONTAINERD)
            agent.arguments = [*agent.arguments, *joining, str(agent.token_file)]
            with kubeagents.cleaned_up(agent):
                start = time.perf_counter()
                agent.start()
                kubernetes.until(agent.is_ready, "the agent is ready")
                found["agent_ready"] = time.perf_counter() - start
                time.sleep(settle)
                found["agent"] = costs(agent, seconds)
        return found


def document(report: Mapping[str, Mapping[str, Any]], seconds: float, count: int) -> str:
    """The report as a section of docs/performance.md."""
    machine = ", ".join(f"{key} {value}" for key, value in measure.machine().items())
    kubernetes_version = next(iter(report.values()))["version"]
    lines = [
        f"Machine: {machine}; Kubernetes {kubernetes_version}, containerd {parts.CONTAINERDS[-1]}.",
        "",
        f"| datastore | ready, s | {count} replicas of {PATHS} store paths ready, s | an agent ready, s |",
        "|---|---|---|---|",
    ]
    for name, figures in report.items():
        row = figures["ready"]
        taken = f"{row['median']:.1f} ({row['min']:.1f} to {row['max']:.1f})"
        lines.append(f"| {name} | {taken} | {figures['replicas']:.1f} | {figures['agent_ready']:.1f} |")
    lines += ["", f"| in {seconds:g} s at rest | % of a core | MB |", "|---|---|---|"]
    for name, figures in report.items():
        whole = {"cpu": 0.0, "mb": 0.0}
        for program, cost in sorted(figures["server"].items()):
            lines.append(f"| server, {name}: {program} | {cost['cpu']:.2f} | {cost['mb']:.0f} |")
            whole = {key: whole[key] + cost[key] for key in whole}
        lines.append(f"| **server, {name}: all** | {whole['cpu']:.1f} | {whole['mb']:.0f} |")
        lines.append(f"| k3s with {name}, published | {K3S[name][0]} | {K3S[name][1]} |")
    agent = next(iter(report.values()))["agent"]
    for program, cost in sorted(agent.items()):
        lines.append(f"| agent: {program} | {cost['cpu']:.2f} | {cost['mb']:.0f} |")
    cpu, mb = (sum(cost[key] for cost in agent.values()) for key in ("cpu", "mb"))
    lines.append(f"| **agent: all** | {cpu:.1f} | {mb:.0f} |")
    lines.append(f"| k3s agent, published | {K3S['agent'][0]} | {K3S['agent'][1]} |")
    return "\n".join(lines)


def main() -> None:
    parser = measure.arguments(__doc__ or "")
    parser.add_argument("--quick", action="store_true", help="one round and a short one: to see that it works")
    chosen = parser.parse_args()
    rounds, settle, seconds, count = (1, 1.0, 2.0, 2) if chosen.quick else (max(chosen.runs, 7), SETTLE, 60.0, REPLICAS)
    contenders = {name: Contender(17, name) for name in (DATASTORES[:1] if chosen.quick else DATASTORES)}
    samples = measure.rounds({name: each.start for name, each in contenders.items()}, rounds, warm_up=0)
    report: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="nixlet-cluster-") as archives:
        for name, contender in contenders.items():
            report[name] = {
                "ready": measure.row(samples[name]),
                **measured(contender, Path(archives), count, settle, seconds),
            }
    measure.publish(chosen, "cluster", report, document(report, seconds, count))
    print(f"the aim: ready within {TARGET_READY} s")


if __name__ == "__main__":
    sys.exit(main())
