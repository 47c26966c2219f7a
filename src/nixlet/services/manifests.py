"""Pods of manifests for a client: the methods PlayManifest and DownManifest."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence

import msgspec

from nixlet import errors
from nixlet.containerd import imagestore
from nixlet.containers import clients, logrecords, logs, model, prefixes
from nixlet.host import waits
from nixlet.images import obtaining, pulls
from nixlet.pods import lifecycle, player
from nixlet.rpc.gen import cri_pb2
from nixlet.services import clientstreams, pullprogress, withdrawal
from nixlet.varlink import server


class PlayParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is to be played.

    Attributes:
        manifest: The manifest.
        source: What it is called in errors.
        ticket: What the call is withdrawn by; empty: it isn't.
        replace: Pods of the same names are removed first.
        wait: Each pod is waited for until it has ended, and is removed then, or when the client is gone.
        streams: Where the containers' output goes meanwhile.
        summary: The client wants to know what it took.
    """

    manifest: bytes
    source: str
    ticket: str = ""
    replace: bool = False
    wait: bool = False
    streams: clientstreams.Streams = clientstreams.Streams()
    summary: bool = False


class DownParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is to be removed; the rest as in ``PlayParameters``.

    Attributes:
        ignore_missing: It is no error when a pod isn't there.
    """

    manifest: bytes
    source: str
    ignore_missing: bool = False


class ManifestService:
    """Plays and removes the pods of manifests on one node."""

    def __init__(
        self,
        pods: lifecycle.Pods,
        obtainer: obtaining.Obtainer,
        containerd: imagestore.ImageStore,
        withdrawals: withdrawal.Withdrawals,
    ) -> None:
        self._pods = pods
        self._obtainer = obtainer
        self._containerd = containerd
        self._withdrawals = withdrawals

    def methods(self) -> Mapping[str, server.Method]:
        """Its methods."""
        return {
            "PlayManifest": server.Method(PlayParameters, self._play, several=True),
            "DownManifest": server.Method(DownParameters, self._down, several=True),
        }

    async def _down(self, call: server.Call[DownParameters]) -> None:
        pods, _ = await _parsed(call.parameters)
        for pod in pods:
            found = await self._pods.named(pod.name, pod.namespace)
            if not found and not call.parameters.ignore_missing:
                raise errors.NotFoundError(f"there is no pod {pod.name}", hint="see what there is: nixlet ps -a")
            for each in found:
                await self._pods.remove(each.id, pod.grace_seconds)
                await call.reply({"removed": pod.name})

    async def _play(self, call: server.Call[PlayParameters]) -> Mapping[str, object]:
        wanted = call.parameters
        pods, notices = await _parsed(wanted)
        from nixlet.kube import manifest  # noqa: PLC0415 (see _parsed)

        await call.reply({"notices": [*notices, *manifest.restart_notices(pods)]})
        with self._withdrawals.possible(call, wanted.ticket) as withdrawn:
            for pod in pods:
                run = _Play(call, pod, withdrawn, self._pods, self._obtainer)
                if wanted.replace:
                    await run.replace()
                if not wanted.wait:
                    await run.begin({})
                elif not await run.to_its_end(self._containerd):
                    return {"reader_gone": True}
        return {}


class _Play:
    """One pod that is played for a client."""

    def __init__(
        self,
        call: server.Call[PlayParameters],
        pod: model.Pod,
        withdrawn: asyncio.Event,
        pods: lifecycle.Pods,
        obtainer: obtaining.Obtainer,
    ) -> None:
        self._call = call
        self._pod = pod
        self._withdrawn = withdrawn
        self._pods = pods
        self._obtainer = obtainer
        self._images: dict[tuple[str, str], cri_pb2.Image] = {}
        self._pulled: dict[str, pulls.Pulled] = {}

    async def replace(self) -> None:
        """Remove the pods of its name, as soon as its own images are there."""
        if not await self._pods.named(self._pod.name, self._pod.namespace):
            return
        async with pullprogress.told(self._call) as tell:
            for container in (*self._pod.init_containers, *self._pod.containers):
                await player.unless(self._withdrawn, self._obtain(container, tell), self._pod)
        # Those that are there now: that took its time.
        for other in await self._pods.named(self._pod.name, self._pod.namespace):
            await self._remove(other.id)

    async def _obtain(self, container: model.Container, tell: obtaining.Teller) -> cri_pb2.Image:
        if (image := self._images.get((container.image, container.pull_policy))) is None:
            image, pulled = await self._obtainer.obtain(container.image, container.pull_policy, tell, self._pod.runtime)
            self._images[container.image, container.pull_policy] = image
            if pulled is not None:
                self._pulled[container.image] = pulled
        return image

    async def begin(self, listeners: Mapping[str, clients.Client]) -> lifecycle.Played:
        """Start it, and tell the client."""
        async with pullprogress.told(self._call) as tell:

            async def obtain(container: model.Container) -> cri_pb2.Image:
                return await self._obtain(container, tell)

            try:
                played = await asyncio.shield(self._pods.play(self._pod, obtain, self._withdrawn, listeners=listeners))
            except errors.AlreadyExistsError as error:
                if not self._call.parameters.replace:
                    raise
                hint = "somebody else played it at the same time: see nixlet ps, and play it again if that isn't what you want"
                raise errors.AlreadyExistsError(error.message, hint=hint) from error
        if self._withdrawn.is_set() and not self._call.gone.is_set():
            # Too late for the player, and before anybody knew of it.
            await self._remove(played.running.sandbox)
            raise self._not_wanted()
        await self._call.reply({"started": _described(played)})
        return played

    async def to_its_end(self, containerd: imagestore.ImageStore) -> bool:
        """Start it, show its output until it has ended, and remove it; False when nobody reads the output any more.

        Raises:
            CallCancelledError: Nobody wants it any more; nothing of it is left.
            UnavailableError: The node ends; the pod goes on.
        """
        start = time.time()
        client = clientstreams.client(self._call, self._call.parameters.streams)
        try:
            async with _listeners(self._pod, client) as (listeners, finish):
                played = await self.begin(listeners)
                async with contextlib.AsyncExitStack() as stack:
                    # Also when the client was killed: nobody else would remove it.
                    stack.push_async_callback(self._remove, played.running.sandbox)
                    ended = asyncio.gather(*played.serving.values(), return_exceptions=True)
                    await waits.first(ended, self._withdrawn.wait(), client.gone.wait())
                    if ended.done():
                        if any(each.cancelled() for each in played.serving.values()):
                            stack.pop_all()
                            raise errors.UnavailableError(
                                f"the node ends; pod {self._pod.name} goes on", hint="see nixlet ps"
                            )
                        await waits.first(finish(), self._withdrawn.wait())
                    if client.failure is not None:
                        raise client.failure
                    if client.reader_gone:
                        return False
                    if self._withdrawn.is_set():
                        raise self._not_wanted()
                    summary = await self._summary(containerd, played, start)
        finally:
            client.leave()
        codes = [_exit_code(played, each) for each in played.running.containers]
        code = next((code for code in codes if code), 0)
        await self._call.reply({"ended": {"name": self._pod.name, "exit_code": code, "summary": summary}})
        return True

    def _not_wanted(self) -> errors.CallCancelledError:
        return errors.CallCancelledError(f"pod {self._pod.name} is not wanted any more")

    async def _remove(self, sandbox: str) -> None:
        with contextlib.suppress(errors.NotFoundError):
            await self._pods.remove(sandbox, -1)

    async def _summary(
        self, containerd: imagestore.ImageStore, played: lifecycle.Played, start: float
    ) -> Mapping[str, object] | None:
        if not self._call.parameters.summary:
            return None
        containers = []
        first: list[float] = []
        for started, container in zip(played.running.containers, self._pod.containers, strict=True):
            record = await containerd.container(started.id)
            if record is None:
                raise errors.NotFoundError(f"container {started.name} was removed by somebody")
            told: dict[str, object] = {
                "name": started.name,
                "mounts": len(await containerd.snapshot_mounts(record.snapshotter, record.snapshot_key)),
            }
            if (pulled := self._pulled.get(container.image)) is not None:
                told["closure_paths"] = pulled.closure_paths
                told["fetched_bytes"] = pulled.took.fetched_bytes
                told["pull_ms"] = pulled.duration_ms
            containers.append(told)
            if (written := await asyncio.to_thread(_first_written, started.log_path)) is not None:
                first.append(written)
        return {"containers": containers, "output_after_ms": round((min(first) - start) * 1000) if first else None}


@contextlib.asynccontextmanager
async def _listeners(
    pod: model.Pod, client: clients.Client
) -> AsyncIterator[tuple[Mapping[str, clients.Client], Callable[[], Coroutine[None, None, None]]]]:
    """Who listens to which container for a client, and what hands the rest on when all have ended."""
    if len(pod.containers) == 1:
        yield {pod.containers[0].name: client}, client.finish
        return
    lines = prefixes.Prefixes(client)
    try:
        yield {each.name: lines.listener(f"{each.name}: ") for each in pod.containers}, lines.finish
    finally:
        await lines.close()


def _first_written(log_path: str) -> float | None:
    """When the first piece of output came, in seconds since the epoch; None: there is none."""
    first = next(iter(logs.records(log_path)), None)
    return None if first is None else logrecords.written_at(first).timestamp()


def _exit_code(played: lifecycle.Played, container: player.RunningContainer) -> int:
    return played.serving[container.id].result() if container.exit_code is None else container.exit_code


def _described(played: lifecycle.Played) -> Mapping[str, object]:
    running = played.running
    return {
        "name": running.pod.name,
        "namespace": running.pod.namespace,
        "id": running.sandbox,
        "containers": [{"name": each.name, "id": each.id} for each in running.containers],
    }


async def _parsed(wanted: PlayParameters | DownParameters) -> tuple[Sequence[model.Pod], Sequence[str]]:
    def parsed() -> tuple[Sequence[model.Pod], Sequence[str]]:
        # A node's start doesn't wait for YAML's reader.
        from nixlet.kube import manifest  # noqa: PLC0415 (see above)

        return manifest.parse(wanted.manifest, wanted.source)

    # A large one takes its time.
    return await asyncio.to_thread(parsed)
