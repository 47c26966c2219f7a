"""Running pods through the CRI without a kubelet: each pod once, and nothing of it left when that fails."""

import asyncio
import contextlib
import dataclasses
import os
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from nixlet import errors
from nixlet.containerd import client, cri
from nixlet.containers import endings, failures, logs, model, users
from nixlet.host import cgroups, userns, waits
from nixlet.host import ports as host_ports
from nixlet.pods import begun, criconfig, directories, hosts, network, nonetwork, removal, resolvconf, undoing
from nixlet.rpc.gen import cri_pb2

#: A context in which a container, by its ID and what it is, is started.
AroundStart = Callable[[str, model.Container], contextlib.AbstractContextManager[None]]

#: Has the image of a container ready.
Obtain = Callable[[model.Container], Awaitable[cri_pb2.Image]]

T = TypeVar("T")

#: Seconds to wait for the news of an end that has happened.
_EXIT_PATIENCE = 5.0

#: How many of the last lines of a container that failed are told.
_LAST_LINES = 10


def _alone(_id: str, _container: model.Container) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


@dataclasses.dataclass(frozen=True, slots=True)
class RunningContainer:
    """A container that was started.

    Attributes:
        name: Its name.
        id: Its ID.
        log_path: Its log.
        exit_code: Set where it ended at once and CRI has the status wrong.
    """

    name: str
    id: str
    log_path: str
    exit_code: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class RunningPod:
    """A pod that was started."""

    pod: model.Pod
    sandbox: str
    containers: tuple[RunningContainer, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class _Sandbox:
    """A pod whose sandbox is there, and what its containers are made from, by the references that it names."""

    pod: model.Pod
    id: str
    config: cri_pb2.PodSandboxConfig
    placement: criconfig.Placement
    images: Mapping[str, str]


class _Beside:
    """What is done for a pod beside the steps that are taken one after the other."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []

    def do(self, work: Coroutine[Any, Any, None], name: str) -> "asyncio.Task[None]":
        """Begin it."""
        self._tasks.append(asyncio.create_task(work, name=name))
        return self._tasks[-1]

    async def ended(self) -> None:
        """Wait for all of it, to its end, and raise what fails."""
        done = await asyncio.gather(*self._tasks, return_exceptions=True)
        for each in done:
            if isinstance(each, BaseException):
                raise each


class Player:
    """Runs pods on one node. What it begins it finishes or has undone."""

    def __init__(
        self,
        runtime: cri.RuntimeClient,
        containerd: client.Containerd,
        undoings: undoing.Undoings,
        removals: removal.Removals,
        *,
        pods_dir: str,
        resolv_conf: str = "",
    ) -> None:
        """A player of pods.

        Args:
            runtime: The CRI.
            containerd: The containerd behind it.
            undoings: Takes back what can't be finished.
            removals: Takes away what has ended; whose name or ports are wanted again is waited for.
            pods_dir: Where the pods' directories are.
            resolv_conf: Where pods look names up; empty: where the host does.
        """
        self._runtime = runtime
        self._containerd = containerd
        self._undoings = undoings
        self._removals = removals
        self._pods_dir = pods_dir
        self._resolv_conf = resolv_conf
        self._playing: dict[tuple[str, str], Sequence[model.Port]] = {}

    async def play(
        self,
        pod: model.Pod,
        obtain: Obtain,
        given_up: asyncio.Event,
        around_start: AroundStart = _alone,
    ) -> RunningPod:
        """Start a pod: its images, its sandbox, its init containers one after the other, its containers.

        Must not be cancelled but by the node's end: a runtime that is asked to stop in the middle leaves things behind.

        Args:
            pod: The pod.
            obtain: Has a container's image ready; is cancelled when nobody wants it any more.
            given_up: Set when nobody wants it any more: it is undone after the step that is being taken.
            around_start: What each of its containers is started in.

        Raises:
            AlreadyExistsError: There is a pod of that name.
            CallCancelledError: It was given up.
            FailedPreconditionError: A port of the host that it asks for is somebody's.
            NixletError: Something can't be started; nothing of the pod stays.
        """
        name = (pod.name, pod.namespace)
        self._claim(pod, name)
        try:
            # None of these waits for another.
            _, _, _, containerd = await asyncio.gather(
                self._check_name(pod), self._check_ports(pod), self._check_runtime(pod), self._containerd.identity()
            )
            # Before anything is made: a pod without its images would only have to be taken down again.
            images = await unless(given_up, _images(pod, obtain), pod)
            wanted = dataclasses.replace(
                pod,
                init_containers=tuple(users.resolved(pod, each, images[each.image]) for each in pod.init_containers),
                containers=tuple(users.resolved(pod, each, images[each.image]) for each in pod.containers),
            )
            ids = {reference: image.id for reference, image in images.items()}
            uid = str(uuid.uuid4())
            directory = criconfig.log_directory(self._pods_dir, pod, uid)
            try:
                await asyncio.to_thread(begun.begin, directory, containerd)
                running = await self._play(wanted, ids, uid, directory, given_up, around_start)
                await asyncio.to_thread(begun.finish, directory)
                return running
            except Exception:
                # When the runtime is away, it goes on with that by itself. Where the node ends, the next one does it.
                await self._undoings.undo(directory)
                raise
        finally:
            del self._playing[name]

    def _claim(self, pod: model.Pod, name: tuple[str, str]) -> None:
        """Take a pod's name and ports before anything is asked of the runtime, which doesn't know yet what is being played."""
        if name in self._playing:
            raise _there_is(pod)
        wanted = criconfig.published_ports(pod)
        for (other, _), theirs in self._playing.items():
            if port := _collision(wanted, theirs):
                raise _offered(port, other)
        self._playing[name] = wanted

    async def _play(
        self,
        pod: model.Pod,
        images: Mapping[str, str],
        uid: str,
        directory: str,
        given_up: asyncio.Event,
        around_start: AroundStart,
    ) -> RunningPod:
        def check() -> None:
            if given_up.is_set():
                raise _not_wanted(pod)

        placement = criconfig.Placement(
            uid,
            directory,
            directories.volumes(pod, directory),
            directories.hosts(directory),
            directories.hostname(directory) if pod.no_network else "",
        )
        dns = resolvconf.read(self._resolv_conf) if self._resolv_conf else None
        systemd_cgroup = await self._runtime.systemd_cgroup(pod.runtime)
        # An ordinary user's node makes cgroups where root has let it.
        parent = cgroups.delegated() if userns.is_inside() else ""
        config = criconfig.sandbox_config(pod, placement, dns, systemd_cgroup=systemd_cgroup, cgroup_parent=parent)
        check()
        await asyncio.to_thread(_write_names, pod, placement)
        sandbox = await self._run_sandbox(config, pod.runtime)
        # For CRI a pod without a network has the host's name, but what it tells containers in their environment is theirs.
        config.hostname = "" if pod.host_network else criconfig.hostname(pod)
        beside = _Beside()
        try:
            made = _Sandbox(pod, sandbox, config, placement, images)
            # Containers can be made meanwhile.
            ready = beside.do(self._fill_hosts(pod, sandbox, placement.hosts), "names of a pod")
            for each in pod.init_containers:
                check()
                await self._await_init(pod, await self._start(made, each, ready, around_start), given_up)
            containers = []
            for each in pod.containers:
                check()
                containers.append(await self._start(made, each, ready, around_start))
        finally:
            await beside.ended()
        # Who gave it up only now may have seen what it prints: they decide what becomes of it.
        return RunningPod(pod, sandbox, tuple(containers))

    async def _await_init(self, pod: model.Pod, container: RunningContainer, given_up: asyncio.Event) -> None:
        ending = endings.wait(self._runtime, self._containerd, container.id, patient=True)
        code = (await unless(given_up, ending, pod)).exit_code
        if container.exit_code is not None:
            code = container.exit_code
        if code != 0:
            # Its log goes with the pod.
            said = await asyncio.to_thread(logs.last_lines, container.log_path, _LAST_LINES)
            raise errors.CommandFailedError(
                f"the init container {container.name} ended with status {code}",
                returncode=code,
                output=said,
                hint="mend what it complains of, and play the pod again; nothing of it is left",
            )

    async def _fill_hosts(self, pod: model.Pod, sandbox: str, path: str) -> None:
        """Let a pod know its own address, and check that its ports arrive there."""
        if pod.host_network or pod.no_network:
            return
        own = network.addresses(await self._runtime.sandbox_status(sandbox))
        network.check_served(pod, own)
        hosts.fill(path, hosts.render(own, criconfig.hostname(pod), pod.host_aliases))

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
            raise network.explained(error) from error

    async def _check_name(self, pod: model.Pod) -> None:
        leaving = self._removals.leaving()
        for sandbox in await find(self._runtime, pod.name, pod.namespace):
            going = leaving.get(sandbox.id)
            if going is None and removal.is_marked(sandbox):
                going = await self._removals.settle_ended(sandbox)
            if not await removal.worked(going):
                raise _there_is(pod)

    async def _check_runtime(self, pod: model.Pod) -> None:
        if pod.no_network:
            await nonetwork.check_runtime(self._runtime, pod.runtime)

    async def _check_ports(self, pod: model.Pod) -> None:
        """Refuse ports of the host that are somebody's: their traffic would go to whoever came first, without a word."""
        wanted = criconfig.published_ports(pod)
        if not wanted:
            return
        network.check_offers(pod)
        for sandbox in await self._runtime.sandboxes(criconfig.MADE_BY):
            port = _collision(wanted, criconfig.ports_of(sandbox.annotations))
            if port is None or not self._removals.keeps(sandbox):
                continue
            releasing = self._removals.releasing().get(sandbox.id)
            if not await removal.worked(releasing or await self._removals.settle_ended(sandbox)):
                raise _offered(port, sandbox.metadata.name)
        for port in wanted:
            if host_ports.is_taken(port.host_ip, port.host_port, port.protocol):
                raise errors.FailedPreconditionError(
                    f"port {port.host_port} of the host is in use by a program there", hint="choose another port"
                )

    async def _start(
        self, made: _Sandbox, container: model.Container, ready: "asyncio.Task[None]", around_start: AroundStart
    ) -> RunningContainer:
        """Make a container, and start it as soon as all that it needs is ready."""
        config = criconfig.container_config(made.pod, container, made.images[container.image], made.placement)
        try:
            container_id = await self._runtime.create_container(made.id, config, made.config)
        except errors.NixletError as error:
            raise users.unknown(container, error) or error from error
        if made.pod.no_network:
            await nonetwork.separate(self._containerd, container_id, made.config.hostname)
        await asyncio.shield(ready)
        exit_code = None
        try:
            async with self._containerd.exits(container_id) as exits:
                with around_start(container_id, container):
                    exit_code = await self._started(container_id, exits)
        except (errors.UnsupportedError, errors.UnavailableError):
            raise
        except errors.NixletError as error:
            command = next(iter((*container.command, *container.args)), "its command")
            raise failures.start_failure(f"container {container.name} can't start", command, error) from error
        log_path = os.path.join(made.placement.log_directory, config.log_path)
        return RunningContainer(container.name, container_id, log_path, exit_code)

    async def _started(self, container: str, exits: client.Exits) -> int | None:
        """Start a container; its exit status, if it ended so soon that CRI takes the start for a failure.

        Its answer comes over a connection to the shim that containerd closes as soon as the process has ended.
        """
        try:
            await self._runtime.start_container(container)
        except errors.NixletError as error:
            if "ttrpc: closed" not in error.message:
                raise
            code = await exits.status(_EXIT_PATIENCE)
            if code is None:
                raise
            return code
        return None


def _write_names(pod: model.Pod, placement: criconfig.Placement) -> None:
    """Write a pod's files of names; that of a pod in the network of pods is filled when it has its addresses."""
    name, text = criconfig.hostname(pod), ""
    if pod.host_network:
        text = hosts.of_the_host(pod.host_aliases)
    elif pod.no_network:
        text = hosts.render((), name, pod.host_aliases)
    hosts.write(placement.hosts, text)
    if placement.hostname:
        hosts.write(placement.hostname, f"{name}\n")


async def _images(pod: model.Pod, obtain: Obtain) -> Mapping[str, cri_pb2.Image]:
    """The images of a pod's containers, by their references."""
    return {each.image: await obtain(each) for each in (*pod.init_containers, *pod.containers)}


async def unless(given_up: asyncio.Event, work: Coroutine[Any, Any, T], pod: model.Pod) -> T:
    """Do something for a pod that may be cut off, as long as somebody wants the pod.

    Raises:
        CallCancelledError: Nobody does.
    """
    try:
        return await waits.unless(given_up, work)
    except waits.Interrupted:
        raise _not_wanted(pod) from None


def _not_wanted(pod: model.Pod) -> errors.CallCancelledError:
    return errors.CallCancelledError(f"pod {pod.name} is not wanted any more")


def _there_is(pod: model.Pod) -> errors.AlreadyExistsError:
    return errors.AlreadyExistsError(
        f"there is a pod {pod.name} already", hint="remove it (nixlet kube down) or use --replace"
    )


def _collision(wanted: Sequence[model.Port], theirs: Sequence[model.Port]) -> model.Port | None:
    """A port that is wanted and another pod's."""
    return next((port for port in wanted if any(port.collides(other) for other in theirs)), None)


def _offered(port: model.Port, pod: str) -> errors.NixletError:
    return errors.FailedPreconditionError(
        f"port {port.host_port} of the host is offered for pod {pod} already",
        hint="choose another port, or remove that pod",
    )


async def find(runtime: cri.RuntimeClient, name: str, namespace: str) -> Sequence[cri_pb2.PodSandbox]:
    """The pods of a name that nixlet made."""
    return await runtime.sandboxes({criconfig.POD_NAME: name, criconfig.POD_NAMESPACE: namespace, **criconfig.MADE_BY})
