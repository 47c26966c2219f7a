"""The person's terminal: raw for the time that a container has it, its size, its input; and signals that are for the container."""

import asyncio
import contextlib
import os
import signal
import sys
import termios
import tty
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

from nixlet import errors
from nixlet.cli import streams
from nixlet.containerd import tasks
from nixlet.host import procfs

_CHUNK = 1 << 15

#: Ctrl-P Ctrl-Q.
_DETACH = b"\x10\x11"

#: A container that goes on after it was asked so often to end is killed.
_PATIENCE = 3

#: What ends, interrupts or concerns a program; window sizes go another way.
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


class Input:
    """What a file descriptor gives, until it ends. An interrupted wait loses nothing."""

    def __init__(self, fd: int = 0) -> None:
        self._fd = fd

    def __aiter__(self) -> "Input":
        return self

    async def __anext__(self) -> bytes:
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        try:
            loop.add_reader(self._fd, ready.set)
        except PermissionError:
            # Plain files can't be waited for: they are always ready (epoll_ctl(2), EPERM).
            pass
        except (OSError, ValueError):
            raise StopAsyncIteration from None
        else:
            try:
                await ready.wait()
            finally:
                loop.remove_reader(self._fd)
        try:
            data = os.read(self._fd, _CHUNK)
        except OSError:
            # A terminal that is gone is at its end.
            data = b""
        if not data:
            raise StopAsyncIteration
        return data


async def until_detached(keys: AsyncIterator[bytes], detach: Callable[[], None]) -> AsyncIterator[bytes]:
    """What a person types, until they detach by Ctrl-P Ctrl-Q, as with other container tools.

    Args:
        keys: What they type.
        detach: Called when they do.
    """
    held = b""
    async for piece in keys:
        data = held + piece
        before, found, _ = data.partition(_DETACH)
        # The first key alone may be the beginning of both.
        held = b"" if found or not data.endswith(_DETACH[:1]) else _DETACH[:1]
        typed = before if found else data.removesuffix(held)
        if typed:
            yield typed
        if found:
            detach()
            return


async def written(stream: str, data: bytes) -> None:
    """``streams.write`` in a thread: a stream of ours that nobody reads must not keep signals from being handed on."""
    await asyncio.to_thread(streams.write, stream, data)


def check(*, stdin: bool) -> None:
    """Make sure that there is a terminal to hand on.

    Raises:
        UsageError: There is none.
    """
    if stdin and not os.isatty(0):
        raise errors.UsageError("--tty needs a terminal, and standard input is none", hint="leave out -t")


@contextlib.contextmanager
def raw(fd: int = 0) -> Iterator[None]:
    """Hand every key on as it is; the terminal is afterwards as it was, whatever happens. Nothing for what is no terminal."""
    if not os.isatty(fd):
        yield
        return
    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


@contextlib.contextmanager
def sized(tell: Callable[[int, int], Awaitable[None]]) -> Iterator[None]:
    """Tell the terminal's size (columns, rows), now and when it changes; nothing without a terminal."""
    fd = next((each for each in (1, 0, 2) if os.isatty(each)), None)
    if fd is None:
        yield
        return
    loop = asyncio.get_running_loop()
    telling: set[asyncio.Task[None]] = set()

    async def say() -> None:
        size = os.get_terminal_size(fd)
        # A container that has ended has no size.
        with contextlib.suppress(errors.NixletError):
            await tell(size.columns, size.lines)

    def start() -> None:
        task = loop.create_task(say(), name="window size")
        telling.add(task)
        task.add_done_callback(telling.discard)

    loop.add_signal_handler(signal.SIGWINCH, start)
    try:
        start()
        yield
    finally:
        loop.remove_signal_handler(signal.SIGWINCH)


@contextlib.contextmanager
def signals_forwarded(
    deliver: Callable[[int], Awaitable[None]], hung_up: Callable[[], None] | None = None
) -> Iterator[None]:
    """Hand the signals that we get on to the container, for the time of the context; they do nothing else meanwhile.

    Args:
        deliver: Hands one on.
        hung_up: Called in place of that when our terminal is gone (SIGHUP).
    """
    loop = asyncio.get_running_loop()
    delivering: set[asyncio.Task[None]] = set()

    async def forward(number: int) -> None:
        try:
            await deliver(number)
        except errors.NotFoundError:
            pass
        except errors.NixletError as error:
            print(f"signal {number} is not handed on: {error}", file=sys.stderr)

    def start(number: int) -> None:
        task = loop.create_task(forward(number), name=f"signal {number}")
        delivering.add(task)
        task.add_done_callback(delivering.discard)

    for number in _FORWARDED:
        loop.add_signal_handler(number, start, number)
    if hung_up is not None:
        loop.add_signal_handler(signal.SIGHUP, hung_up)
    try:
        yield
    finally:
        for number in _FORWARDED:
            loop.remove_signal_handler(number)


class Signals:
    """Hands signals on to a container's first process, and remembers what that ended of."""

    def __init__(self, service: tasks.Tasks, container: str) -> None:
        self._tasks = service
        self._container = container
        self._asked = 0
        self._ended_by = 0

    async def deliver(self, number: int) -> None:
        """Hand a signal on."""
        pid = await self._tasks.pid(self._container)
        self._asked += number in {signal.SIGINT, signal.SIGTERM}
        # The first process of a namespace gets only signals that it asked for (pid_namespaces(7)): Ctrl-C would do nothing
        # to most programs. What it doesn't ask for has the effect here that it has elsewhere: it ends.
        if self._asked < _PATIENCE and procfs.heeds_signal(pid, number):
            await self._tasks.kill(self._container, number)
        else:
            self._ended_by = self._ended_by or number
            await self._tasks.kill(self._container, signal.SIGKILL)

    async def resize(self, columns: int, rows: int) -> None:
        """Tell the terminal's size."""
        await self._tasks.resize(self._container, columns, rows)

    def exit_code(self, code: int) -> int:
        """The exit status for a container that ended with another: that of the signal that ended it, if one of ours did."""
        return 128 + self._ended_by if self._ended_by else code


@contextlib.contextmanager
def given_to(
    resize: Callable[[int, int], Awaitable[None]],
    deliver: Callable[[int], Awaitable[None]],
    *,
    tty: bool,
    stdin: bool,
    hung_up: Callable[[], None] | None = None,
) -> Iterator[None]:
    """Give the person's terminal and signals to a process, for the time of the context.

    Args:
        resize: Tells it the terminal's size.
        deliver: Sends it a signal.
        tty: It has a terminal.
        stdin: It gets our input.
        hung_up: Called when our terminal is gone; without it the process is told so.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(signals_forwarded(deliver, hung_up))
        if tty:
            stack.enter_context(sized(resize))
            if stdin:
                stack.enter_context(raw())
        yield


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end what is going on as Ctrl-C does, with all that was made taken away again; exit status 143."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    asked = asyncio.Event()

    def end() -> None:
        asked.set()
        task.cancel()

    loop.add_signal_handler(signal.SIGTERM, end)
    try:
        yield
    except asyncio.CancelledError:
        if asked.is_set():
            raise streams.Exit(128 + signal.SIGTERM) from None
        raise
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
