"""Running pods through the CRI without a kubelet: each pod once, and nothing of it left when that fails."""

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import shutil
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence

from nixlet import errors
from nixlet.containerd import client, cri
from nixlet.host import files, iptables, mounts, netns
from nixlet.host import ports as host_ports
from nixlet.kube import hosts, logs, model, podnetwork, pods, resolvconf, users
from nixlet.rpc.gen import cri_pb2

#: Pulls an image and answers with what containers are made from.
Pull = Callable[[str], Awaitable[str]]

#: A context in which a container, by its ID, is started.
AroundStart = Callable[[str], contextlib.AbstractContextManager[None]]

#: The directory of a pod's empty volumes, beside its containers' logs; no container can have this name.
_VOLUMES = ".volumes"

#: Beside them, its file of names.
_HOSTS = ".hosts"


#: How often stopping a pod is tried, and seconds between the tries.
_STOP_TRIES = 5
_STOP_INTERVAL = 0.1


def _alone(_container: str) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


@dataclasses.dataclass(frozen=True, slots=True)
class RunningContainer:
    """A container that was started."""

    name: str
    id: str
    log_path: str


@dataclasses.dataclass(frozen=True, slots=True)
class RunningPod:
    """A pod that was started."""

    pod: model.Pod
    sandbox: str
    directory: str
    containers: tuple[RunningContainer, ...]


class Player:
    """Runs pods on one node."""

    def __init__(
        self,
        runtime: cri.RuntimeClient,
        images: cri.ImageClient,
        containerd: client.Containerd,
        *,
        pods_dir: str,
        resolv_conf: str = "",
        pull: Pull,
    ) -> None:
        self._runtime = runtime
        self._images = images
        self._containerd = containerd
        self._pods_dir = pods_dir
        self._resolv_conf = resolv_conf
        self._pull = pull

    async def play(self, pod: model.Pod, around_start: AroundStart = _alone) -> RunningPod:
        """Start a pod: its images, its sandbox, its init containers one after the other, its containers.

        Args:
            pod: The pod.
            around_start: What each of its containers (but the init containers) is started in.

        Raises:
            AlreadyExistsError: There is a pod of that name.
            NixletError: Something can't be had or started; nothing of the pod stays.
        """
        if await self.find(pod.name, pod.namespace):
            raise errors.AlreadyExistsError(
                f"there is a pod {pod.name} already", hint="remove it (nixlet kube down) or use --replace"
            )
        await self._check_ports(pod)
        # Before anything is made: a pod without its images would only have to be taken down again.
        images = {each.name: await self._image(each) for each in (*pod.init_containers, *pod.containers)}
        pod = dataclasses.replace(
            pod,
            init_containers=tuple(users.resolved(pod, each, images[each.name]) for each in pod.init_containers),
            containers=tuple(users.resolved(pod, each, images[each.name]) for each in pod.containers),
        )
        uid = str(uuid.uuid4())
        directory = pods.log_directory(self._pods_dir, pod, uid)
        async with contextlib.AsyncExitStack() as undo:
            files.make_directory(directory, mode=0o755)
            undo.callback(remove_pod_directory, directory)
            placement = pods.Placement(uid, directory, self._volumes(pod, directory), os.path.join(directory, _HOSTS))
            dns = resolvconf.read(self._resolv_conf) if self._resolv_conf else None
            config = pods.sandbox_config(pod, placement, dns)
            sandbox = await self._run_sandbox(config, pod.runtime)
            undo.push_async_callback(self._remove_sandbox, sandbox)
            if pod.no_network:
                await self._take_network(sandbox)
            await self._write_hosts(pod, sandbox, placement.hosts)
            for each in pod.init_containers:
                container = await self._start(pod, each, images[each.name].id, placement, sandbox, config)
                status = await self.wait(container.id)
                if status.exit_code != 0:
                    raise errors.FailedPreconditionError(
                        f"the init container {each.name} ended with status {status.exit_code}"
                    )
            containers = tuple(
                [
                    await self._start(pod, each, images[each.name].id, placement, sandbox, config, around_start)
                    for each in pod.containers
                ]
            )
            undo.pop_all()
        return RunningPod(pod, sandbox, directory, containers)

    async def _write_hosts(self, pod: model.Pod, sandbox: str, path: str) -> None:
        """Let a pod know its own address, and check that its ports arrive there."""
        if pod.host_network:
            hosts.write(path, hosts.of_the_host(pod.host_aliases))
            return
        own = podnetwork.addresses(pod, await self._runtime.sandbox_status(sandbox))
        podnetwork.check_served(pod, own)
        hosts.write(path, hosts.render(own, pods.hostname(pod), pod.host_aliases))

    async def _run_sandbox(self, config: cri_pb2.PodSandboxConfig, runtime: str) -> str:
        try:
            return await self._runtime.run_sandbox(config, runtime)
        except errors.NixletError as error:
            # containerd says it in these words, with the status for everything.
            if runtime and f'no runtime for "{runtime}"' in error.message:
                raise errors.FailedPreconditionError(
                    f"the node's containerd has no runtime {runtime}",
                    hint="install it and start the node again (see nixlet doctor), or set it up in a drop-in",
                ) from error
            raise podnetwork.explained(error) from error

    async def _check_ports(self, pod: model.Pod) -> None:
        """Refuse ports of the host that are somebody's: their traffic would go to whoever came first, without a word."""
        wanted = pods.published_ports(pod)
        if not wanted:
            return
        podnetwork.check_offers(pod)
        for sandbox in await self._runtime.sandboxes(pods.MADE_BY):
            if sandbox.state == cri_pb2.SANDBOX_READY:
                theirs = pods.ports_of(sandbox.annotations)
                for port in wanted:
                    if any(port.collides(other) for other in theirs):
                        raise errors.FailedPreconditionError(
                            f"port {port.host_port} of the host is offered for pod {sandbox.metadata.name} already",
                            hint="choose another port, or remove that pod",
                        )
        for port in wanted:
            if host_ports.is_taken(port.host_ip, port.host_port, port.protocol):
                raise errors.FailedPreconditionError(
                    f"port {port.host_port} of the host is in use by a program there", hint="choose another port"
                )

    async def _take_network(self, sandbox: str) -> None:
        """Leave a pod alone with its loopback interface, before anything runs in it. The CRI itself knows no such pods."""
        details = await self._runtime.sandbox_details(sandbox)
        pid = json.loads(details.get("info", "{}")).get("pid", 0)
        if not pid:
            raise errors.UnsupportedError(
                "the runtime does not tell a pod's process, so its network can't be taken away"
            )
        await asyncio.to_thread(netns.leave_only_loopback, pid)
        # Without the interface the bridge plugin doesn't find the addresses whose rules it has to take back.
        await iptables.remove_rules(container=sandbox)

    async def _image(self, container: model.Container) -> cri_pb2.Image:
        if container.pull_policy != "Always":
            image = await self._images.status(container.image)
            if image is not None:
                return image
            if container.pull_policy == "Never":
                raise errors.NotFoundError(
                    f"the image {container.image} is not here, and imagePullPolicy is Never",
                    hint="pull or load it before",
                )
        image = await self._images.status(await self._pull(container.image))
        if image is None:
            raise errors.NotFoundError(f"the image {container.image} was pulled, and removed at once by somebody")
        return image

    @staticmethod
    def _volumes(pod: model.Pod, directory: str) -> dict[str, str]:
        places = {}
        for volume in pod.volumes:
            if volume.host_path:
                pods.check_host_path(volume)
                places[volume.name] = volume.host_path
            else:
                place = os.path.join(directory, _VOLUMES, volume.name)
                # As kubelets do: containers of any user share it.
                files.new_directories(place, 0o777)
                places[volume.name] = place
        return places

    async def _start(
        self,
        pod: model.Pod,
        container: model.Container,
        image_ref: str,
        placement: pods.Placement,
        sandbox: str,
        sandbox_config: cri_pb2.PodSandboxConfig,
        around_start: AroundStart = _alone,
    ) -> RunningContainer:
        config = pods.container_config(pod, container, image_ref, placement)
        try:
            container_id = await self._runtime.create_container(sandbox, config, sandbox_config)
        except errors.NixletError as error:
            raise users.unknown(container, error) or error from error
        try:
            with around_start(container_id):
                await self._runtime.start_container(container_id)
        except errors.UnsupportedError:
            raise
        except errors.NixletError as error:
            command = next(iter((*container.command, *container.args)), "its command")
            raise start_failure(f"container {container.name} can't start", command, error) from error
        return RunningContainer(container.name, container_id, os.path.join(placement.log_directory, config.log_path))

    async def wait(self, container: str) -> cri_pb2.ContainerStatus:
        """Wait until a container has ended and CRI knows it; its status."""
        # The task's end is known at once; CRI's own word, which comes when all output is in the log, is a little later.
        with contextlib.suppress(errors.NotFoundError):
            await self._containerd.wait_task(container)
        while True:
            status = await self._runtime.container_status(container)
            if status.state == cri_pb2.CONTAINER_EXITED:
                return status
            await asyncio.sleep(0.005)

    async def output(self, container: RunningContainer) -> AsyncIterator[logs.Record]:
        """A container's output until it ends."""
        waiting = asyncio.create_task(self.wait(container.id))
        try:
            async for record in logs.follow(container.log_path, waiting.done):
                yield record
        finally:
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await waiting

    async def find(self, name: str, namespace: str) -> Sequence[cri_pb2.PodSandbox]:
        """The pods of a name that nixlet made."""
        return await self._runtime.sandboxes({pods.POD_NAME: name, pods.POD_NAMESPACE: namespace, **pods.MADE_BY})

    async def remove(self, sandbox: cri_pb2.PodSandbox, *, grace: int | None = None) -> None:
        """Stop and remove a pod with all that is its: containers, network, logs, empty volumes.

        Args:
            sandbox: The pod.
            grace: Seconds for its containers to end by themselves; None: at once.
        """
        if grace:
            running = [
                each.id
                for each in await self._runtime.containers(sandbox=sandbox.id)
                if each.state == cri_pb2.CONTAINER_RUNNING
            ]
            await asyncio.gather(*(self._runtime.stop_container(each, grace) for each in running))
        await self._remove_sandbox(sandbox.id)
        metadata = sandbox.metadata
        pod = model.Pod(metadata.name, metadata.namespace)
        await asyncio.to_thread(remove_pod_directory, pods.log_directory(self._pods_dir, pod, metadata.uid))

    async def _remove_sandbox(self, sandbox: str) -> None:
        with contextlib.suppress(errors.NotFoundError):
            await stop_sandbox(self._runtime, sandbox)
            await self._runtime.remove_sandbox(sandbox)


async def stop_sandbox(runtime: cri.RuntimeClient, sandbox: str) -> None:
    """End a pod's containers and give its network back.

    containerd fails at this when a container ends by itself at the same moment; the next try finds it ended. A pod that
    somebody else removed meanwhile is no error, though some versions say so.
    """
    for tries_left in reversed(range(_STOP_TRIES)):
        try:
            await runtime.stop_sandbox(sandbox)
        except errors.NotFoundError:
            return
        except errors.NixletError:
            if not tries_left:
                raise
            await asyncio.sleep(_STOP_INTERVAL)
        else:
            return


def remove_pod_directory(directory: str) -> None:
    """Delete a pod's logs and empty volumes, unless something is mounted in there."""
    mounted = mounts.below(directory)
    if mounted:
        raise errors.FailedPreconditionError(f"{directory} is not removed: {mounted[-1].path} is still mounted")
    shutil.rmtree(directory, ignore_errors=True)


def sweep_pod_directories(pods_dir: str, uids: Collection[str]) -> None:
    """Delete what is left of pods that another client of the CRI removed: all but the directories of the given pods."""
    for name in os.listdir(pods_dir):
        if name.rpartition("_")[2] not in uids:
            with contextlib.suppress(errors.FailedPreconditionError):
                remove_pod_directory(os.path.join(pods_dir, name))


def start_failure(what: str, command: str, error: errors.NixletError) -> errors.NixletError:
    """Why a process did not start, told apart as shells and container tools do: not found, or not executable.

    Args:
        what: The beginning of the sentence: "container web can't start".
        command: What was to be run.
        error: What the runtime said.
    """
    text = error.message
    said = text[-300:]
    if ("executable file" in text and "not found" in text) or re.search(r": stat \S+: no such file or directory", text):
        return errors.CommandNotFoundError(f"{what}: {command} is not in the image", hint=said)
    if re.search(r"\bexec \S+: no such file or directory", text):
        return errors.CommandNotFoundError(
            f"{what}: {command} names an interpreter (its loader, or behind #!) that is not in the image", hint=said
        )
    if "exec format error" in text:
        return errors.NotExecutableError(
            f"{what}: {command} can't be executed: it is for another machine, or damaged",
            hint="if it comes from the Nix store, see whether it is whole: nix-store --verify-path STORE_PATH",
        )
    if "permission denied" in text:
        return errors.NotExecutableError(f"{what}: {command} can't be executed", hint=said)
    return errors.FailedPreconditionError(f"{what}: {text}")
