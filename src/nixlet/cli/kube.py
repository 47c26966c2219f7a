"""``nixlet kube``: pods from Kubernetes manifests."""

import sys

from nixlet.cli import grammar, options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from nixlet.cli import calls, session


def _read(file: str) -> "dict[str, Any]":
    """A manifest as the node takes it, and what it is called."""
    import binascii

    from nixlet import errors

    try:
        if file == "-":
            data = sys.stdin.buffer.read()
        else:
            with open(file, "rb") as stream:
                data = stream.read()
    except OSError as error:
        raise errors.UsageError(f"the manifest {file} can't be read: {error.strerror}") from error
    source = "standard input" if file == "-" else file
    return {"manifest": binascii.b2a_base64(data, newline=False).decode(), "source": source}


@grammar.verb(
    options.STATE_DIR,
    options.OUTPUT,
    grammar.Flag("--replace", text="Remove pods of the same names first."),
    grammar.Flag("--wait", "-w", text="Print the containers' output, wait for their end, remove the pods."),
    grammar.Flag("--summary", text="With --wait: say what it took."),
    grammar.Argument("file"),
)
def play(file: str, state_dir: str, output: str, *, replace: bool, wait: bool, summary: bool) -> int:
    """Run the pods of a manifest FILE (- for standard input), each once.

    With --wait the exit status is that of the first container that fails.
    """
    from nixlet.cli import calls, ends, link, session

    wanted = _read(file)
    played: list[dict[str, Any]] = []
    try:
        with (
            link.connected(state_dir) as node,
            link.connected(state_dir) as control,
            ends.Ends(stdin=False, stdout=wait, stderr=wait) as ours,
            session.Signals() as signals,
            calls.Call(node, control, ours, held=False) as call,
        ):
            wanted |= {"ticket": call.ticket, "replace": replace, "wait": wait, "streams": ours.streams}
            node.send("PlayManifest", {**wanted, "summary": summary}, ours.descriptors, more=True)
            ours.handed_over()
            if wait:
                return _run_to_their_end(call, signals)
            for reply in call.replies(signals):
                _notice(reply)
                if (started := reply.get("started")) is not None:
                    played.append(started)
                    if output != "json":
                        print(f"pod/{started['name']}")
    finally:
        # Those that run are told also when a later one doesn't.
        if output == "json":
            options.print_json(played)
    return 0


def _notice(reply: "dict[str, Any]") -> None:
    for notice in reply.get("notices", ()):
        print(f"notice: {notice}", file=sys.stderr)


def _run_to_their_end(call: "calls.Call", signals: "session.Signals") -> int:
    from nixlet.cli import ends, streams

    status = 0
    try:
        for reply in call.replies(signals):
            _notice(reply)
            if reply.get("reader_gone"):
                return streams.READER_GONE
            if (ended := reply.get("ended")) is not None:
                status = ended["exit_code"] or status
                if (summary := ended.get("summary")) is not None:
                    call.show_output(signals)
                    _summarise(**summary)
        call.show_output(signals, until_its_end=True)
    except ends.Gone as gone:
        call.end(signals)
        return streams.TERMINAL_GONE if gone.terminal else streams.READER_GONE
    return status


def _summarise(containers: "list[dict[str, Any]]", output_after_ms: int | None) -> None:
    from nixlet.cli import sizes

    print()
    for container in containers:
        print(f"container {container['name']}")
        if "pull_ms" in container:
            print(f"  paths in the closure      {container['closure_paths']}")
            print(f"  bytes fetched             {sizes.decimal(container['fetched_bytes'])}")
            print(f"  image ready after         {container['pull_ms']} ms")
        print(f"  mounts per container      {container['mounts']}")
    if output_after_ms is not None:
        print(f"  from start to output      {output_after_ms} ms (pull included)")


@grammar.verb(
    options.STATE_DIR,
    grammar.Flag("--ignore-missing", text="It is no error when a pod isn't there."),
    grammar.Argument("file"),
)
def down(file: str, state_dir: str, *, ignore_missing: bool) -> None:
    """Remove the pods of a manifest FILE (- for standard input)."""
    from nixlet.cli import link

    wanted = {**_read(file), "ignore_missing": ignore_missing}
    with link.connected(state_dir) as node:
        node.send("DownManifest", wanted, more=True)
        goes_on = True
        while goes_on:
            reply, goes_on = node.receive()
            if (removed := reply.get("removed")) is not None:
                print(f"pod/{removed} removed")


kube = grammar.Group("Run pods from Kubernetes manifests.", {"play": play, "down": down})
