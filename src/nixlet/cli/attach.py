"""``nixlet attach``: a container that runs already gets our terminal, input and signals."""

from nixlet.cli import grammar, options


@grammar.verb(options.STATE_DIR, grammar.Argument("container", completes="containers"))
def attach(container: str, state_dir: str) -> int:
    """Hand our terminal, input and signals to a running CONTAINER until it ends; its exit status is ours.

    What it has written by now is for nixlet logs. Ctrl-P Ctrl-Q leaves the container alone, as does the end of our terminal.
    """
    from nixlet.cli import ends, link, session

    columns, rows = session.size()
    with (
        link.connected(state_dir) as node,
        link.connected(state_dir) as control,
        ends.Ends(stdin=True) as ours,
        session.Signals() as signals,
    ):
        process = session.Session(node, control, ours, detachable=True, hang_up_detaches=True)
        wanted = {"container": container, "streams": ours.streams, "columns": columns, "rows": rows}
        node.send("Attach", wanted, ours.descriptors, more=True)
        ours.handed_over()
        started = process.reply(signals)[0]["started"]
        tty = started["tty"]
        if tty:
            session.check_terminal(stdin=started["interactive"])
        if not started["interactive"]:
            ours.without_input()
        return process.front(signals, started["session"], tty=tty)
