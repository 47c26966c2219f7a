"""Further processes in containers, and containers that run already, in front of clients: the methods Exec and Attach."""

import asyncio
import contextlib
import signal
from collections.abc import Mapping, Sequence

import msgspec

from nixlet import errors
from nixlet.containerd import cri, tasks
from nixlet.containers import arguments, attaching, processes
from nixlet.host import waits
from nixlet.pods import listing, lookup, removal
from nixlet.rpc.gen import cri_pb2
from nixlet.services import clientstreams, sessions
from nixlet.varlink import server


class ExecParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is to be run where, and for whom; see the interface's description."""

    container: str
    command: Sequence[str]
    streams: clientstreams.Streams
    tty: bool = False
    interactive: bool = False
    env: Sequence[str] = ()
    user: str = ""
    workdir: str = ""
    columns: clientstreams.Cells = 0
    rows: clientstreams.Cells = 0


class AttachParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which container, and for whom."""

    container: str
    streams: clientstreams.Streams
    columns: clientstreams.Cells = 0
    rows: clientstreams.Cells = 0


class ExecutingService:
    """Answers for one node."""

    def __init__(
        self,
        runtime: cri.RuntimeClient,
        removals: removal.Removals,
        service: tasks.Tasks,
        adds: processes.Processes,
        attacher: attaching.Attacher,
        open_sessions: sessions.Sessions,
    ) -> None:
        """Answer for a node.

        Args:
            runtime: The CRI.
            removals: What is being removed there.
            service: containerd's tasks.
            adds: Adds processes to containers.
            attacher: Has the streams of containers.
            open_sessions: By which clients reach what they have in front of them.
        """
        self._runtime = runtime
        self._removals = removals
        self._tasks = service
        self._processes = adds
        self._attacher = attacher
        self._sessions = open_sessions

    def methods(self) -> Mapping[str, server.Method]:
        """Its methods."""
        return {
            "Exec": server.Method(ExecParameters, self._exec, several=True),
            "Attach": server.Method(AttachParameters, self._attach, several=True),
        }

    async def _running(self, wanted: str) -> str:
        """The ID of a running container."""
        found = lookup.find(wanted, await listing.containers(self._runtime, self._removals))
        if found.state != cri_pb2.CONTAINER_RUNNING:
            raise errors.FailedPreconditionError(f"container {wanted} is not running")
        return found.id

    async def _exec(self, call: server.Call[ExecParameters]) -> Mapping[str, object] | None:
        wanted = call.parameters
        if not wanted.command:
            raise errors.InvalidArgumentError("there is no command to run")
        command = processes.Command(
            tuple(wanted.command),
            tuple(text.partition("=")[::2] for text in wanted.env),
            wanted.workdir,
            arguments.user(wanted.user) if wanted.user else None,
            tty=wanted.tty,
            size=(wanted.columns, wanted.rows),
        )
        client = clientstreams.client(call, wanted.streams)
        try:
            container = await self._running(wanted.container)
            process = await self._processes.start(container, command, client, stdin=wanted.interactive)
            with self._sessions.opened(process, process.ended) as session:
                await call.reply({"started": {"session": session}})
                await waits.first(process.ended, client.gone.wait(), call.gone.wait())
                if client.failure is not None:
                    # Nobody can have what it prints, and nobody would know of it.
                    with contextlib.suppress(errors.NotFoundError):
                        await process.send_signal(signal.SIGKILL)
                    raise client.failure
                if client.reader_gone and not await clientstreams.has_hung_up(call):
                    # It ends as a program would at the end of a pipe.
                    with contextlib.suppress(errors.NotFoundError):
                        await process.send_signal(signal.SIGKILL)
                    return {"reader_gone": True}
                if call.gone.is_set():
                    return None
                if process.ended.cancelled():
                    raise errors.UnavailableError("the node ends, and with it the process that it ran for you")
                await waits.first(client.finish(), call.gone.wait())
                return {"ended": {"exit_code": process.ended.result()}}
        finally:
            client.leave()

    async def _attach(self, call: server.Call[AttachParameters]) -> Mapping[str, object] | None:
        wanted = call.parameters
        client = clientstreams.client(call, wanted.streams)
        try:
            attachment = await self._attacher.find(await self._running(wanted.container))
            process = sessions.FirstProcess(self._tasks, attachment.container)
            serving = asyncio.create_task(attachment.serve(client), name=f"attach {attachment.container}")
            try:
                with self._sessions.opened(process, serving) as session:
                    if attachment.tty and wanted.columns and wanted.rows:
                        # One that has ended has no size.
                        with contextlib.suppress(errors.NixletError):
                            await process.resize(wanted.columns, wanted.rows)
                    told = {"session": session, "tty": attachment.tty, "interactive": attachment.interactive}
                    await call.reply({"started": told})
                    await waits.first(serving, client.gone.wait(), call.gone.wait())
                    if client.failure is not None:
                        raise client.failure
                    if client.reader_gone:
                        return {"reader_gone": True}
                    if call.gone.is_set():
                        return None
                    if serving.cancelled():
                        raise errors.UnavailableError(
                            f"the node ends while container {wanted.container} is in front of you; it goes on",
                            hint=f"see nixlet logs {wanted.container}",
                        )
                    code = serving.result()
                    await waits.first(client.finish(), call.gone.wait())
                    return {"ended": {"exit_code": process.exit_code(code)}}
            finally:
                serving.cancel()
                await asyncio.gather(serving, return_exceptions=True)
        finally:
            client.leave()
