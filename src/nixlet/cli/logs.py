"""``nixlet logs``: a container's output, read from its log."""

from nixlet.cli import grammar, options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nixlet import errors
    from nixlet.cli import link


@grammar.verb(
    options.STATE_DIR,
    grammar.Flag("--follow", "-f", text="Go on until the container ends."),
    grammar.Flag("--timestamps", "-t", text="Print when each line was written."),
    grammar.Value("--tail", "-n", default="all", metavar="LINES", text="Only so many of the last lines."),
    grammar.Value("--since", metavar="WHEN", text="Only from then on: RFC 3339, or 10m for ten minutes ago."),
    grammar.Argument("container", completes="containers"),
)
def logs(container: str, state_dir: str, tail: str, since: str | None, *, follow: bool, timestamps: bool) -> None:
    """Print a container's output."""
    import contextlib
    import datetime
    import os

    from nixlet.cli import link, streams
    from nixlet.containers import logrecords
    from nixlet.containers import logs as logfiles

    lines = logrecords.parse_tail(tail)
    earliest = logrecords.parse_since(since, datetime.datetime.now(datetime.UTC)) if since else None
    printer = logrecords.Printer(timestamps=timestamps, since=earliest)
    with link.connected(state_dir) as node, contextlib.ExitStack() as stack:
        node.send("OpenLog", {"container": container, "follow": follow}, more=True)
        name = node.receive()[0]["name"]
        directory = node.descriptor()
        stack.callback(os.close, directory)
        log, end = logfiles.Log(directory, name), _End(node)
        pieces = logfiles.follow(log, end.has_come, lines=lines) if follow else logfiles.there(log, lines=lines)
        for piece in pieces:
            if isinstance(piece, float):
                end.wait(piece)
            else:
                for stream, text in printer.printed(piece):
                    streams.write(stream, text)
        end.check()


class _End:
    """The end of a container, as the last reply tells it."""

    def __init__(self, node: "link.Node") -> None:
        self._node = node
        self._come = False
        self._failure: errors.NixletError | None = None

    def has_come(self) -> bool:
        """Whether the container has ended, or nobody will tell any more."""
        self.wait(0)
        return self._come

    def wait(self, seconds: float) -> None:
        """Wait for it for a while."""
        import select

        from nixlet import errors

        if self._come or not select.select([self._node], [], [], seconds)[0]:
            return
        try:
            self._come = self._node.ready()
        except errors.UnavailableError as error:
            # What there is by now is printed first.
            self._come, self._failure = True, error

    def check(self) -> None:
        """Check that the container's end was what ended it.

        Raises:
            NixletError: The node went away, or says so.
        """
        if self._failure is not None:
            raise self._failure
        self._node.receive()
