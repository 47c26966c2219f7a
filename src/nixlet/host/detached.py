"""Programs that go on without us: what runs below containers, such as a file system of theirs, must not end with its node.

Such a program is started in a session of its own and is nobody's child. It is found again by the socket that it serves. It writes its
log itself, which is put aside when it is started.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence

from nixlet import errors
from nixlet.host import logfiles, process, unixsocket, words

#: Tells its process before it becomes the program; the words of the command are arguments, never script.
_TOLD = 'echo $$ && exec "$@" >>"$0" 2>&1 </dev/null'

#: Seconds for that.
_STARTED_TIMEOUT = 20.0

#: Seconds for a process that was killed to be gone.
_KILLED_TIMEOUT = 10.0

#: How many bytes of its log are looked at for its last words.
_LAST_WORDS = 16 << 10


class Detached:
    """A process that is not our child, watched by a descriptor (pidfd_open(2)), so that its number can't come to mean another one."""

    def __init__(self, pid: int, argv: Sequence[str], log_path: str) -> None:
        """Watch a process.

        Args:
            pid: Its number.
            argv: What it was started with.
            log_path: The file that it writes what it has to say to.

        Raises:
            ProcessLookupError: It has ended.
        """
        self.pid = pid
        self.argv = tuple(argv)
        self._log_path = log_path
        self._fd = os.pidfd_open(pid)
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().add_reader(self._fd, self._notice)

    def _notice(self) -> None:
        asyncio.get_running_loop().remove_reader(self._fd)
        if not self.ended.done():
            self.ended.set_result(None)

    def last_words(self) -> bytes:
        """The end of its log."""
        with contextlib.suppress(OSError), open(self._log_path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LAST_WORDS))
            return file.read(_LAST_WORDS)
        return b""

    async def stop(self, grace: float) -> bool:
        """Ask it to end (SIGTERM), wait ``grace`` seconds, then kill it; whether that was necessary."""
        self._send(signal.SIGTERM)
        await asyncio.wait({self.ended}, timeout=grace)
        if self.ended.done():
            return False
        self._send(signal.SIGKILL)
        await asyncio.wait({self.ended}, timeout=_KILLED_TIMEOUT)
        return True

    def _send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._fd, number)

    def close(self) -> None:
        """Watch it no more; it goes on."""
        asyncio.get_running_loop().remove_reader(self._fd)
        os.close(self._fd)


def serving(socket: str, program: str) -> int:
    """The process of a program that serves a socket; 0: nobody does.

    Args:
        socket: The socket.
        program: What the program is called.

    Raises:
        FailedPreconditionError: Somebody else does.
    """
    try:
        pid = unixsocket.peer_of(socket)
    except errors.UnavailableError:
        return 0
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            command = file.read().decode(errors="surrogateescape").split("\0")
        ours = os.stat(f"/proc/{pid}").st_uid == os.geteuid()
    except OSError:
        return 0
    if not ours or os.path.basename(command[0]) != program or socket not in command:
        raise errors.FailedPreconditionError(
            f"{socket} is served by another program than {program} (process {pid})",
            hint="stop that process, or choose another --state-dir",
        )
    return pid


@contextlib.asynccontextmanager
async def found_or_started(
    argv: Sequence[str], *, socket: str, log_path: str, env: Mapping[str, str]
) -> AsyncIterator[tuple[Detached, bool]]:
    """A program that goes on when the context is left; and whether it was found running.

    Args:
        argv: The program, by name or path, and its arguments, among them the socket by itself.
        socket: Where it serves.
        log_path: What it prints is appended there.
        env: Its whole environment.

    Raises:
        UnavailableError: There is no such program, or the system can't start one.
        FailedPreconditionError: Somebody else serves the socket.
        CommandFailedError: It can't be started.
    """
    pid = serving(socket, os.path.basename(argv[0]))
    found = pid != 0
    if not found:
        pid = await _start(argv, log_path, env)
    try:
        watched = Detached(pid, argv, log_path)
    except ProcessLookupError as error:
        raise errors.UnavailableError(
            f"{os.path.basename(argv[0])} has ended at once", hint=f"its log is {log_path}"
        ) from error
    try:
        yield watched, found
    finally:
        watched.close()


async def _start(argv: Sequence[str], log_path: str, env: Mapping[str, str]) -> int:
    program = process.find_program(argv[0])
    if program is None:
        raise errors.UnavailableError(
            f"the program {argv[0]} is not installed or not executable", hint="install it, or put its directory on PATH"
        )
    with logfiles.RotatingFile(log_path) as log:
        # One that is full is put aside.
        log.write(b"")
    command = ["setsid", "--fork", "/bin/sh", "-c", _TOLD, log_path, program, *argv[1:]]
    async with process.start(command, env=env, stdout=process.PIPE, stderr=process.STDOUT) as child:
        assert child.stdout is not None
        # (not to the pipe's end: uvloop may hold that itself)
        try:
            async with asyncio.timeout(_STARTED_TIMEOUT):
                told = await child.stdout.readline()
                await child.wait()
        except TimeoutError:
            told = b"it did not start in time"
        if not told.strip().isdigit():
            raise words.failure(child.argv, child.returncode or 1, told, name=os.path.basename(argv[0]))
        return int(told)
