"""Calls that the node takes its time for: what it pulls meanwhile is shown, and Ctrl-C and the like withdraw what isn't done yet."""

import contextlib
import os
import signal

from nixlet import errors
from nixlet.cli import ends, session, streams

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, Self

    from nixlet.cli import link

#: Seconds without a sign of the node after which a person is told who is waited for.
_PATIENCE = 3.0


class Call(session.Session):
    """A call, before and while what it asks for is in front of us.

    Attributes:
        ticket: By which the node knows the call: a parameter of it.
    """

    def __init__(self, node: "link.Node", control: "link.Node", ours: ends.Ends, *, tty: bool = False) -> None:
        """A call that will be sent.

        Args:
            node: The connection that it will be sent over.
            control: Another one.
            ours: Our ends of the streams that will be handed over with it.
            tty: What it asks for has a terminal, which shows nothing before ours hands on what is typed in answer to it.
        """
        super().__init__(node, control, ours, "", tty=False, detachable=True)
        self.ticket = os.urandom(16).hex()
        self._held = tty
        self._withdrawn_by = 0
        self._patient = True
        self._shown = contextlib.ExitStack()
        self._sinks: dict[str, Any] = {}

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *_: object) -> None:
        self._shown.close()

    def replies(self, signals: session.Signals) -> "Iterator[dict[str, Any]]":
        """The replies as they come, besides those of progress, until the last one; signals withdraw the call meanwhile.

        Raises:
            Exit: It was withdrawn, and what it had begun is undone.
            UnavailableError: The node went away.
            NixletError: What the node says.
        """
        goes_on = True
        while goes_on:
            while not self._node.has_reply():
                if not self._wait(signals, ended=False, timeout=_PATIENCE if self._patient else None):
                    self._patient = False
                    self._node.tell_who_is_silent()
            try:
                reply, goes_on = self._node.receive()
            except errors.NixletError:
                if self._withdrawn_by:
                    raise streams.Exit(128 + self._withdrawn_by) from None
                raise
            if step := reply.get("progress"):
                self._tell(step)
            else:
                self._stop_telling()
                yield reply

    def show_output(self, signals: session.Signals, *, until_its_end: bool = False) -> None:
        """Show the output that has come by now, or all that will come.

        Raises:
            Gone: Nobody reads it any more.
        """
        while self._ours.outputs:
            waits = until_its_end or any(output.waits for output in self._ours.outputs)
            if not self._wait(signals, ended=True, timeout=None if waits else 0):
                return

    def front(self, signals: session.Signals, name: str, *, tty: bool) -> int:
        """Be in front of the process that the node has started until it has ended; its exit status.

        Args:
            signals: What we get; from now on it is for the process.
            name: The session's name.
            tty: The process has a terminal.
        """
        self._name, self._tty, self._held = name, tty, False
        try:
            return self.serve(signals)
        except errors.CallCancelledError:
            if not self._withdrawn_by:
                raise
            return 128 + self._withdrawn_by

    def _forward(self, numbers: list[int]) -> None:
        if self._name:
            super()._forward(numbers)
            return
        for number in numbers:
            if number == signal.SIGWINCH:
                continue
            if self._withdrawn_by:
                # Somebody is in a hurry: the node goes on with the undoing.
                raise streams.Exit(128 + number)
            self._withdrawn_by = number
            self.withdraw()

    def _serve(self, signals: session.Signals) -> int:
        try:
            return super()._serve(signals)
        except (ends.Gone, errors.NixletError):
            # What nobody can have any more ends, as a program would at the end of a pipe.
            if not self._over:
                self.end(signals)
            raise

    def end(self, signals: session.Signals) -> None:
        """Withdraw it, without its output, and wait until that is done."""
        self._stop_reading()
        while self._ours.outputs:
            self._ours.outputs.pop().close()
        with contextlib.suppress(errors.NixletError):
            self.withdraw()
            goes_on = True
            while goes_on:
                while not self._node.has_reply():
                    self._wait(signals, ended=False)
                _, goes_on = self._node.receive()

    def withdraw(self) -> None:
        """Have what was asked for undone, or ended; the answer tells when that is done."""
        self._control.send("Withdraw", {"ticket": self.ticket})
        self._asked.append(0)

    def _tell(self, step: "dict[str, Any]") -> None:
        from nixlet.cli import progress

        image = step["image"]
        if image not in self._sinks:
            self._stop_telling()
            self._sinks[image] = self._shown.enter_context(progress.shown(f"pulling {image.rpartition('/')[2]}"))
        if "stage" in step:
            self._sinks[image](progress.step(step))

    def _stop_telling(self) -> None:
        self._shown.close()
        self._sinks.clear()
