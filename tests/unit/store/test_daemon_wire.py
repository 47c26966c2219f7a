"""The encoding of the worker protocol, and the end of archives."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixlet.store.daemon import nar, wire
from support import storeimages


def piecewise(data: bytes, size: int, reader: wire.Reader) -> list[str]:
    """Parse a list that comes in pieces; every piece but the last must leave it incomplete."""
    for start in range(0, len(data), size):
        reader.feed(data[start : start + size])
        if start + size < len(data):
            with pytest.raises(wire.NeedMore):
                reader.parse(wire.Reader.strings)
    return reader.parse(wire.Reader.strings)


@given(st.lists(st.text(max_size=40), max_size=20), st.integers(1, 50))
def test_lists_survive_any_cut(values: list[str], size: int) -> None:
    reader = wire.Reader()
    assert piecewise(wire.strings(values), size, reader) == values
    # The next value is parsed afresh, at whatever position.
    assert piecewise(wire.strings(["next"]), size, reader) == ["next"]


def test_a_long_list_is_not_parsed_from_its_beginning_for_each_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = 0
    plain = wire.Reader.string

    def counting(reader: wire.Reader) -> str:
        nonlocal parsed
        value = plain(reader)
        parsed += 1
        return value

    monkeypatch.setattr(wire.Reader, "string", counting)
    values = [f"path-{number}" for number in range(5000)]
    assert piecewise(wire.strings(values), 4096, wire.Reader()) == values
    assert parsed == 5000


@given(st.integers(0, (1 << 64) - 1), st.binary(max_size=40))
def test_integers_and_strings(number: int, data: bytes) -> None:
    encoded = wire.integer(number) + wire.string(data)
    assert len(encoded) % 8 == 0
    reader = wire.Reader()
    reader.feed(encoded + b"rest")
    assert reader.parse(lambda r: (r.integer(), r.bytes())) == (number, data)
    assert reader.take() == b"rest"
    assert reader.take() == b""


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


NODES = st.recursive(
    st.one_of(
        st.builds(storeimages.nar_file, st.binary(max_size=40), executable=st.booleans()),
        st.builds(storeimages.nar_link, st.text("ab/.", max_size=20)),
    ),
    lambda inner: st.builds(storeimages.nar_directory, st.dictionaries(st.text("abc", min_size=1), inner, max_size=4)),
)


@given(NODES, st.integers(1, 100))
def test_the_end_of_an_archive_is_found_in_any_cut(node: bytes, size: int) -> None:
    data = storeimages.nar(node)
    scanner = nar.Scanner()
    fed = 0
    while not scanner.finished:
        assert fed < len(data)
        fed += scanner.feed((data + b"after")[fed : fed + size])
    assert fed == len(data)
    assert scanner.feed(b"more") == 0


def test_deep_directories_are_no_trouble() -> None:
    node = storeimages.nar_file(b"x")
    entry = storeimages.nar_directory({"d": b"\0MARK\0"})
    before, after = entry.split(b"\0MARK\0")
    data = storeimages.nar(before * 20_000 + node + after * 20_000)
    scanner = nar.Scanner()
    assert scanner.feed(data) == len(data)
    assert scanner.finished


@pytest.mark.parametrize(
    "data",
    [
        wire.string("nix-archive-2"),
        wire.integer(1 << 20),
        storeimages.nar(b"").ljust(64, b"x"),
        storeimages.nar(wire.string("(") + wire.string("type") + wire.string("socket")),
        storeimages.nar(wire.string("(") + wire.string("type") + wire.string("regular") + wire.string(")")),
        storeimages.nar(wire.string("(") + wire.string("type") + wire.string("directory") + wire.string("(")),
    ],
)
def test_what_is_no_archive_is_refused(data: bytes) -> None:
    with pytest.raises(wire.ProtocolError, match="the archive has"):
        nar.Scanner().feed(data)
