"""Processes that clients have in front of them, by a name that only they know: the methods Resize and Signal.

A client that is given a process asks for these over another connection while its first one waits for the end.
"""

import asyncio
import contextlib
import secrets
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, Protocol

import msgspec

from nixlet import errors
from nixlet.containerd import tasks
from nixlet.containers import endings
from nixlet.host import procfs
from nixlet.services import clientstreams
from nixlet.varlink import server

#: A container that goes on after it was asked so often to end is killed: so often in this time (seconds), since to many programs that
#: heed it SIGINT only says to leave what they are doing.
_PATIENCE = 3
_PATIENT_FOR = 10.0

#: What ends no process by its default effect: that is nothing, or to stop (signal(7)).
_HARMLESS = frozenset(
    {
        signal.SIGCHLD,
        signal.SIGCONT,
        signal.SIGSTOP,
        signal.SIGTSTP,
        signal.SIGTTIN,
        signal.SIGTTOU,
        signal.SIGURG,
        signal.SIGWINCH,
    }
)


class Process(Protocol):
    """What a client can have in front of it."""

    async def send_signal(self, number: int) -> None:
        """Send it a signal."""

    async def resize(self, columns: int, rows: int) -> None:
        """Tell the size of its terminal."""


class FirstProcess:
    """A container's first process, as a client has it in front of it: remembers what the client ended it by."""

    def __init__(self, service: tasks.Tasks, container: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._tasks = service
        self._container = container
        self._clock = clock
        #: When it was asked to end.
        self._asked: list[float] = []
        self._ended_by = 0

    async def send_signal(self, number: int) -> None:
        """Send it a signal, with the effect that it would have outside of a container."""
        pid = await self._tasks.pid(self._container)
        asks = number in {signal.SIGINT, signal.SIGTERM}
        now = self._clock()
        self._asked = [each for each in self._asked if now - each < _PATIENT_FOR]
        # The first process of a namespace gets only signals that it asked for (pid_namespaces(7)): Ctrl-C would do nothing
        # to most programs. What it doesn't ask for has the effect here that it has elsewhere: it ends.
        if number in _HARMLESS or (len(self._asked) + asks < _PATIENCE and procfs.heeds_signal(pid, number)):
            await self._tasks.kill(self._container, number)
            # Only now: what can't be handed on is tried again.
            if asks:
                self._asked.append(now)
            return
        before, self._ended_by = self._ended_by, self._ended_by or number
        try:
            await self._tasks.kill(self._container, signal.SIGKILL)
        except errors.NotFoundError:
            # It had ended by itself.
            self._ended_by = before
            raise

    async def resize(self, columns: int, rows: int) -> None:
        """Tell the size of its terminal."""
        await self._tasks.resize(self._container, columns, rows)

    def exit_code(self, code: int) -> int:
        """The exit status for one that ended with another: that of the signal that ended it, if one of the client's did."""
        return 128 + self._ended_by if self._ended_by else code


class _Resized(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    session: str
    columns: clientstreams.Cells
    rows: clientstreams.Cells


class _Signalled(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    session: str
    signal: int


class Sessions:
    """Those of one node."""

    def __init__(self) -> None:
        self._open: dict[str, Process] = {}

    @contextlib.contextmanager
    def opened(self, process: Process, ended: "asyncio.Future[int]") -> Iterator[str]:
        """Let a client reach a process for the time of the context, by the name that it gives.

        Args:
            process: The process.
            ended: Done when it has ended: the client is told so then, also while it still gets what the process has printed.
        """
        name = secrets.token_hex(16)
        self._open[name] = process

        def close(_: object) -> None:
            self._open.pop(name, None)

        ended.add_done_callback(close)
        try:
            yield name
        finally:
            ended.remove_done_callback(close)
            close(ended)

    def methods(self) -> Mapping[str, server.Method]:
        """Its methods."""
        return {"Resize": server.Method(_Resized, self._resize), "Signal": server.Method(_Signalled, self._signal)}

    def _find(self, name: str) -> Process:
        found = self._open.get(name)
        if found is None:
            raise errors.NotFoundError("the process has ended")
        return found

    async def _reach(self, call: server.Call[Any], name: str, reach: Callable[[Process], Awaitable[None]]) -> None:
        """Reach a process; where containerd is being started again, as soon as it is back."""
        while not call.gone.is_set():
            try:
                await reach(self._find(name))
            except errors.UnavailableError:
                await asyncio.sleep(endings.RETRY)
            else:
                return

    async def _resize(self, call: server.Call[_Resized]) -> None:
        wanted = call.parameters
        await self._reach(call, wanted.session, lambda process: process.resize(wanted.columns, wanted.rows))

    async def _signal(self, call: server.Call[_Signalled]) -> None:
        number = known(call.parameters.signal)
        await self._reach(call, call.parameters.session, lambda process: process.send_signal(number))


def known(number: int) -> signal.Signals:
    """A signal by its number.

    Raises:
        InvalidArgumentError: There is none.
    """
    try:
        return signal.Signals(number)
    except ValueError as error:
        raise errors.InvalidArgumentError(f"there is no signal {number}") from error
