"""The one place where processes start.

Programs are started by argument list, never through a shell, and never with ``preexec_fn``, user or group arguments (those make
CPython fork instead of vfork). No child may outlive nixlet, so each that doesn't end by itself with its standard input is started
through ``setpriv --pdeathsig KILL``: the kernel then kills it when the thread that started it ends (prctl(2), PR_SET_PDEATHSIG),
which is the event loop's thread.
The signal is not sent for a parent that ended before that call, so a shell then compares the parent with us before it becomes
the program; it takes no word of the command.
"""

import asyncio
import contextlib
import dataclasses
import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence

from nixlet import errors
from nixlet.host import uncut, words

PIPE = subprocess.PIPE
DEVNULL = subprocess.DEVNULL
STDOUT = subprocess.STDOUT

#: Run after PR_SET_PDEATHSIG: an orphan has another parent, and ends here. The program's words are arguments, never script.
#: containerd makes files that containers read (/etc/resolv.conf) with the umask that it has: never a person's.
_UNLESS_ORPHANED = 'umask 0022; [ "$PPID" = "$0" ] && exec "$@"'

#: What to do about a program that the system can't start.
_HINTS: dict[int | None, str] = {
    errno.EAGAIN: "there are too many processes: see ulimit -u, and TasksMax of the service",
    errno.ENOMEM: "there is too little memory",
    errno.EMFILE: "too many files are open: see ulimit -n, and LimitNOFILE of the service",
}

#: What keeps another user's program from rights that a file's mode or capabilities would give it.
_POWERLESS = ("--no-new-privs", "--bounding-set=-all", "--inh-caps=-all")

#: Seconds for a process that was killed to be gone.
_KILLED_TIMEOUT = 10.0

#: Seconds to wait for the end of an ended program's output, which somebody that it has left behind may hold open.
_LAST_WORDS = 0.5

#: How much of a program's output is read at a time (bytes).
_CHUNK = 1 << 16

#: Bytes that one line of a pipe may have.
_LINE_LIMIT = 1 << 20

_log = logging.getLogger("nixlet.process")


@dataclasses.dataclass(frozen=True, slots=True)
class Completed:
    """A program that ended.

    Attributes:
        argv: What was started.
        returncode: Its exit status, or minus the number of the signal that ended it.
        stdout: All that it printed.
        stderr: All that it complained about.
    """

    argv: tuple[str, ...]
    returncode: int
    stdout: bytes
    stderr: bytes

    def check(self) -> "Completed":
        """Return itself.

        Raises:
            CommandFailedError: The program ended with another status than 0.
        """
        if self.returncode != 0:
            raise words.failure(self.argv, self.returncode, self.stderr or self.stdout)
        return self


class _Streams(asyncio.subprocess.SubprocessStreamProtocol):
    """The streams of a program, and its end, whoever it has left behind may hold its pipes."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(limit=_LINE_LIMIT, loop=loop)
        self.ended: asyncio.Future[None] = loop.create_future()

    def process_exited(self) -> None:
        super().process_exited()
        self.ended.set_result(None)


class Child:
    """A running program, with asyncio streams where a pipe was asked for."""

    def __init__(
        self, argv: tuple[str, ...], process: asyncio.subprocess.Process, ended: "asyncio.Future[None]"
    ) -> None:
        """Take care of a process.

        Args:
            argv: What was started.
            process: The process.
            ended: Done when it has ended.
        """
        self.argv = argv
        self._process = process
        self._ended = ended
        self._is_left = False
        self.pid = process.pid
        self.stdin = process.stdin
        self.stdout = process.stdout
        self.stderr = process.stderr

    @property
    def returncode(self) -> int | None:
        """The exit status, minus a signal's number, or None while it runs."""
        return self._process.returncode

    async def wait(self) -> int:
        """Wait for the end; the exit status, or minus the signal's number."""
        # (asyncio's own wait is also for the end of its pipes)
        await asyncio.wait({self._ended})
        assert self._process.returncode is not None
        return self._process.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal; nothing happens when the program has ended already."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def stop(self, grace: float) -> bool:
        """Ask it to end (SIGTERM), wait ``grace`` seconds, then kill it; whether that was necessary."""
        if self._ended.done() or self._is_left:
            return False
        self.send_signal(signal.SIGTERM)
        await asyncio.wait({self._ended}, timeout=grace)
        if self._ended.done():
            return False
        await self.kill()
        return True

    async def kill(self) -> None:
        """Kill it, and wait for its end: not for ever, since one that hangs in the kernel doesn't end before that lets it go."""
        self.send_signal(signal.SIGKILL)
        await asyncio.wait({self._ended}, timeout=_KILLED_TIMEOUT)
        if not self._ended.done():
            self._is_left = True
            name = os.path.basename(self.argv[0])
            _log.error("%s was killed and has not ended: it hangs in the kernel", name, extra={"pid": self.pid})

    def close(self) -> None:
        """Have no more to do with its pipes, which a process that it has left behind may hold for long."""
        self._process._transport.close()  # type: ignore[attr-defined] # noqa: SLF001 (asyncio has no other way)


def find_program(name: str, search_path: str | None = None) -> str | None:
    """The absolute path of a program, looked up in ``search_path`` or the environment's PATH and the sbin directories.

    Root's programs (runc, iptables) live in sbin directories that a login shell's PATH may lack.
    """
    path = search_path if search_path is not None else os.environ.get("PATH", os.defpath)
    return shutil.which(name, path=os.pathsep.join([path, "/usr/local/sbin", "/usr/sbin", "/sbin"]))


def python(module: str, *arguments: str) -> list[str]:
    """The command line of a module of ours as a program of its own, in the Python that runs us.

    It imports from nowhere but where we did: ``-m`` alone would look into the working directory first, which is anybody's.
    """
    return [sys.executable, "-P", "-m", module, *arguments]


def _command(argv: Sequence[str], *, guarded: bool, user: tuple[int, int] | None = None) -> list[str]:
    program = argv[0] if os.path.isabs(argv[0]) else find_program(argv[0])
    if program is None or not os.access(program, os.X_OK):
        raise errors.UnavailableError(
            f"the program {argv[0]} is not installed or not executable", hint="install it, or put its directory on PATH"
        )
    if not guarded:
        return [program, *argv[1:]]
    guard = ["/bin/sh", "-c", _UNLESS_ORPHANED, str(os.getpid())]
    # One program for both: the kernel forgets the signal when the user changes, so it has to be asked for after that.
    other = [] if user is None else [f"--reuid={user[0]}", f"--regid={user[1]}", "--clear-groups", *_POWERLESS]
    return [find_setpriv(), *other, "--pdeathsig", "KILL", "--", *guard, program, *argv[1:]]


def lack(error: BaseException | None) -> OSError | None:
    """The system's refusal that an error is, also where Python has another word for it; None: it is none."""
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return OSError(errno.EAGAIN, "no further thread can be started")
    return error if isinstance(error, OSError) else None


def unstartable(name: str, error: OSError) -> errors.UnavailableError:
    """The error for a program that the system can't start: there are too many processes or files, or too little memory, in this moment."""
    return errors.UnavailableError(
        f"{name} can't be started: {error.strerror or error}", hint=_HINTS.get(error.errno, "")
    )


def find_setpriv() -> str:
    """The program that has the kernel end a child with its parent (util-linux); a service's PATH may lack its directory.

    Raises:
        UnavailableError: It is not installed.
    """
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/bin", "/bin", "/run/current-system/sw/bin"))
    program = find_program("setpriv", path)
    if program is None:
        raise errors.UnavailableError(
            "setpriv is not installed, without which programs would outlive nixlet",
            hint="install util-linux, or put its directory on PATH",
        )
    return program


@contextlib.asynccontextmanager
async def start(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    stdin: int = DEVNULL,
    stdout: int = DEVNULL,
    stderr: int = DEVNULL,
    grace: float = 5.0,
    cwd: str | None = None,
    ends_with_input: bool = False,
    user: tuple[int, int] | None = None,
) -> AsyncIterator[Child]:
    """Start a program; leaving the context closes its standard input, asks it to end, and kills it after ``grace`` seconds.

    The context is left when it has ended, however often its owner is cancelled meanwhile.

    Args:
        argv: The program (a path, or a name to look up) and its arguments.
        env: The whole environment of the child; None hands on our own.
        stdin: ``PIPE``, ``DEVNULL`` or a file descriptor; likewise ``stdout`` and ``stderr`` (there also ``STDOUT``).
        stdout: See ``stdin``.
        stderr: See ``stdin``.
        grace: Seconds between SIGTERM and SIGKILL.
        cwd: Its working directory.
        ends_with_input: Whether the program ends at the end of its standard input whatever it does, and has a umask of its own:
            with a pipe for that it needs nobody who ends it with us, and starts in less time.
        user: The numbers of the user and group as whom it runs, with no further groups, no capabilities, and no way to more
            rights by a file's mode; None: as ourselves.

    Raises:
        UnavailableError: There is no such program, or the system can't start one.
    """
    guarded = user is not None or not (ends_with_input and stdin == PIPE)
    command = _command(argv, guarded=guarded, user=user)
    loop = asyncio.get_running_loop()

    async def starting() -> Child:
        transport, streams = await loop.subprocess_exec(
            lambda: _Streams(loop),
            *command,
            env=None if env is None else dict(env),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            cwd=cwd,
            # A terminal's Ctrl-C reaches its whole process group; children end by our word, in our order. What ends with its
            # input stays with the terminal: it may be an ssh that asks for a password there.
            start_new_session=guarded,
        )
        return Child(tuple(argv), asyncio.subprocess.Process(transport, streams, loop), streams.ended)

    started = asyncio.create_task(starting())
    try:
        # (uvloop gives up a start that is cancelled without waiting for what it has begun)
        child = await uncut.outcome(started)
    except OSError as error:
        raise unstartable(os.path.basename(argv[0]), error) from error
    except asyncio.CancelledError:
        if not started.cancelled() and started.exception() is None:
            await _end(started.result(), grace)
        raise
    try:
        yield child
    finally:
        await _end(child, grace)


async def _end(child: Child, grace: float) -> None:
    """A cancelled owner must still not leave the child behind."""
    if child.stdin is not None:
        child.stdin.close()
    try:
        await uncut.to_its_end(child.stop(grace))
    finally:
        child.close()


async def run(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    stdin: bytes = b"",
    timeout: float | None = None,
    cwd: str | None = None,
) -> Completed:
    """Run a program to its end and keep what it printed. Whoever it has left behind is not waited for.

    Raises:
        UnavailableError: There is no such program.
        CommandFailedError: It didn't end within ``timeout`` seconds (it is killed then).
    """
    # No pipe for nothing: uvloop refuses to write to one whose program has ended before.
    source = PIPE if stdin else DEVNULL
    async with start(argv, env=env, stdin=source, stdout=PIPE, stderr=PIPE, cwd=cwd, grace=1.0) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        out, err = bytearray(), bytearray()
        talk = [_take(child.stdout, out), _take(child.stderr, err)]
        if child.stdin is not None:
            talk.append(_give(child.stdin, stdin))
        talking = [asyncio.create_task(each, name=f"output of {argv[0]}") for each in talk]
        try:
            async with asyncio.timeout(timeout):
                returncode = await child.wait()
            await asyncio.wait(talking, timeout=_LAST_WORDS)
        except TimeoutError as error:
            message = f"{os.path.basename(argv[0])} did not end within {timeout:g} s"
            raise errors.CommandFailedError(
                message, returncode=-signal.SIGKILL, hint=words.shown_command(argv)
            ) from error
        finally:
            for task in talking:
                task.cancel()
            await asyncio.gather(*talking, return_exceptions=True)
        return Completed(tuple(argv), returncode, bytes(out), bytes(err))


async def _take(stream: asyncio.StreamReader, into: bytearray) -> None:
    """Read a pipe to its end."""
    while chunk := await stream.read(_CHUNK):
        into += chunk


async def _give(stream: asyncio.StreamWriter, data: bytes) -> None:
    """Write to a pipe; whoever has ended before it has read all has no use for the rest."""
    try:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            stream.write(data)
            await stream.drain()
    except asyncio.CancelledError:
        # Else the pipe would stay open until all is read, which nobody may ever do.
        stream.transport.abort()
        raise
    stream.close()
