"""The Kubernetes Container Runtime Interface, from a client's side."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nixlet import errors
from nixlet.containerd import client
from nixlet.rpc import channel as channels
from nixlet.rpc.gen import cri_grpc, cri_pb2


def container_config(info: Mapping[str, str]) -> Mapping[str, Any]:
    """What a container was made from, a ContainerConfig as Go writes it in JSON; empty where the runtime doesn't say.

    Args:
        info: What ``RuntimeClient.container_details`` has besides.
    """
    return json.loads(info.get("info", "{}")).get("config") or {}


class RuntimeClient:
    """CRI's runtime service: pods and containers."""

    def __init__(self, channel: channels.Channel, address: str) -> None:
        self._peer = f"containerd at {address}"
        self._stub = cri_grpc.RuntimeServiceStub(channel)

    async def version(self) -> cri_pb2.VersionResponse:
        """Who answers; also the question whether it does."""
        with channels.translated(self._peer):
            return await self._stub.Version(cri_pb2.VersionRequest(), timeout=10)

    async def check_network(self) -> None:
        """Check that pods can get a network.

        Raises:
            UnavailableError: They can't; why.
        """
        with channels.translated(self._peer):
            answer = await self._stub.Status(cri_pb2.StatusRequest(), timeout=10)
        for condition in answer.status.conditions:
            if condition.type == "NetworkReady" and not condition.status:
                raise errors.UnavailableError(
                    f"pods get no network: {condition.message or condition.reason or 'the runtime does not say why'}",
                    hint="see the CNI configuration and plugins of its containerd",
                )

    async def runtime_type(self, handler: str) -> str:
        """containerd's name for the shim of a runtime, as in "io.containerd.runc.v2"; empty where the runtime doesn't say.

        Args:
            handler: Its name in the configuration; empty: the default one.
        """
        return str((await self._configured(handler)).get("runtimeType", ""))

    async def runtime_snapshotter(self, handler: str) -> str:
        """The snapshotter of a runtime's containers; empty where it is the default one, or there is no such runtime.

        Args:
            handler: Its name in the configuration.
        """
        return str((await self._configured(handler)).get("snapshotter", ""))

    async def systemd_cgroup(self, handler: str = "") -> bool:
        """Whether a runtime has systemd make the cgroups of its containers, so that pods have to name slices.

        Args:
            handler: Its name in the configuration; empty: the default one.
        """
        options = (await self._configured(handler)).get("options")
        return isinstance(options, dict) and options.get("SystemdCgroup") is True

    async def _configured(self, handler: str) -> Mapping[str, object]:
        """What containerd's configuration says of a runtime, as far as it tells of it; an empty name is the default one's."""
        with channels.translated(self._peer):
            answer = await self._stub.Status(cri_pb2.StatusRequest(verbose=True), timeout=10)
        config = json.loads(answer.info.get("config", "{}")).get("containerd", {})
        found: Mapping[str, object] = config.get("runtimes", {}).get(
            handler or config.get("defaultRuntimeName", ""), {}
        )
        return found

    async def run_sandbox(self, config: cri_pb2.PodSandboxConfig, runtime: str = "") -> str:
        """Make and start a pod's sandbox, by a runtime of that name or by the default one; its ID."""
        request = cri_pb2.RunPodSandboxRequest(config=config, runtime_handler=runtime)
        with channels.translated(self._peer):
            return (await self._stub.RunPodSandbox(request)).pod_sandbox_id

    async def stop_sandbox(self, sandbox: str) -> None:
        """End all of a pod's containers and give its network back."""
        with channels.translated(self._peer):
            await self._stub.StopPodSandbox(cri_pb2.StopPodSandboxRequest(pod_sandbox_id=sandbox))

    async def remove_sandbox(self, sandbox: str) -> None:
        """Remove a pod with its containers."""
        with channels.translated(self._peer):
            await self._stub.RemovePodSandbox(cri_pb2.RemovePodSandboxRequest(pod_sandbox_id=sandbox))

    async def sandboxes(self, labels: Mapping[str, str] | None = None) -> Sequence[cri_pb2.PodSandbox]:
        """The pods that have all of the labels."""
        filters = cri_pb2.PodSandboxFilter(label_selector=labels or {})
        with channels.translated(self._peer):
            return (await self._stub.ListPodSandbox(cri_pb2.ListPodSandboxRequest(filter=filters))).items

    async def create_container(
        self, sandbox: str, config: cri_pb2.ContainerConfig, sandbox_config: cri_pb2.PodSandboxConfig
    ) -> str:
        """Make a container in a pod; its ID."""
        request = cri_pb2.CreateContainerRequest(pod_sandbox_id=sandbox, config=config, sandbox_config=sandbox_config)
        with channels.translated(self._peer):
            return (await self._stub.CreateContainer(request)).container_id

    async def start_container(self, container: str) -> None:
        """Start a container's process."""
        with channels.translated(self._peer):
            await self._stub.StartContainer(cri_pb2.StartContainerRequest(container_id=container))

    async def running(self, sandbox: str) -> Sequence[str]:
        """The IDs of a pod's containers that are running."""
        return [each.id for each in await self.containers(sandbox=sandbox, running=True)]

    async def stop_container(self, container: str, grace: int) -> None:
        """End a container's process: its stop signal, and SIGKILL after ``grace`` seconds."""
        with channels.translated(self._peer):
            await self._stub.StopContainer(cri_pb2.StopContainerRequest(container_id=container, timeout=grace))

    async def reopen_log(self, container: str) -> None:
        """Let a running container's log be written to the file that has its name now."""
        with channels.translated(self._peer):
            await self._stub.ReopenContainerLog(cri_pb2.ReopenContainerLogRequest(container_id=container), timeout=10)

    async def remove_container(self, container: str) -> None:
        """Remove a container, running or not."""
        with channels.translated(self._peer):
            await self._stub.RemoveContainer(cri_pb2.RemoveContainerRequest(container_id=container))

    async def containers(
        self, *, sandbox: str = "", labels: Mapping[str, str] | None = None, running: bool = False
    ) -> Sequence[cri_pb2.Container]:
        """The containers of a pod, or of all, that have all of the labels; or only those that run."""
        filters = cri_pb2.ContainerFilter(pod_sandbox_id=sandbox, label_selector=labels or {})
        if running:
            filters.state.state = cri_pb2.CONTAINER_RUNNING
        with channels.translated(self._peer):
            return (await self._stub.ListContainers(cri_pb2.ListContainersRequest(filter=filters))).containers

    async def container_status(self, container: str) -> cri_pb2.ContainerStatus:
        """What is known of a container."""
        with channels.translated(self._peer):
            request = cri_pb2.ContainerStatusRequest(container_id=container)
            return (await self._stub.ContainerStatus(request)).status

    async def container_details(self, container: str) -> tuple[cri_pb2.ContainerStatus, Mapping[str, str]]:
        """What is known of a container, and what the runtime has to add: texts, most of them JSON."""
        with channels.translated(self._peer):
            request = cri_pb2.ContainerStatusRequest(container_id=container, verbose=True)
            answer = await self._stub.ContainerStatus(request)
        return answer.status, answer.info

    async def sandbox_status(self, sandbox: str) -> cri_pb2.PodSandboxStatus:
        """What is known of a pod."""
        with channels.translated(self._peer):
            request = cri_pb2.PodSandboxStatusRequest(pod_sandbox_id=sandbox)
            return (await self._stub.PodSandboxStatus(request)).status

    async def container_stats(self, labels: Mapping[str, str] | None = None) -> Sequence[cri_pb2.ContainerStats]:
        """What the running containers that have all of the labels use."""
        filters = cri_pb2.ContainerStatsFilter(label_selector=labels or {})
        with channels.translated(self._peer):
            return (await self._stub.ListContainerStats(cri_pb2.ListContainerStatsRequest(filter=filters))).stats

    async def attach(self, container: str, *, stdin: bool, output: bool, tty: bool) -> str:
        """Ask for the streams of a container's first process; the URL that serves them, once.

        Args:
            container: The container.
            stdin: Its standard input is wanted. Must be said for a container that has one, whatever is wanted: containerd
                takes the input to have ended otherwise, and closes it, or stops the output.
            output: Its output is wanted.
            tty: It has a terminal; must be what it was made with.
        """
        # A terminal has no standard error.
        request = cri_pb2.AttachRequest(
            container_id=container, stdin=stdin, stdout=output, stderr=output and not tty, tty=tty
        )
        with channels.translated(self._peer):
            return (await self._stub.Attach(request, timeout=10)).url


async def wait_until_served(runtime: RuntimeClient, containerd: client.Containerd) -> None:
    """Wait until a containerd serves the CRI; the caller limits the time.

    Raises:
        FailedPreconditionError: It never will: its CRI plugin did not start, and it goes on without.
    """
    try:
        await channels.wait_until_answered(runtime.version)
    except errors.UnimplementedError as error:
        reason = await containerd.plugin_failure("io.containerd.grpc.v1", "cri")
        raise errors.FailedPreconditionError(
            f"containerd serves no CRI: {reason or 'the plugin is disabled'}",
            hint="see its log, and what nixlet config render prints",
        ) from error


#: How a pull's sandbox names its runtime for a containerd that doesn't read it in the image (containerd, pkg/cri/annotations).
RUNTIME_ANNOTATION = "io.containerd.cri.runtime-handler"


class ImageClient:
    """CRI's image service."""

    def __init__(self, channel: channels.Channel, address: str) -> None:
        self._peer = f"the image service at {address}"
        self._stub = cri_grpc.ImageServiceStub(channel)

    async def pull(self, reference: str, sandbox: cri_pb2.PodSandboxConfig | None = None, runtime: str = "") -> str:
        """Pull an image; the reference that containers are to be made from.

        Args:
            reference: Its name.
            sandbox: The pod that it is for.
            runtime: The runtime that is to run it, and may want it in a snapshotter of its own; empty: the default one.
        """
        if runtime and sandbox is None:
            sandbox = cri_pb2.PodSandboxConfig(annotations={RUNTIME_ANNOTATION: runtime})
        image = cri_pb2.ImageSpec(image=reference, runtime_handler=runtime)
        request = cri_pb2.PullImageRequest(image=image, sandbox_config=sandbox)
        with channels.translated(self._peer):
            return (await self._stub.PullImage(request)).image_ref

    async def status(self, reference: str, runtime: str = "") -> cri_pb2.Image | None:
        """An image by reference or ID, for a runtime as in ``pull``, or None."""
        response = await self.details(reference, runtime, verbose=False)
        return response.image if response.HasField("image") else None

    async def details(self, reference: str, runtime: str = "", *, verbose: bool = True) -> cri_pb2.ImageStatusResponse:
        """An image by reference or ID, with what the runtime has to add: texts, most of them JSON."""
        image = cri_pb2.ImageSpec(image=reference, runtime_handler=runtime)
        request = cri_pb2.ImageStatusRequest(image=image, verbose=verbose)
        with channels.translated(self._peer):
            return await self._stub.ImageStatus(request)

    async def images(self, filters: cri_pb2.ImageFilter | None = None) -> Sequence[cri_pb2.Image]:
        """All images, or those that a filter names."""
        with channels.translated(self._peer):
            return (await self._stub.ListImages(cri_pb2.ListImagesRequest(filter=filters))).images

    async def remove(self, reference: str) -> None:
        """Remove an image with all of its names."""
        request = cri_pb2.RemoveImageRequest(image=cri_pb2.ImageSpec(image=reference))
        with channels.translated(self._peer):
            await self._stub.RemoveImage(request)
