"""Stopping and removing pods, and giving back what they hold: each to its end, whatever becomes of whoever asked."""

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Collection, Coroutine, Mapping

from nixlet import errors
from nixlet.containerd import cri
from nixlet.containers import endings, model
from nixlet.host import signals
from nixlet.pods import begun, criconfig, directories
from nixlet.rpc.gen import cri_pb2

_log = logging.getLogger("nixlet.pods")

#: Seconds until the next try to remove a pod that can't be removed, or to delete a directory in which something is mounted.
_NEXT_TRY = 2.0


@dataclasses.dataclass(slots=True)
class _Removal:
    """A removal that goes on.

    Attributes:
        task: Does it.
        kills_at: When it kills containers that have not ended by themselves, by the loop's clock.
        is_told: Whoever asked for it has heard that the pod is gone.
    """

    task: asyncio.Task[None]
    kills_at: float
    is_told: bool = False


class Removals:
    """What is being stopped, released and removed on one node."""

    def __init__(self, runtime: cri.RuntimeClient, pods_dir: str) -> None:
        """None yet.

        Args:
            runtime: The CRI.
            pods_dir: Where the pods' directories are.
        """
        self._runtime = runtime
        self._pods_dir = pods_dir
        self._removing: dict[str, _Removal] = {}
        self._releasing: dict[str, asyncio.Task[None]] = {}
        # Of which a release was begun and has not worked.
        self._kept: set[str] = set()
        self._going_on: set[asyncio.Task[None]] = set()
        self._insisting: set[asyncio.Task[None]] = set()

    async def close(self, ending: signals.Ending) -> None:
        """Wait a moment for what goes on; what is not done then can be asked for again."""
        for task in self._insisting:
            # A next node deletes it.
            task.cancel()
        await ending.wait({*self._going_on, *self._insisting})

    def _begun(self, what: str, doing: Coroutine[None, None, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(doing, name=what)
        self._going_on.add(task)
        task.add_done_callback(self._going_on.discard)
        return task

    async def stop(self, sandbox: cri_pb2.PodSandbox, container: str, grace: int) -> None:
        """End a container, and give back what its pod holds when none of its containers is running any more.

        That is not waited for where a container was ended: it goes on by itself, and a failure goes to the log.

        Args:
            sandbox: The pod.
            container: Its container; empty: it has none.
            grace: Seconds for the container to end by itself; below 0: as many as the pod itself says.

        Raises:
            NotFoundError: Somebody removed it.
            NixletError: The runtime can't.
        """

        async def stop() -> None:
            if container:
                await endings.stop_container(self._runtime, container, _seconds(sandbox, grace))
            if await self._runtime.running(sandbox.id):
                return
            if container:
                self.begin_release(sandbox.id)
            else:
                await asyncio.shield(self.release(sandbox.id))

        await asyncio.shield(self._begun(f"stop {container or sandbox.id}", stop()))

    def release(self, sandbox: str) -> "asyncio.Task[None]":
        """End a pod's containers and give its network and its process back; the pod itself stays. The task does that.

        One that is being removed gives them back with that: two at once would do it by halves, and the removal would be over first.
        """
        if removal := self._removing.get(sandbox):
            return removal.task
        task = self._releasing.get(sandbox)
        if task is None:
            task = self._begun(f"release {sandbox}", self._release(sandbox))
            self._releasing[sandbox] = task
            task.add_done_callback(lambda _: self._releasing.pop(sandbox))
        return task

    async def _release(self, sandbox: str) -> None:
        self._kept.add(sandbox)
        await endings.stop_sandbox(self._runtime, sandbox)
        self._kept.discard(sandbox)

    def keeps(self, sandbox: cri_pb2.PodSandbox) -> bool:
        """Whether a pod has what it holds of the host, as far as is known: the runtime calls one not ready as soon as its process ended."""
        return sandbox.state == cri_pb2.SANDBOX_READY or sandbox.id in self._kept or sandbox.id in self._removing

    def begin_release(self, sandbox: str) -> None:
        """As ``release``, which goes on by itself; a failure goes to the log."""
        _tell_failure(self.release(sandbox), f"pod {sandbox} keeps its network")

    def leaving(self) -> "Mapping[str, asyncio.Task[None]]":
        """The pods that are being removed, and what does it."""
        return {each: removal.task for each, removal in self._removing.items()}

    def releasing(self) -> "Mapping[str, asyncio.Task[None]]":
        """The pods that are being removed, or give back what they hold, and what does it."""
        return {**self._releasing, **self.leaving()}

    async def settle(self, sandbox: cri_pb2.PodSandbox) -> "asyncio.Task[None] | None":
        """Begin what becomes of a pod in which nothing runs any more, if it has not begun: it gives back what it holds, or goes.

        Args:
            sandbox: The pod, as it was a moment ago.

        Returns:
            What does it; None where there is nothing to be done.
        """
        if is_marked(sandbox):
            return (await self._removal(sandbox, 0)).task
        return self.release(sandbox.id) if self.keeps(sandbox) else None

    async def settle_ended(self, sandbox: cri_pb2.PodSandbox) -> "asyncio.Task[None] | None":
        """As ``settle``, a moment before the node sees by itself that nothing runs in a pod any more; None where something does.

        One that is only being played looks as if it had ended: who plays pods keeps an account of those.
        """
        return None if await self._runtime.running(sandbox.id) else await self.settle(sandbox)

    async def remove_container(self, sandbox: cri_pb2.PodSandbox, container: str) -> None:
        """Remove a container, running or not, and its pod with it when it was the last one.

        Where the pod is giving back what it holds already, which whoever stopped it didn't wait for either, that isn't waited for:
        it goes on by itself, and a failure goes to the log.

        Raises:
            NixletError: The runtime can't.
        """

        async def remove() -> None:
            if any(each.id != container for each in await self._runtime.containers(sandbox=sandbox.id)):
                await endings.remove_container(self._runtime, container)
                # The others may have been removed at the same time.
                if await self._runtime.containers(sandbox=sandbox.id):
                    return
            # Still so when it is noted: after a failure one is told.
            if sandbox.id in self._releasing and await self._is_noted(sandbox) and sandbox.id in self._releasing:
                self._last(self._insist(sandbox, await self.leave(sandbox)), f"remove {sandbox.id} for good")
            else:
                await self.remove(sandbox)

        await asyncio.shield(self._begun(f"remove {container}", remove()))

    async def _is_noted(self, sandbox: cri_pb2.PodSandbox) -> bool:
        """Note on the disk that a pod goes, whatever becomes of this node; whether it can be noted."""
        try:
            await asyncio.to_thread(begun.leave, self._directory(sandbox))
        except errors.FailedPreconditionError:
            return False
        return True

    async def remove(self, sandbox: cri_pb2.PodSandbox, *, grace: int = 0) -> None:
        """Stop and remove a pod with all that is its: containers, network, logs, empty volumes; once.

        Args:
            sandbox: The pod.
            grace: Seconds for its containers to end by themselves; 0: at once; below 0: as many as the pod itself says.

        Raises:
            NixletError: The runtime can't; the pod stays, and can be removed later.
        """
        await asyncio.shield((await self._removal(sandbox, _seconds(sandbox, grace))).task)

    async def leave(self, sandbox: cri_pb2.PodSandbox) -> "asyncio.Task[None]":
        """Begin to remove a pod in which nothing runs any more, and which a next node would remove as well; the task does it.

        As far as people see it is gone, unless that fails.
        """
        removal = await self._removal(sandbox, 0)
        if not removal.is_told:
            removal.is_told = True
            _tell_failure(removal.task, f"pod {sandbox.id} is not removed yet")
        return removal.task

    def gone(self) -> Collection[str]:
        """The pods that people take for gone, though the runtime still has them."""
        return {each for each, removal in self._removing.items() if removal.is_told}

    async def _removal(self, sandbox: cri_pb2.PodSandbox, seconds: int) -> _Removal:
        """The removal of a pod, begun now or before."""
        kills_at = asyncio.get_running_loop().time() + seconds
        removal = self._removing.get(sandbox.id)
        if removal is None:
            task = self._begun(f"remove {sandbox.id}", self._remove(sandbox, seconds))
            removal = self._removing[sandbox.id] = _Removal(task, kills_at)
            task.add_done_callback(lambda _: self._removing.pop(sandbox.id))
        elif kills_at < removal.kills_at:
            # Who is in a hurry doesn't wait for the time that somebody else gave.
            removal.kills_at = kills_at
            await asyncio.shield(self._begun(f"end {sandbox.id}", self._end(sandbox.id, seconds)))
        return removal

    async def _remove(self, sandbox: cri_pb2.PodSandbox, seconds: int) -> None:
        if seconds:
            await self._end(sandbox.id, seconds)
        releasing = self._releasing.get(sandbox.id)
        # What fails at this goes with the sandbox.
        with contextlib.suppress(errors.NixletError):
            for container in await self._runtime.containers(sandbox=sandbox.id):
                await self._runtime.remove_container(container.id)
        if releasing is not None:
            # Two at once would take its network down by halves.
            await asyncio.wait({releasing})
        await endings.remove_sandbox(self._runtime, sandbox.id)
        self._kept.discard(sandbox.id)
        directory = self._directory(sandbox)
        try:
            await asyncio.to_thread(directories.remove, directory)
        except errors.FailedPreconditionError:
            # The pod is gone, so nobody could ask for it again.
            self._last(self._delete(directory), f"delete {directory}")
            raise

    def _last(self, doing: Coroutine[None, None, None], name: str) -> None:
        """Begin what is tried until it works, by this node or the next one."""
        task = asyncio.create_task(doing, name=name)
        self._insisting.add(task)
        task.add_done_callback(self._insisting.discard)

    async def _insist(self, sandbox: cri_pb2.PodSandbox, leaving: "asyncio.Task[None]") -> None:
        """Have a pod removed that somebody was told is gone. When that fails it is seen again until another try works."""
        while not await worked(leaving):
            await asyncio.sleep(_NEXT_TRY)
            leaving = (await self._removal(sandbox, 0)).task

    def _directory(self, sandbox: cri_pb2.PodSandbox) -> str:
        metadata = sandbox.metadata
        return criconfig.log_directory(self._pods_dir, model.Pod(metadata.name, metadata.namespace), metadata.uid)

    async def _delete(self, directory: str) -> None:
        """Delete a pod's directory as soon as nothing is mounted in there any more."""
        while True:
            await asyncio.sleep(_NEXT_TRY)
            with contextlib.suppress(errors.FailedPreconditionError):
                await asyncio.to_thread(directories.remove, directory)
                return

    async def _end(self, sandbox: str, seconds: int) -> None:
        # Somebody else may remove them at the same time.
        with contextlib.suppress(errors.NotFoundError):
            running = await self._runtime.running(sandbox)
            await asyncio.gather(*(endings.stop_container(self._runtime, each, seconds) for each in running))


def _tell_failure(task: "asyncio.Task[None]", what: str) -> None:
    """Have a failure of what goes on by itself told in the log."""

    def done(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.warning("%s: %s", what, error)

    task.add_done_callback(done)


async def worked(task: "asyncio.Task[None] | None") -> bool:
    """Wait for a removal or release; whether there is one, and it worked."""
    if task is None:
        return False
    await asyncio.wait({task})
    return not task.cancelled() and task.exception() is None


def is_marked(sandbox: cri_pb2.PodSandbox) -> bool:
    """Whether a pod goes when it has ended."""
    return criconfig.AUTO_REMOVE.items() <= dict(sandbox.labels).items()


def _seconds(sandbox: cri_pb2.PodSandbox, grace: int) -> int:
    return criconfig.grace_of(sandbox.annotations) if grace < 0 else grace
