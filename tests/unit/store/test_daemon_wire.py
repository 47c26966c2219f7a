"""The encoding of the worker protocol."""

import contextlib
from collections.abc import Callable
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixlet.store.daemon import wire

T = TypeVar("T")


def piecewise(data: bytes, size: int, reader: wire.Reader, parser: Callable[[wire.Reader], T]) -> T:
    """Parse a value that comes in pieces; every piece but the last must leave it incomplete."""
    for start in range(0, len(data), size):
        reader.feed(data[start : start + size])
        if start + size < len(data):
            with pytest.raises(wire.NeedMore):
                reader.parse(parser)
    return reader.parse(parser)


@given(st.lists(st.text(max_size=40), max_size=20), st.integers(1, 50))
def test_lists_survive_any_cut(values: list[str], size: int) -> None:
    reader = wire.Reader()
    assert piecewise(wire.strings(values), size, reader, wire.Reader.strings) == values
    # The next value is parsed afresh, at whatever position.
    assert piecewise(wire.strings(["next"]), size, reader, wire.Reader.strings) == ["next"]


def result(path: str, error: str, outputs: int = 0) -> bytes:
    """One of the results of BuildPathsWithResults."""
    times = wire.integer(0) * 4
    listed = b"".join(wire.string(f"out{number}") + wire.string("{}") for number in range(outputs))
    return wire.string(path) + wire.integer(0) + wire.string(error) + times + wire.integer(outputs) + listed


@given(st.lists(st.tuples(st.text(max_size=9), st.text(max_size=9), st.integers(0, 3)), max_size=9), st.integers(1, 50))
def test_results_with_lists_in_them_survive_any_cut(values: list[tuple[str, str, int]], size: int) -> None:
    data = wire.integer(len(values)) + b"".join(result(*each) for each in values)
    reader = wire.Reader()
    for _ in range(2):
        results = piecewise(data, size, reader, wire.Reader.build_results)
        assert [(each.path, each.error) for each in results] == [value[:2] for value in values]


def test_an_error_among_records_leaves_nothing_behind() -> None:
    """It is raised out of a parser, and has been consumed."""

    def failing(reader: wire.Reader) -> None:
        raise ValueError(reader.error())

    error = wire.string("Error") + wire.integer(0) + wire.string("") + wire.string("sorry") + wire.integer(0)
    traces = wire.integer(1) + wire.integer(0) + wire.string("while testing")
    reader = wire.Reader()
    for _ in range(2):
        with pytest.raises(ValueError, match="sorry"):
            piecewise(error + traces, 7, reader, failing)
        assert piecewise(wire.strings(["a", "b"]), 7, reader, wire.Reader.strings) == ["a", "b"]


@pytest.mark.parametrize(
    ("data", "parser", "strings"),
    [
        (wire.strings(f"path-{number}" for number in range(5000)), wire.Reader.strings, 5000),
        (
            wire.integer(5000) + b"".join(result(f"path-{number}", "", number % 3) for number in range(5000)),
            wire.Reader.build_results,
            5000 * 2 + 2 * (5000 // 3 * 3 + 1),
        ),
    ],
    ids=["strings", "results"],
)
def test_a_long_list_is_not_parsed_from_its_beginning_for_each_piece(
    data: bytes, parser: Callable[[wire.Reader], list[object]], strings: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = 0
    plain = wire.Reader.string

    def counting(reader: wire.Reader) -> str:
        nonlocal parsed
        value = plain(reader)
        parsed += 1
        return value

    monkeypatch.setattr(wire.Reader, "string", counting)
    assert len(piecewise(data, 4096, wire.Reader(), parser)) == 5000
    # An element that is cut is parsed again, and no other.
    assert strings <= parsed <= strings + 4 * (len(data) // 4096 + 1)


@given(st.integers(0, (1 << 64) - 1), st.binary(max_size=40))
def test_integers_and_strings(number: int, data: bytes) -> None:
    encoded = wire.integer(number) + wire.string(data)
    assert len(encoded) % 8 == 0
    reader = wire.Reader()
    reader.feed(encoded + wire.string("rest"))
    assert reader.parse(lambda r: (r.integer(), r.bytes())) == (number, data)
    assert reader.parse(wire.Reader.string) == "rest"


@given(st.binary(max_size=200))
def test_garbage_is_no_crash(data: bytes) -> None:
    for parser in (wire.Reader.strings, wire.Reader.fields, wire.Reader.error, wire.Reader.build_results):
        reader = wire.Reader()
        reader.feed(data)
        with contextlib.suppress(wire.NeedMore, wire.ProtocolError):
            reader.parse(parser)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (wire.integer(wire.MAX_STRING + 1), "a string of 67108865 bytes"),
        (wire.integer(3) + b"abc" + b"\0\0\0\0x", "padding that is not zero"),
    ],
)
def test_strings_that_cannot_be_are_refused(data: bytes, message: str) -> None:
    reader = wire.Reader()
    reader.feed(data)
    with pytest.raises(wire.ProtocolError, match=message):
        reader.parse(wire.Reader.string)


def test_the_limits_come_before_the_bytes() -> None:
    reader = wire.Reader(max_string=16)
    reader.feed(wire.integer(17))
    with pytest.raises(wire.ProtocolError, match="a string of 17 bytes"):
        reader.parse(wire.Reader.string)
    reader = wire.Reader()
    reader.feed(wire.integer(1 << 40))
    with pytest.raises(wire.ProtocolError, match="a list of 1099511627776 elements"):
        reader.parse(wire.Reader.strings)
    reader = wire.Reader()
    reader.feed(wire.integer(1) + wire.integer(7))
    with pytest.raises(wire.ProtocolError, match="unknown type 7"):
        reader.parse(wire.Reader.fields)
