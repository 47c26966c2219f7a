"""Our ends of streams: what the node gets, and what goes through pipes of ours; in a process of its own, whose streams they are."""

import json
import os
import pty
import socket
import subprocess
import sys
import tty
from pathlib import Path

import pytest

from nixlet.cli import ends
from support import pipes

#: Says what would be handed over, at the last descriptor.
SCRIPT = """
import json, os, sys
from nixlet.cli import ends
with ends.Ends(stdin={stdin}, stderr={stderr}) as ours:
    said = [ours.streams, ours.descriptors, [output.writing for output in ours.outputs], ours.input is not None]
os.write({fd}, json.dumps(said).encode())
"""


def handed(
    stdout: int, stderr: int, *, stdin: bool = False, with_stderr: bool = True
) -> tuple[dict[str, int], list[int], int]:
    """What a process hands over that has these streams: indices, descriptors, and how many outputs are its own to write."""
    with pipes.pipe() as answer:
        script = SCRIPT.format(stdin=stdin, stderr=with_stderr, fd=answer.writer)
        argv = [sys.executable, "-P", "-c", script]
        subprocess.run(argv, stdout=stdout, stderr=stderr, pass_fds=[answer.writer], check=True)
        streams, descriptors, outputs, _ = json.loads(os.read(answer.reader, 1 << 16))
    return streams, descriptors, len(outputs)


def test_pipes_and_files_are_the_nodes_to_write(tmp_path: Path) -> None:
    with pipes.pipe() as out, (tmp_path / "errors").open("wb") as errors:
        assert handed(out.writer, errors.fileno()) == ({"stdout": 0, "stderr": 1}, [1, 2], 0)


def test_terminals_devices_and_sockets_are_not() -> None:
    person, program = pty.openpty()
    ours, theirs = socket.socketpair()
    try:
        streams, descriptors, own = handed(program, theirs.fileno())
        assert (streams, own) == ({"stdout": 0, "stderr": 1}, 2)
        assert not {0, 1, 2} & set(descriptors)
        with open(os.devnull, "wb") as nowhere:
            assert handed(nowhere.fileno(), program)[2] == 2
        assert handed(program, program, with_stderr=False)[2] == 1
    finally:
        os.close(person)
        os.close(program)
        ours.close()
        theirs.close()


def test_input_always_goes_through_a_pipe(tmp_path: Path) -> None:
    """The node never reads what others read too."""
    with (tmp_path / "output").open("wb") as file:
        streams, descriptors, _ = handed(file.fileno(), file.fileno(), stdin=True)
    assert streams == {"stdout": 0, "stderr": 1, "stdin": 2}
    assert descriptors[2] > 2


def test_a_terminal_that_does_not_take_more_is_not_waited_for() -> None:
    person, program = pty.openpty()
    tty.setraw(program)
    with pipes.pipe() as pipe:
        output = ends.Output(program, os.dup(pipe.reader))
        try:
            for _ in range(64):
                os.write(pipe.writer, bytes(1 << 12))
                if not output.waits:
                    assert output.read()
                output.write()
                if output.waits:
                    break
            assert output.waits
            assert os.get_blocking(program)
            os.close(person)
            with pytest.raises(ends.Gone) as gone:
                output.write()
            assert gone.value.terminal
        finally:
            output.close()
            os.close(program)


def test_a_reader_that_is_gone_is_no_error_but_an_end() -> None:
    with pipes.pipe() as pipe, pipes.pipe() as out:
        output = ends.Output(out.writer, os.dup(pipe.reader))
        out.read_end.close()
        os.write(pipe.writer, b"x")
        assert output.read()
        with pytest.raises(ends.Gone) as gone:
            output.write()
        assert not gone.value.terminal
        output.close()


def test_input_waits_for_room_and_loses_nothing() -> None:
    with pipes.pipe() as pipe:
        given = ends.Input(os.dup(pipe.writer))
        pipe.write_end.close()
        data = bytes(range(256)) * 4096
        given.give(data)
        had_to_wait = given.waits
        seen = b""
        while given.waits:
            seen += os.read(pipe.reader, 1 << 16)
            assert given.write()
        given.close()
        while more := os.read(pipe.reader, 1 << 16):
            seen += more
        assert had_to_wait
        assert seen == data


def test_input_that_somebody_else_has_taken_is_not_waited_for() -> None:
    person, program = pty.openpty()
    ours, theirs = socket.socketpair()
    with pipes.pipe() as given, ours, theirs, pipes.pipe() as to_node:
        for writer, source in ((given.writer, given.reader), (theirs.fileno(), ours.fileno()), (person, program)):
            taken = ends.Input(os.dup(to_node.writer), source)
            try:
                assert taken.read() is None
                os.write(writer, b"x\n")
                assert taken.read() == b"x\n"
                assert taken.read() is None
                # It is theirs as well.
                assert os.get_blocking(source)
            finally:
                taken.close()
        given.write_end.close()
        taken = ends.Input(os.dup(to_node.writer), given.reader)
        assert taken.read() == b""
        taken.close()
    os.close(person)
    os.close(program)


def test_a_file_is_read_from_where_it_stands(tmp_path: Path) -> None:
    (tmp_path / "input").write_bytes(b"read, and not")
    with (tmp_path / "input").open("rb", buffering=0) as file, pipes.pipe() as to_node:
        file.read(6)
        taken = ends.Input(os.dup(to_node.writer), file.fileno())
        assert taken.read() == b"and not"
        assert taken.read() == b""
        taken.close()


def test_input_that_nobody_reads_any_more_is_over() -> None:
    with pipes.pipe() as pipe:
        given = ends.Input(os.dup(pipe.writer))
        pipe.read_end.close()
        given.give(b"x")
        assert not given.waits
        given.close()
