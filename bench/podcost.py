"""What a pod of one container costs: each step that a node asks of containerd's CRI, and the CNI plugins among them."""

import asyncio
import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import alone
import commands
import measure
from nixlet import errors
from nixlet.containerd import client, cri
from nixlet.pods import nonetwork
from nixlet.rpc import channel as channels
from nixlet.rpc.gen import cri_pb2
from support import nodes, parts, storeimages

#: How a pod can get its network: from CNI; the host's; and one of its container alone, which runc makes by a changed record.
NETWORKS = BRIDGE, HOST, NONE = "bridge", "host", "none by the container's record"

CNI_DIRECTORY = "/usr/lib/cni"

Steps = dict[str, float]


class Pods:
    """Pods of one container that ends at once, made and removed as a node does it."""

    def __init__(self, channel: channels.Channel, address: str, image: str, directory: Path) -> None:
        self._runtime = cri.RuntimeClient(channel, address)
        self._containerd = client.Containerd(channel, address)
        self._image = image
        self._directory = directory
        self._numbers = itertools.count()

    async def played(self, network: str) -> Steps:
        """The milliseconds of each step."""
        name = f"cost{next(self._numbers)}"
        namespaces = cri_pb2.NamespaceOption(
            network=cri_pb2.POD if network == BRIDGE else cri_pb2.NODE, pid=cri_pb2.CONTAINER
        )
        pod = cri_pb2.PodSandboxConfig(
            metadata=cri_pb2.PodSandboxMetadata(name=name, uid=name, namespace="default"),
            hostname=name if network == BRIDGE else "",
            log_directory=str(self._directory),
            linux=cri_pb2.LinuxPodSandboxConfig(
                security_context=cri_pb2.LinuxSandboxSecurityContext(namespace_options=namespaces)
            ),
        )
        container = cri_pb2.ContainerConfig(
            metadata=cri_pb2.ContainerMetadata(name=name),
            image=cri_pb2.ImageSpec(image=self._image),
            command=["true"],
            log_path=f"{name}.log",
            linux=cri_pb2.LinuxContainerConfig(
                security_context=cri_pb2.LinuxContainerSecurityContext(namespace_options=namespaces)
            ),
        )
        steps: Steps = {}
        with _timed(steps, "RunPodSandbox"):
            sandbox = await self._runtime.run_sandbox(pod)
        with _timed(steps, "CreateContainer"):
            made = await self._runtime.create_container(sandbox, container, pod)
        if network == NONE:
            with _timed(steps, "the record's namespaces"):
                await nonetwork.separate(self._containerd, made, name)
        with _timed(steps, "StartContainer"):
            await self._runtime.start_container(made)
        with _timed(steps, "until its process has ended"):
            await self._process_ended(made)
        with _timed(steps, "until CRI knows it"):
            while (await self._runtime.container_status(made)).state != cri_pb2.CONTAINER_EXITED:
                await asyncio.sleep(0.005)
        with _timed(steps, "StopPodSandbox"):
            await self._runtime.stop_sandbox(sandbox)
        with _timed(steps, "RemovePodSandbox"):
            await self._runtime.remove_sandbox(sandbox)
        return steps

    async def _process_ended(self, container: str) -> None:
        # CRI may have taken the process away by now.
        with contextlib.suppress(errors.NotFoundError):
            await self._containerd.wait_task(container)


@contextlib.contextmanager
def _timed(steps: Steps, name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    steps[name] = (time.perf_counter() - start) * 1000


class Plugins:
    """The CNI plugins of the node's network, run by hand as containerd runs them (CNI specification 1.0.0)."""

    def __init__(self, node: nodes.Node) -> None:
        (file,) = node.data_dir.rglob("*.conflist")
        self._list = json.loads(file.read_text())
        self._numbers = itertools.count()

    def run(self) -> Steps:
        """The milliseconds of each plugin, for one network namespace."""
        name = f"cost{next(self._numbers)}"
        steps: Steps = {}
        subprocess.run(["ip", "netns", "add", name], check=True)
        try:
            loopback = self._called(steps, "ADD", [{"type": "loopback"}], name, "lo", None)
            result = self._called(steps, "ADD", self._list["plugins"], name, "eth0", None)
            self._called(steps, "DEL", self._list["plugins"][::-1], name, "eth0", result)
            self._called(steps, "DEL", [{"type": "loopback"}], name, "lo", loopback)
        finally:
            subprocess.run(["ip", "netns", "del", name], check=True)
        return steps

    def _called(
        self, steps: Steps, verb: str, plugins: Sequence[Mapping[str, Any]], name: str, interface: str, result: object
    ) -> object:
        environment = {
            **os.environ,
            "CNI_COMMAND": verb,
            "CNI_CONTAINERID": name,
            "CNI_NETNS": f"/run/netns/{name}",
            "CNI_IFNAME": interface,
            "CNI_PATH": CNI_DIRECTORY,
        }
        for plugin in plugins:
            asked = {"cniVersion": self._list["cniVersion"], "name": self._list["name"], **plugin}
            if result is not None:
                asked["prevResult"] = result
            with _timed(steps, f"{verb} {plugin['type']}"):
                done = subprocess.run(
                    [f"{CNI_DIRECTORY}/{plugin['type']}"],
                    env=environment,
                    input=json.dumps(asked).encode(),
                    capture_output=True,
                    check=False,
                )
            assert done.returncode == 0, done.stdout.decode()
            if verb == "ADD":
                result = json.loads(done.stdout)
        return result


def whole(tool: commands.Tool, *options: str) -> Steps:
    """A command that runs a container and removes it."""
    return {"the whole command": tool.ran("run", "--rm", *options, tool.image, "true").ms}


async def measured(containerd: Path, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Each step's figures, by what is done and step."""
    with measure.running_node(18, containerd) as (node, directory), commands.nerdctl(node, directory) as nerdctl:
        image = storeimages.make(directory, 7)
        address = ("--address", str(node.containerd_socket), "--namespace", commands.NAMESPACE)
        node.ok("image", "load", *address, "--ref", commands.IMAGE, str(image.archive))
        node.ok("image", "load", str(image.archive))
        nixlet, plugins = commands.nixlet(node, str(image.archive)), Plugins(node)
        async with (
            channels.connect(str(node.containerd_socket)) as channel,
            channels.connect(str(node.node_socket)) as own,
        ):
            pulled = await cri.ImageClient(own, str(node.node_socket)).pull(image.reference)
            pods = Pods(channel, str(node.containerd_socket), pulled, directory)
            samples: dict[str, list[Steps]] = {}
            for number in range(rounds + 1):
                taken = {f"a pod over CRI, network {network}": await pods.played(network) for network in NETWORKS}
                taken["CNI plugins by hand"] = plugins.run()
                for tool in (nixlet, nerdctl):
                    for network in ("bridge", "host", "none"):
                        taken[f"{tool.name} run --rm --network {network}"] = whole(tool, "--network", network)
                for name, steps in taken.items():
                    # The first round warms up.
                    if number:
                        samples.setdefault(name, []).append(steps)
    return {
        name: {step: measure.row([steps[step] for steps in taken]) for step in taken[0]}
        for name, taken in samples.items()
    }


def document(report: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]) -> str:
    """The report as a section of docs/performance.md."""
    machine = ", ".join(f"{key} {value}" for key, value in measure.machine().items())
    versions = list(report)
    lines = [
        f"Machine: {machine}; nerdctl 2.0.5. Median ms, by containerd.",
        "",
        f"| | step | {' | '.join(versions)} |",
        f"|---|---|{'---|' * len(versions)}",
    ]
    for name, steps in report[versions[0]].items():
        for step in steps:
            cells = [f"{report[version][name][step]['median']:.0f}" for version in versions]
            lines.append(f"| {name} | {step} | {' | '.join(cells)} |")
        if len(steps) > 1:
            sums = [sum(row["median"] for row in report[version][name].values()) for version in versions]
            lines.append(f"| {name} | **together** | {' | '.join(f'{each:.0f}' for each in sums)} |")
    return "\n".join(lines)


def main() -> None:
    chosen = commands.arguments(__doc__ or "", "one round").parse_args()
    alone.on_the_network()
    versions = commands.versions(chosen)
    rounds = 1 if chosen.quick else max(chosen.runs, 7)
    report = {version: asyncio.run(measured(parts.containerd(version), rounds)) for version in versions}
    measure.publish(chosen, "podcost", report, document(report))


if __name__ == "__main__":
    sys.exit(main())
