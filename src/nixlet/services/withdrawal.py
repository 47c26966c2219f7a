"""Withdrawing what was asked for, while it is being done."""

import asyncio
import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from nixlet import errors
from nixlet.varlink import server


class _Withdrawn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    ticket: str


class Withdrawals:
    """The calls that can be withdrawn, and the method Withdraw."""

    def __init__(self) -> None:
        self._calls: dict[str, asyncio.Event] = {}

    def methods(self) -> Mapping[str, server.Method]:
        """Its methods."""
        return {"Withdraw": server.Method(_Withdrawn, self._withdraw)}

    @contextlib.contextmanager
    def possible(self, call: server.Call[Any], ticket: str) -> Iterator[asyncio.Event]:
        """Let a call be withdrawn for the time of the context; gives the event that says so, or that it is over.

        Args:
            call: The call. When its client is gone, it is withdrawn as well.
            ticket: What the client calls it; empty: the client can only go.

        Raises:
            AlreadyExistsError: A call that goes on is called so.
        """
        if ticket in self._calls:
            raise errors.AlreadyExistsError("another call that goes on has this ticket", hint="give each call its own")
        withdrawn = asyncio.Event()

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
        # What has ended meanwhile can't be withdrawn, and its answer is on the way.
        if (withdrawn := self._calls.get(call.parameters.ticket)) is not None:
            withdrawn.set()
