"""A process in front of a person: our streams are its streams, our signals and our terminal's size go to it, until it ends."""

import os
import select
import sys
import time

from nixlet import errors
from nixlet.cli import ends, link, streams

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
    from typing import Any, Self
else:
    # As in ``varlink.client``: signal without the numbers' own names.
    import _signal as signal

#: Ctrl-P Ctrl-Q.
_DETACH = b"\x10\x11"

#: What ends, interrupts or concerns a program.
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)

#: Those that whoever sends them wants an end by.
_ENDING = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT})

#: Seconds in which a signal has an effect where all is well: who sends another one later has waited for it.
_MOMENT = 1.0

#: Calls without an answer that a connection always has room for.
_MOST = 16


def check_terminal(*, stdin: bool) -> None:
    """Make sure that there is a terminal to hand on.

    Raises:
        UsageError: There is none.
    """
    if stdin and not os.isatty(0):
        raise errors.UsageError("--tty needs a terminal, and standard input is none", hint="leave out -t")


def size() -> tuple[int, int]:
    """Our terminal's columns and rows; zeros without one."""
    for fd in (1, 0, 2):
        if os.isatty(fd):
            found = os.get_terminal_size(fd)
            return found.columns, found.lines
    return 0, 0


class Hurry:
    """Whether somebody who wants an end has waited for it."""

    def __init__(self) -> None:
        self._since: float | None = None

    def asks(self) -> bool:
        """They ask for it; whether they did more than a moment ago as well, and nothing has come of it."""
        now = time.monotonic()
        if self._since is None:
            self._since = now
        return now - self._since > _MOMENT

    def is_heeded(self) -> None:
        """Something has come of it."""
        self._since = None


class Signals:
    """The signals that we get, kept for whoever they are for, for the time of the context.

    They do nothing else meanwhile, besides this: where they aren't taken for a moment, since a call waits for somebody who stands
    still, the next one that asks for an end ends the verb in the middle of that call (``streams.Exit``).
    """

    def __init__(self) -> None:
        self.pending: list[int] = []
        self._hurry = Hurry()
        self._before: dict[int, Any] = {}
        self._reader = self._writer = -1

    def fileno(self) -> int:
        """For waiting until one comes."""
        return self._reader

    def __enter__(self) -> "Self":
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for number in (*_FORWARDED, signal.SIGWINCH):
            self._before[number] = signal.signal(number, self._keep)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._reader)
        os.close(self._writer)

    def _keep(self, number: int, _: object) -> None:
        if number in _ENDING and self._hurry.asks():
            raise streams.Exit(128 + number)
        self.pending.append(number)

    def take(self) -> list[int]:
        """Those that came since."""
        try:
            os.read(self._reader, 1 << 10)
        except BlockingIOError:
            pass
        self._hurry.is_heeded()
        taken, self.pending = self.pending, []
        return taken


class Raw:
    """Our terminal hands every key on as it is, for the time of the context; nothing for what is no terminal, or -1."""

    def __init__(self, fd: int = 0) -> None:
        self._fd = fd
        self._before: list[Any] | None = None

    def __enter__(self) -> "Self":
        if os.isatty(self._fd):
            import termios
            import tty

            self._before = termios.tcgetattr(self._fd)
            # What was typed before stays.
            tty.setraw(self._fd, termios.TCSADRAIN)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            import termios

            try:
                termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)
            except termios.error:
                # It is gone.
                pass


class Keys:
    """What a person types, until they leave by Ctrl-P Ctrl-Q, as with other container tools.

    Attributes:
        detached: They have.
    """

    def __init__(self) -> None:
        self.detached = False
        self._held = b""

    def typed(self, keys: bytes) -> bytes:
        """What of it is for the process, now. The first of the two keys alone may be the beginning of both."""
        data = self._held + keys
        before, found, _ = data.partition(_DETACH)
        self.detached = bool(found)
        self._held = b"" if found or not data.endswith(_DETACH[:1]) else _DETACH[:1]
        return before if found else data.removesuffix(self._held)


class Session:
    """A process that the node is asked to put in front of us, and then has.

    Attributes:
        detached: We have left it; it goes on.
    """

    def __init__(
        self,
        node: "link.Node",
        control: "link.Node",
        ours: ends.Ends,
        *,
        detachable: bool = False,
        hang_up_detaches: bool = False,
    ) -> None:
        """A process that will be asked for.

        Args:
            node: The connection that the call is sent over, whose replies tell of its start and its end.
            control: Another one, for signals and sizes.
            ours: Our ends of its streams.
            detachable: Ctrl-P Ctrl-Q leaves it alone, if it has a terminal.
            hang_up_detaches: So does the end of our terminal; otherwise it is told.
        """
        self._node = node
        self._control = control
        self._ours = ours
        #: The session's, as soon as there is one.
        self._name = ""
        self._tty = False
        self._keys = Keys() if detachable else None
        self._hang_up_detaches = hang_up_detaches
        #: Signals that are to be handed on to the process, and SIGWINCH for a size.
        self._due: dict[int, None] = {}
        #: What the control connection owes an answer to: the numbers of these, and zeros for the rest.
        self._asked: list[int] = []
        self._hurry = Hurry()
        self._reading = ours.input is not None
        #: Whether nothing is to be shown or read yet.
        self._held = True
        self._patient = True
        #: Whether the last reply has come.
        self._over = False
        self.detached = False

    def reply(self, signals: Signals) -> "tuple[dict[str, Any], bool]":
        """The next reply to the call, and whether more will follow.

        Raises:
            Exit: It isn't waited for any more.
            UnavailableError: The node went away.
            NixletError: What the node says.
        """
        while not self._node.has_reply():
            if not self._wait(signals, ended=False, timeout=link.PATIENCE if self._patient else None):
                self._patient = False
                self._node.tell_who_is_silent()
        return self._node.receive()

    def front(self, signals: Signals, name: str, *, tty: bool) -> int:
        """Be in front of the process that the node has started until it has ended or we are detached; its exit status, or 0.

        Args:
            signals: What we get.
            name: The session's name.
            tty: The process has a terminal.

        Raises:
            Exit: Somebody wants us to end, and the node doesn't take that for the process.
            UnavailableError: The node went away.
            NixletError: What the node says.
        """
        self._name, self._tty, self._held = name, tty, False
        # What came before it had started.
        if not tty:
            self._due.pop(signal.SIGWINCH, None)
        self._hand_on()
        try:
            with Raw(0 if self._tty and self._ours.input is not None else -1):
                return self._serve(signals)
        except ends.Gone as gone:
            return streams.TERMINAL_GONE if gone.terminal else streams.READER_GONE

    def _serve(self, signals: Signals) -> int:
        code: int | None = None
        while code is None or self._ours.outputs:
            if self._node.has_reply():
                self._over = True
                code = self._end(self._node.receive()[0])
                continue
            self._wait(signals, ended=code is not None)
            if self.detached:
                return 0
        return code

    def _end(self, reply: "dict[str, Any]") -> int:
        # The pipes of ours have an end now, which is where the rest of the output ends.
        if reply.get("reader_gone"):
            raise ends.Gone(terminal=False)
        self._stop_reading()
        return int(reply["ended"]["exit_code"])

    def _wait(self, signals: Signals, *, ended: bool, timeout: float | None = None) -> bool:
        """Wait until there is something to be done, and do it; False when that takes longer than ``timeout`` seconds."""

        def output_shown(output: ends.Output) -> "Callable[[], None]":
            return lambda: self._show(output)

        poll = select.poll()
        watched: dict[int, Callable[[], object]] = {}

        def watch(fd: int, events: int, handle: "Callable[[], object]") -> None:
            watched[fd] = handle
            poll.register(fd, events)

        watch(signals.fileno(), select.POLLIN, lambda: self._forward(signals.take()))
        if not ended:
            watch(self._node.fileno(), select.POLLIN, self._node.ready)
        if self._asked:
            watch(self._control.fileno(), select.POLLIN, self._answered)
        for output in () if self._held else self._ours.outputs:
            if output.waits:
                watch(output.writing, select.POLLOUT, output.write)
            else:
                watch(output.pipe, select.POLLIN, output_shown(output))
        ours = self._ours.input
        if ours is not None and ours.pipe >= 0 and not self._held:
            if ours.waits:
                watch(ours.pipe, select.POLLOUT, self._give)
            elif self._reading:
                watch(ours.reading, select.POLLIN, self._read)
        happened = poll.poll(None if timeout is None else timeout * 1000)
        for fd, _ in happened:
            watched[fd]()
        return bool(happened)

    def _show(self, output: ends.Output) -> None:
        if output.read():
            output.write()
        else:
            output.close()
            self._ours.outputs.remove(output)

    def _give(self) -> None:
        assert self._ours.input is not None
        if not self._ours.input.write():
            self._stop_reading()
        elif not self._reading and not self._ours.input.waits:
            self._ours.input.close()

    def _read(self) -> None:
        ours = self._ours.input
        assert ours is not None
        data = ours.read()
        if data is None:
            return
        if not data:
            self._reading = False
        if self._tty and self._keys is not None:
            data = self._keys.typed(data)
            self.detached = self._keys.detached
        if data:
            ours.give(data)
        self._give()

    def _stop_reading(self) -> None:
        self._reading = False
        if self._ours.input is not None:
            self._ours.input.close()

    def _forward(self, numbers: list[int]) -> None:
        for number in numbers:
            if number == signal.SIGWINCH:
                if (self._tty or not self._name) and not self._over:
                    self._hand_on(number)
            elif self._over:
                # There is nobody else for it: whoever reads the rest of the output takes too long.
                raise streams.Exit(128 + number)
            elif number == signal.SIGHUP and self._hang_up_detaches:
                if not self._name:
                    raise streams.Exit(streams.TERMINAL_GONE)
                self.detached = True
            elif number in _ENDING and self._hurry.asks():
                print(f"{self._node.peer} does not answer; what runs there is left alone", file=sys.stderr)
                raise streams.Exit(128 + number)
            else:
                self._hand_on(number)

    def _hand_on(self, *numbers: int) -> None:
        """Hand signals and sizes on to the process, as soon as it has started and few calls are without an answer."""
        self._due.update(dict.fromkeys(numbers))
        for number in list(self._due):
            # Of many sizes the last one counts.
            waits = number == signal.SIGWINCH and number in self._asked
            if not self._name or waits or len(self._asked) >= _MOST:
                continue
            del self._due[number]
            if number == signal.SIGWINCH:
                columns, rows = size()
                self._ask("Resize", {"session": self._name, "columns": columns, "rows": rows}, number)
            else:
                self._ask("Signal", {"session": self._name, "signal": int(number)}, number)

    def _ask(self, method: str, parameters: "dict[str, Any]", number: int = 0) -> None:
        self._control.send(method, parameters)
        self._asked.append(number)

    def _answered(self) -> None:
        self._control.ready()
        while self._control.has_reply():
            number = self._asked.pop(0)
            if number in _FORWARDED:
                self._hurry.is_heeded()
            try:
                self._control.receive()
            except errors.NotFoundError:
                # It has ended, and the node waits for whoever reads its output.
                if number in _FORWARDED:
                    raise streams.Exit(128 + number) from None
            except errors.NixletError as error:
                print(f"a signal is not handed on: {error}", file=sys.stderr)
        self._hand_on()
