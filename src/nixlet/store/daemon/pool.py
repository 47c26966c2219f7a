"""Connections to one Nix daemon that are kept for a while after their use: the next user saves a process, or a handshake.

A connection has one user at a time. What it holds for one user it holds until it is closed, which is longer than asked for
by the time that it is kept.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from nixlet import errors
from nixlet.store.daemon import session as sessions

#: Seconds that a connection is kept without a user: from a pull to its layers' Prepares it is used again within moments.
_IDLE = 3.0

#: Seconds after its opening from which on it isn't kept any more, however often it is used: what it holds must be let go at some
#: time, and a daemon reads its configuration once for each connection.
_AGE = 60.0

#: How many are kept at a time. Each may be a process.
_MOST = 4

#: Seconds for a kept connection to answer: who doesn't isn't waited for, since a new one may do better.
_ANSWER = 1.0

#: Opens a connection and sets its options; the stack then owns all that there is of it.
Opener = Callable[[contextlib.AsyncExitStack], Awaitable[sessions.DaemonSession]]


class _Kept:
    """A connection, and all that it stands on."""

    def __init__(self, session: sessions.DaemonSession, stack: contextlib.AsyncExitStack) -> None:
        self.session = session
        self.stack = stack
        self.kept_until = asyncio.get_running_loop().time() + _AGE
        self.resting: asyncio.Task[None]

    @property
    def may_stay(self) -> bool:
        return self.session.connection.at_rest and asyncio.get_running_loop().time() < self.kept_until


class Pool:
    """The connections of one store, each of which ``opener`` opens."""

    def __init__(self, opener: Opener) -> None:
        self._open = opener
        self._keeps = 0
        self._idle: list[_Kept] = []
        self._closing: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def keeping(self) -> AsyncIterator[None]:
        """Keep connections for the time of the context; outside of it each is closed after its use."""
        self._keeps += 1
        try:
            yield
        finally:
            self._keeps -= 1
            if not self._keeps:
                while self._idle:
                    kept = self._idle.pop()
                    kept.resting.cancel()
                    self._dismiss(kept.stack)
                while self._closing:
                    await asyncio.wait(self._closing)

    @contextlib.asynccontextmanager
    async def session(self, *, anew: bool) -> AsyncIterator[sessions.DaemonSession]:
        """A connection for the time of the context; one whose user fails or is cancelled is used by nobody else.

        Args:
            anew: Whether it has to be a new one: a daemon remembers for each connection what it told, and what a cache lacks.

        Raises:
            NixletError: None can be opened.
        """
        kept = None if anew else await self._take()
        if kept is None:
            kept = await self._made()
        try:
            yield kept.session
        except BaseException:
            await self._give_up(kept.stack)
            raise
        if not (self._keeps and kept.may_stay and len(self._idle) < _MOST):
            await self._give_up(kept.stack)
            return
        kept.resting = asyncio.create_task(self._rest(kept), name="a kept connection to the Nix daemon")
        self._idle.append(kept)

    async def _made(self) -> _Kept:
        stack = contextlib.AsyncExitStack()
        try:
            return _Kept(await self._open(stack), stack)
        except BaseException:
            await self._give_up(stack)
            raise

    async def _take(self) -> _Kept | None:
        """The kept connection that was used last, if it still answers."""
        while self._idle:
            kept = self._idle.pop()
            kept.resting.cancel()
            try:
                await asyncio.wait([kept.resting])
                # What it says without being asked would be taken for an answer.
                if kept.resting.cancelled() and kept.may_stay and await kept.session.connection.is_undisturbed():
                    async with asyncio.timeout(_ANSWER):
                        await kept.session.set_options()
                    kept.session.reused = True
                    return kept
            except (errors.NixletError, TimeoutError):
                pass
            except BaseException:
                self._dismiss(kept.stack)
                raise
            self._dismiss(kept.stack)
        return None

    async def _rest(self, kept: _Kept) -> None:
        """Give up a connection that nobody takes for some seconds, or whose daemon ends or says something unasked."""
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout(_IDLE):
                await kept.session.connection.disturbed()
        # Who has taken it in this very moment sees that it is disturbed.
        if kept in self._idle:
            self._idle.remove(kept)
            self._dismiss(kept.stack)

    async def _give_up(self, stack: contextlib.AsyncExitStack) -> None:
        """Close a connection whose user leaves it: who keeps connections waits for a daemon that doesn't end, or else its user."""
        if self._keeps:
            self._dismiss(stack)
        else:
            await stack.aclose()

    def _dismiss(self, stack: contextlib.AsyncExitStack) -> None:
        """Close a connection that nobody uses; a daemon that doesn't end keeps nobody waiting."""
        closing = asyncio.create_task(stack.aclose(), name="closing a connection to the Nix daemon")
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
