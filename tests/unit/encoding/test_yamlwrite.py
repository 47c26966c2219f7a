"""YAML that is written."""

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nixlet.encoding import yamlread, yamlwrite


def test_the_order_is_the_one_that_is_given() -> None:
    value: dict[str, Any] = {"b": 1, "a": [{"y": True, "x": None}, []], "c": {}, "d": ("one", "two")}
    assert yamlwrite.document(value) == (
        "b: 1\na:\n  - 'y': true\n    x: null\n  - []\nc: {}\nd:\n  - one\n  - two\n".replace("'y'", '"y"')
    )


def test_the_same_list_twice_is_written_twice() -> None:
    shared = ["x"]
    assert yamlwrite.document({"a": shared, "b": shared}) == "a:\n  - x\nb:\n  - x\n"


@pytest.mark.parametrize(
    "text",
    ["y", "No", "on", "null", "~", "", "1e3", "0o7", "0x1f", "1_000", "12:30", "2026-11-28", "<<", "=", "*", "&a", "a: b",
     "a #b", " a", "a\nb\n", "\ta", "é", "-", ".inf", "[::1]:80", "0s", "::1"],
)  # fmt: skip
def test_text_stays_text(text: str) -> None:
    written = yamlwrite.document({"key": text, text or "key2": "value"})
    assert yaml.safe_load(written)["key"] == text
    (read,) = yamlread.documents(written.encode(), "test")
    assert read.text("key") == text
    assert read.text(text or "key2") == "value"


TEXT = st.text(st.characters(codec="utf-8"))
VALUES = st.recursive(
    TEXT | st.integers() | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(TEXT, VALUES))
def test_what_is_written_is_what_is_read(value: dict[str, Any]) -> None:
    assert yaml.safe_load(yamlwrite.document(value)) == value
