"""What stands in containers' logs: the CRI's form, and what is printed of it."""

import datetime
import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixlet.containers import logrecords

TIME = "2026-01-02T03:04:05.123456789Z"


def entry(text: str, tag: str = "F", stream: str = "stdout") -> str:
    return f"{TIME} {stream} {tag} {text}\n"


@pytest.mark.parametrize(
    ("line", "stream", "text"),
    [
        (entry("hello"), "stdout", b"hello\n"),
        (entry("oops", stream="stderr"), "stderr", b"oops\n"),
        (entry("a  b "), "stdout", b"a  b \n"),
        (entry(" F stdout "), "stdout", b" F stdout \n"),
        (entry(""), "stdout", b"\n"),
        (f"{TIME} stdout F", "stdout", b"\n"),
        (entry("half", "P"), "stdout", b"half"),
        (entry("half", "P:more"), "stdout", b"half"),
        (entry("whole", "F:more"), "stdout", b"whole\n"),
        (entry("carriage\r"), "stdout", b"carriage\r\n"),
    ],
)
def test_a_line(line: str, stream: str, text: bytes) -> None:
    assert logrecords.parse_line(line.encode()) == logrecords.Record(TIME, stream, text)


@pytest.mark.parametrize("line", [b"", b"\n", b"words\n", b"{}\n", b"a stdin F text\n", b"a stdout\n", b"\xff\xfe\n"])
def test_a_malformed_line_is_shown_as_it_stands(line: bytes) -> None:
    assert logrecords.parse_line(line) == logrecords.Record("", "stdout", line)


@given(st.binary().filter(lambda text: b"\n" not in text), st.sampled_from(["stdout", "stderr"]), st.booleans())
def test_any_output_comes_back(text: bytes, stream: str, partial: bool) -> None:
    line = f"{TIME} {stream} {'P' if partial else 'F'} ".encode() + text + b"\n"
    assert logrecords.parse_line(line) == logrecords.Record(TIME, stream, text if partial else text + b"\n")


def printed(blocks: list[bytes], **options: Any) -> tuple[bytes, bytes]:
    """What goes to standard output and to standard error, of blocks that are printed one after the other."""
    streams = {"stdout": io.BytesIO(), "stderr": io.BytesIO()}
    printer = logrecords.Printer(**options)
    for block in blocks:
        for stream, text in printer.printed(block):
            streams[stream].write(text)
    return streams["stdout"].getvalue(), streams["stderr"].getvalue()


LINES = st.one_of(
    st.builds(
        lambda stream, tag, text: f"{TIME} {stream} {tag}".encode() + text,
        st.sampled_from(["stdout", "stderr"]),
        st.sampled_from(["F", "F", "F", "P", "P:x", "F:x"]),
        st.sampled_from([b"", b" ", b" one", b" 2026-01-02T03:04:05Z stdout F two", b"  "]),
    ),
    st.sampled_from([b"", b"words", b"a stdin F text", b" stdout F x", b"x stderr F"]),
)


@given(st.lists(st.lists(LINES, min_size=1), min_size=1), st.booleans(), st.booleans())
def test_many_lines_are_printed_as_each_by_itself(blocks: list[list[bytes]], timestamps: bool, cut: bool) -> None:
    whole = [b"".join(line + b"\n" for line in block) for block in blocks]
    singly = [line + b"\n" for block in blocks for line in block]
    if cut:
        whole[-1], singly[-1] = whole[-1][:-1], singly[-1][:-1]
    assert printed([each for each in whole if each], timestamps=timestamps) == printed(
        [each for each in singly if each], timestamps=timestamps
    )


def test_what_is_printed() -> None:
    block = (entry("one") + entry("two, ", "P") + entry("three") + entry("four", stream="stderr")).encode()
    assert printed([block]) == (b"one\ntwo, three\n", b"four\n")
    shown = TIME.encode()
    wanted = (b"%s one\n%s two, three\n" % (shown, shown), b"%s four\n" % shown)
    assert printed([block], timestamps=True) == wanted
    late = b"2026-01-02T03:04:06Z stderr F late\n"
    since = datetime.datetime(2026, 1, 2, 3, 4, 5, 500000, tzinfo=datetime.UTC)
    assert printed([block + late, late], since=since, timestamps=True) == (
        b"",
        b"2026-01-02T03:04:06Z late\n2026-01-02T03:04:06Z late\n",
    )


def test_output_of_both_streams_keeps_its_order() -> None:
    block = (entry("one") + entry("two", stream="stderr") + entry("three")).encode()
    assert list(logrecords.Printer().printed(block)) == [
        ("stdout", b"one\n"),
        ("stderr", b"two\n"),
        ("stdout", b"three\n"),
    ]
