"""A store kept by a Nix daemon: over its socket, or through a ``nix-daemon --stdio`` child where no daemon runs."""

import asyncio
import contextlib
import dataclasses
import functools
import grp
import os
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from nixlet import errors
from nixlet.host import process, procfs, unixsocket
from nixlet.store import paths
from nixlet.store.daemon import connection as connections
from nixlet.store.daemon import pool
from nixlet.store.daemon import session as sessions

T = TypeVar("T")

_DEFAULT_STATE_DIR = "/nix/var/nix"

#: Seconds for a daemon to take the connection, to take part in the handshake and to set the options.
_OPEN_TIMEOUT = 30.0

#: How much is kept of what a ``--stdio`` child complains about (bytes).
_KEPT_COMPLAINTS = 4096

#: Seconds for a child that serves no more to end, and to say why.
_ENDING = 2.0


@dataclasses.dataclass(frozen=True, slots=True)
class DaemonSettings:
    """Where the store and its daemon are.

    Attributes:
        store_dir: The directory that store paths begin with.
        real_dir: Where the files are on this host; empty: at ``store_dir``.
        state_dir: Nix's state: the daemon's socket and the GC roots are below it.
        socket: The daemon's socket.
        stdio: The command that speaks the protocol on its standard streams.
        environment: The environment for that command.
        overrides: Settings of Nix for our connections (nix.conf's names).
    """

    store_dir: str = paths.DEFAULT_STORE_DIR
    real_dir: str = ""
    state_dir: str = _DEFAULT_STATE_DIR
    socket: str = f"{_DEFAULT_STATE_DIR}/daemon-socket/socket"
    stdio: Sequence[str] = ("nix-daemon", "--stdio")
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    overrides: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "DaemonSettings":
        """What Nix's own variables say (Nix manual, "Common Environment Variables").

        Raises:
            UnsupportedError: NIX_REMOTE names a store that is not local.
        """
        state = environment.get("NIX_STATE_DIR", _DEFAULT_STATE_DIR)
        socket = environment.get("NIX_DAEMON_SOCKET_PATH", os.path.join(state, "daemon-socket", "socket"))
        remote = environment.get("NIX_REMOTE", "")
        if remote.startswith("unix://"):
            socket = remote.removeprefix("unix://") or socket
        elif remote not in {"", "auto", "daemon", "local"}:
            raise errors.UnsupportedError(
                f"NIX_REMOTE={remote} names a store that is not on this host", hint="unset NIX_REMOTE"
            )
        store = environment.get("NIX_STORE_DIR", paths.DEFAULT_STORE_DIR)
        return cls(store_dir=store, state_dir=state, socket=socket, environment=environment)

    @property
    def gcroots(self) -> str:
        """Where Nix looks for GC roots."""
        return os.path.join(self.state_dir, "gcroots")


class DaemonStore:
    """A store kept by a Nix daemon."""

    def __init__(self, settings: DaemonSettings) -> None:
        self.settings = settings
        self._pool = pool.Pool(self._open)

    @property
    def store_dir(self) -> str:
        """The directory that its paths begin with."""
        return self.settings.store_dir

    @property
    def real_dir(self) -> str:
        """The directory on this host that holds its files."""
        return self.settings.real_dir or self.settings.store_dir

    def awaited(self) -> str:
        """Who keeps the daemon from answering, in words: a garbage collection, for one; empty where nobody is known."""
        state = self.settings.state_dir
        for lock in (os.path.join(state, "gc.lock"), os.path.join(state, "db", "big-lock")):
            if holder := procfs.lock_holder(lock):
                return f"process {holder} holds {lock}, as a garbage collection does"
        return ""

    def keeping(self) -> contextlib.AbstractAsyncContextManager[None]:
        """Keep connections for the next user, some seconds each, for the time of the context."""
        return self._pool.keeping()

    def session(self, *, anew: bool = False) -> contextlib.AbstractAsyncContextManager[sessions.DaemonSession]:
        """A connection for the time of the context.

        Args:
            anew: Whether it has to be a new one, which remembers nothing.

        Raises:
            UnavailableError: No daemon answers and none can be started; the sentence names the socket at fault.
        """
        return self._pool.session(anew=anew)

    async def _open(self, stack: contextlib.AsyncExitStack) -> sessions.DaemonSession:
        try:
            return await self._in_time(self._open_socket(stack))
        except (FileNotFoundError, ConnectionRefusedError):
            return await self._open_stdio(stack)
        except OSError as error:
            raise errors.UnavailableError(
                f"the Nix daemon's socket {self.settings.socket} can't be opened: {error.strerror or error}",
                hint=_who_may(self.settings.socket) if isinstance(error, PermissionError) else "",
            ) from error

    async def _open_socket(self, stack: contextlib.AsyncExitStack) -> sessions.DaemonSession:
        sock = await unixsocket.connected(self.settings.socket)
        try:
            reader, writer = await asyncio.open_unix_connection(sock=sock)
        except BaseException:
            sock.close()
            raise
        stack.callback(writer.close)
        return await self._agreed(connections.Connection(reader, writer))

    async def _open_stdio(self, stack: contextlib.AsyncExitStack) -> sessions.DaemonSession:
        program = process.find_program(self.settings.stdio[0], self.settings.environment.get("PATH"))
        if program is None:
            raise errors.UnavailableError(
                f"Nix is not installed: there is no {self.settings.stdio[0]} on PATH, and no daemon serves"
                f" {self.settings.socket}",
                hint="install Nix (https://nixos.org/download, or your distribution's nix-bin)",
            )
        child = await stack.enter_async_context(
            process.start(
                [program, *self.settings.stdio[1:]],
                env=self.settings.environment,
                stdin=process.PIPE,
                stdout=process.PIPE,
                stderr=process.PIPE,
                ends_with_input=True,
            )
        )
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        # What it complains about must not fill its pipe; some of it says why it doesn't serve, or ended.
        complaints = asyncio.create_task(_last_words(child.stderr), name="stderr of nix-daemon")
        stack.callback(complaints.cancel)
        said = functools.partial(_said, complaints)
        try:
            return await self._in_time(self._agreed(connections.Connection(child.stdout, child.stdin, said)))
        except errors.UnavailableError as error:
            child.stdin.close()
            raise errors.UnavailableError(f"{program} --stdio does not serve: {await said() or error}") from error

    async def _in_time(self, opening: Coroutine[Any, Any, T]) -> T:
        """Wait for a daemon that answers; one that waits for a lock answers when it has it: that isn't broken.

        Raises:
            UnavailableError: It is silent, and waits for nobody.
        """
        task = asyncio.create_task(opening, name="opening a connection to the Nix daemon")
        try:
            awaited = ""
            while not task.done():
                await asyncio.wait([task], timeout=_OPEN_TIMEOUT)
                # Who had the lock a while ago may have given it back just now.
                awaited, before = await asyncio.to_thread(self.awaited), awaited
                if not (task.done() or awaited or before):
                    raise errors.UnavailableError("the Nix daemon does not answer")
            return await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _agreed(self, connection: connections.Connection) -> sessions.DaemonSession:
        try:
            await connection.handshake()
        except connections.DaemonError as error:
            raise errors.PermissionDeniedError(
                f"the Nix daemon refuses the connection: {error}", hint="look at allowed-users in nix.conf"
            ) from error
        session = sessions.DaemonSession(connection, self.settings.store_dir, self.settings.overrides)
        await session.set_options()
        return session


def _who_may(socket: str) -> str:
    """Who can open a socket that we can't, with the directory or the socket that is in the way."""
    step = ""
    for part in socket.split("/")[1:]:
        step = f"{step}/{part}"
        if not os.access(step, os.W_OK if step == socket else os.X_OK):
            break
    try:
        status = os.stat(step)
    except OSError:
        return "run nixlet as root"
    try:
        group = grp.getgrgid(status.st_gid).gr_name
    except KeyError:
        group = str(status.st_gid)
    what = "the socket" if step == socket else f"the directory {step}"
    return f"{what} is for group {group} (mode {status.st_mode & 0o7777:04o}): join it, or run nixlet as root"


async def _said(complaints: asyncio.Task[bytes]) -> str:
    """What a child that ends has complained about, on one line; empty where its end takes too long."""
    await asyncio.wait([complaints], timeout=_ENDING)
    return connections.plain(complaints.result().decode(errors="replace")) if complaints.done() else ""


async def _last_words(stream: asyncio.StreamReader) -> bytes:
    kept = b""
    while data := await stream.read(_KEPT_COMPLAINTS):
        kept = (kept + data)[-_KEPT_COMPLAINTS:]
    return kept
