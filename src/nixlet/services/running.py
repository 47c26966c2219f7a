"""Running a container for a client: the method Run."""

import asyncio
import contextlib
from collections.abc import Mapping

import msgspec

from nixlet import errors
from nixlet.containerd import tasks
from nixlet.containers import clients, model
from nixlet.host import waits
from nixlet.images import obtaining
from nixlet.pods import lifecycle, single
from nixlet.rpc.gen import cri_pb2
from nixlet.services import clientstreams, pullprogress, sessions, withdrawal
from nixlet.varlink import server


class RunParameters(single.Wanted, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is to be run, and for whom.

    Attributes:
        ticket: What the call is withdrawn by; empty: it isn't.
        streams: Where the container's streams go; None: nowhere, and the client goes when it has started.
        columns: The size of the client's terminal.
        rows: Its height.
    """

    ticket: str = ""
    streams: clientstreams.Streams | None = None
    columns: clientstreams.Cells = 0
    rows: clientstreams.Cells = 0


class RunService:
    """Runs containers on one node."""

    def __init__(
        self,
        pods: lifecycle.Pods,
        service: tasks.Tasks,
        obtainer: obtaining.Obtainer,
        withdrawals: withdrawal.Withdrawals,
        open_sessions: sessions.Sessions,
    ) -> None:
        """Run containers on a node.

        Args:
            pods: The node's pods.
            service: containerd's tasks.
            obtainer: Has images ready.
            withdrawals: Which calls can be withdrawn.
            open_sessions: By which clients reach what they have in front of them.
        """
        self._pods = pods
        self._tasks = service
        self._sessions = open_sessions
        self._obtainer = obtainer
        self._withdrawals = withdrawals

    def methods(self) -> Mapping[str, server.Method]:
        """Its methods."""
        # Without streams it ends with the start; whoever takes several replies is told of the pull before.
        return {"Run": server.Method(RunParameters, self._run, several=lambda wanted: wanted.streams is not None)}

    async def _run(self, call: server.Call[RunParameters]) -> Mapping[str, object] | None:
        wanted = call.parameters
        pod = single.pod(wanted, attached=wanted.streams is not None)
        with self._withdrawals.possible(call, wanted.ticket) as withdrawn:
            if wanted.streams is None:
                played = await self._play(call, pod, withdrawn, None)
                await self._check_wanted(call, played, withdrawn)
                return {"started": _described(played)}
            streams = wanted.streams if wanted.interactive else msgspec.structs.replace(wanted.streams, stdin=None)
            client = clientstreams.client(call, streams)
            try:
                played = await self._play(call, pod, withdrawn, client)
                container = played.running.containers[0].id
                process = sessions.FirstProcess(self._tasks, container)
                with self._sessions.opened(process, played.serving[container]) as session:
                    await withdrawn.hand_over(process)
                    await self._check_wanted(call, played, withdrawn)
                    await call.reply({"started": {**_described(played), "session": session}})
                    return await self._follow(call, played, process, client, withdrawn)
            finally:
                # What has started goes on without it.
                client.leave()

    async def _check_wanted(
        self, call: server.Call[RunParameters], played: lifecycle.Played, withdrawn: asyncio.Event
    ) -> None:
        """Undo what was withdrawn too late for the player, and before anybody knew of it."""
        if withdrawn.is_set() and not call.gone.is_set():
            await self._pods.remove(played.running.sandbox, 0)
            raise _not_wanted(played.running.pod)

    async def _play(
        self,
        call: server.Call[RunParameters],
        pod: model.Pod,
        withdrawn: withdrawal.Withdrawal,
        client: clients.Client | None,
    ) -> lifecycle.Played:
        async with pullprogress.told(call) as tell:

            async def obtain(container: model.Container) -> cri_pb2.Image:
                image, _ = await self._obtainer.obtain(container.image, container.pull_policy, tell, pod.runtime)
                return image

            listeners = {} if client is None else {pod.containers[0].name: client}
            size = (call.parameters.columns, call.parameters.rows)
            try:
                return await asyncio.shield(self._pods.play(pod, obtain, withdrawn, listeners=listeners, size=size))
            except errors.AlreadyExistsError as error:
                hint = f"remove it (nixlet rm {pod.name}) or choose another --name"
                raise errors.AlreadyExistsError(error.message, hint=hint) from error

    async def _follow(
        self,
        call: server.Call[RunParameters],
        played: lifecycle.Played,
        process: sessions.FirstProcess,
        client: clients.Client,
        withdrawn: asyncio.Event,
    ) -> Mapping[str, object] | None:
        """Wait for the end of a container that a client has in front of it, or of the client; the last reply."""
        running = played.running
        serving = played.serving[running.containers[0].id]
        await waits.first(serving, withdrawn.wait(), client.gone.wait())
        if serving.done() and not serving.cancelled():
            await waits.first(self._finish(played, client), withdrawn.wait(), call.gone.wait())
        # A client that was killed left it alone, though its pipes have no reader any more.
        if call.gone.is_set() or (client.reader_gone and await clientstreams.has_hung_up(call)):
            return None
        if client.failure is not None or client.reader_gone or withdrawn.is_set():
            # Nobody has what it prints: it ends as a program would at the end of a pipe.
            await self._end(played)
            if client.failure is not None:
                raise client.failure
            if not client.reader_gone:
                raise _not_wanted(running.pod)
            return {"reader_gone": True}
        if serving.cancelled():
            raise errors.UnavailableError(
                f"the node ends while container {running.pod.name} is in front of you; it goes on",
                hint=f"see nixlet logs {running.pod.name}",
            )
        code = serving.result()
        if running.containers[0].exit_code is not None:
            code = running.containers[0].exit_code
        if running.pod.remove_when_ended:
            # Afterwards people see nothing of it; it is removed meanwhile.
            try:
                await self._pods.leave(running.sandbox)
            except errors.NixletError:
                # It goes on by itself until it is done.
                await waits.first(played.ended, withdrawn.wait(), call.gone.wait())
        return {"ended": {"exit_code": process.exit_code(code)}}

    async def _finish(self, played: lifecycle.Played, client: clients.Client) -> None:
        """Hand the rest of the output on; whoever is told of the end then may remove the container at once."""
        await client.finish()
        container = played.running.containers[0].id
        if played.serving[container].exception() is None and not played.running.pod.remove_when_ended:
            await self._pods.wait_until_said(container)

    async def _end(self, played: lifecycle.Played) -> None:
        running = played.running
        if running.pod.remove_when_ended:
            with contextlib.suppress(errors.NotFoundError):
                await self._pods.remove(running.sandbox, 0)
        else:
            self._pods.release(running.sandbox)


def _not_wanted(pod: model.Pod) -> errors.CallCancelledError:
    return errors.CallCancelledError(f"container {pod.name} is not wanted any more")


def _described(played: lifecycle.Played) -> Mapping[str, object]:
    running = played.running
    return {"id": running.containers[0].id, "name": running.pod.name, "sandbox": running.sandbox}
