"""Calls that the node takes its time for: what it pulls meanwhile is shown, and Ctrl-C and the like withdraw what isn't done yet."""

import os

from nixlet import errors
from nixlet.cli import ends, progress, session, streams

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Iterator
    from typing import Any, Self

    from nixlet.cli import link
else:
    # As in ``session``.
    import _signal as signal


class Call(session.Session):
    """A call, before and while what it asks for is in front of us.

    Attributes:
        ticket: By which the node knows the call: a parameter of it.
    """

    def __init__(self, node: "link.Node", control: "link.Node", ours: ends.Ends, *, held: bool = True) -> None:
        """A call that will be sent.

        Args:
            node: The connection that it will be sent over.
            control: Another one.
            ours: Our ends of the streams that will be handed over with it.
            held: Nothing is shown or read before there is one process in front: its terminal shows nothing before ours hands on
                what is typed in answer to it, and what can't be shown ends the process.
        """
        super().__init__(node, control, ours, detachable=True)
        self.ticket = os.urandom(16).hex()
        self._held = held
        self._withdrawn = False
        self._withdrawn_by = 0
        #: What is shown, and of which image.
        self._shown: progress.Shown | None = None
        self._pulled = ""

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_telling()

    def replies(self, signals: session.Signals) -> "Iterator[dict[str, Any]]":
        """The replies as they come, besides those of progress, until the last one; signals withdraw the call meanwhile.

        Raises:
            Exit: It was withdrawn, and what it had begun is undone.
            UnavailableError: The node went away.
            NixletError: What the node says.
        """
        goes_on = True
        while goes_on:
            try:
                reply, goes_on = self.reply(signals)
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
        """As in front of any process: from now on the signals are for it."""
        try:
            return super().front(signals, name, tty=tty)
        except errors.CallCancelledError:
            if not self._withdrawn_by:
                raise
            return 128 + self._withdrawn_by

    def _forward(self, numbers: list[int]) -> None:
        for number in numbers:
            if self._name or number == signal.SIGWINCH:
                super()._forward([number])
            elif self._withdrawn_by:
                # Somebody is in a hurry: the node goes on with the undoing.
                raise streams.Exit(128 + number)
            else:
                self._withdrawn_by = number
                self.withdraw(number)

    def _serve(self, signals: session.Signals) -> int:
        try:
            return super()._serve(signals)
        except (ends.Gone, errors.NixletError):
            # What nobody can have any more ends, as a program would at the end of a pipe.
            if not self._over:
                self.end(signals)
            raise

    def end(self, signals: session.Signals) -> None:
        """Withdraw it, without its output, and wait until that is done, or somebody is in a hurry.

        Raises:
            Exit: Somebody is.
        """
        self._stop_reading()
        while self._ours.outputs:
            self._ours.outputs.pop().close()
        # No signal is for the process any more.
        self._name = ""
        try:
            self.withdraw()
            goes_on = True
            while goes_on:
                _, goes_on = self.reply(signals)
        except errors.NixletError:
            # It is undone, or can't be.
            pass

    def withdraw(self, number: int | None = None) -> None:
        """Have what was asked for undone, or ended; the answer tells when that is done.

        Args:
            number: The signal that it is withdrawn by. A process that has started gets that, and goes on with it.
        """
        if not self._withdrawn:
            self._withdrawn = number is None
            self._ask("Withdraw", {"ticket": self.ticket, "signal": number})

    def _tell(self, step: "dict[str, Any]") -> None:
        image = step["image"]
        if self._shown is None or self._pulled != image:
            self._stop_telling()
            # Images of several registries may have one title.
            self._shown, self._pulled = progress.Shown(f"pulling {image.rpartition('/')[2]}"), image
        self._shown.tell(step)

    def _stop_telling(self) -> None:
        if self._shown is not None:
            self._shown.close()
            self._shown = None
