"""Withdrawing what was asked for, while it is being done."""

import asyncio
import contextlib
import signal
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from nixlet import errors
from nixlet.services import sessions
from nixlet.varlink import server


class _Withdrawn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    ticket: str
    signal: int | None = None


class Withdrawal(asyncio.Event):
    """Set when a call is not wanted any more.

    Attributes:
        process: The one that was asked for, when it has started. A signal is for it then, and withdraws nothing: a person sees
            what it prints before the client hears that it has started.
    """

    def __init__(self) -> None:
        super().__init__()
        self.process: sessions.Process | None = None
        self._signal: signal.Signals | None = None

    def by(self, number: signal.Signals | None) -> None:
        """Withdraw the call, because of a signal or for another reason."""
        self._signal = number
        self.set()

    async def hand_over(self, process: sessions.Process) -> None:
        """Have a process that has started get the signals, also the one that came meanwhile."""
        self.process = process
        if self._signal is not None:
            number, self._signal = self._signal, None
            self.clear()
            await _told(process, number)


class Withdrawals:
    """The calls that can be withdrawn, and the method Withdraw."""

    def __init__(self) -> None:
        self._calls: dict[str, Withdrawal] = {}

    def methods(self) -> Mapping[str, server.Method]:
        """Its methods."""
        return {"Withdraw": server.Method(_Withdrawn, self._withdraw)}

    @contextlib.contextmanager
    def possible(self, call: server.Call[Any], ticket: str) -> Iterator[Withdrawal]:
        """Let a call be withdrawn for the time of the context; gives the event that says so, or that it is over.

        Args:
            call: The call. When its client is gone, it is withdrawn as well.
            ticket: What the client calls it; empty: the client can only go.

        Raises:
            AlreadyExistsError: A call that goes on is called so.
        """
        if ticket in self._calls:
            raise errors.AlreadyExistsError("another call that goes on has this ticket", hint="give each call its own")
        withdrawn = Withdrawal()

        async def leave() -> None:
            await call.gone.wait()
            withdrawn.set()

        leaving = asyncio.create_task(leave(), name="client gone")
        if ticket:
            self._calls[ticket] = withdrawn
        try:
            yield withdrawn
        finally:
            withdrawn.set()
            leaving.cancel()
            self._calls.pop(ticket, None)

    async def _withdraw(self, call: server.Call[_Withdrawn]) -> None:
        wanted = call.parameters
        number = None if wanted.signal is None else sessions.known(wanted.signal)
        # What has ended meanwhile can't be withdrawn, and its answer is on the way.
        if (withdrawn := self._calls.get(wanted.ticket)) is None:
            return
        if number is not None and withdrawn.process is not None:
            await _told(withdrawn.process, number)
        else:
            withdrawn.by(number)


async def _told(process: sessions.Process, number: signal.Signals) -> None:
    with contextlib.suppress(errors.NotFoundError):
        # It has ended, and the answer is on the way.
        await process.send_signal(number)
