"""YAML as Kubernetes reads it; what is asserted here is what sigs.k8s.io/yaml makes of the same texts."""

from typing import Any

import pytest
import yaml

from nixlet import errors
from nixlet.encoding import yamlread


def read(text: str) -> yamlread.Mapping:
    (document,) = yamlread.documents(text.encode(), "f.yaml")
    return document


def refusal(text: str) -> errors.UsageError:
    with pytest.raises(errors.UsageError) as caught:
        list(yamlread.documents(text.encode(), "f.yaml"))
    return caught.value


@pytest.mark.parametrize(
    "text",
    ["22:22", "2020-01-01", "2020-1-2T1:2:3Z", "1:20", "190:20:30.15", "1.2.3", "=", "<<", "yES", "oN", "nULL", ".iNf", "0x", "0o8", "0xG",
     "_1", "+", "..", "1e400", "1,000", "٣", "!!str 5", "! 5", "!!timestamp 2020-01-01", "'yes'", '"012"'],
)  # fmt: skip
def test_text(text: str) -> None:
    written = text.rsplit(" ", maxsplit=1)[-1].strip("'\"")
    assert read(f"k: {text}").text("k") == written
    assert read(f"k: [{text}]" if "," not in text else f"k:\n- {text}").texts("k") == [written]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("012", 10), ("0o14", 12), ("0O14", 12), ("0x50", 80), ("0b11", 3), ("-0b1", -1), ("+012", 10), ("-012", -10), ("080", 80), ("08", 8),
        ("1_000", 1000), ("1e3", 1000), ("8.0", 8), ("00", 0), ("-0", 0), ("!!int '5'", 5),
    ],
)  # fmt: skip
def test_whole_numbers(text: str, number: int) -> None:
    assert read(f"k: {text}").integer("k", -(1 << 40), 1 << 40) == number
    assert read(f"k: [{text}]").integers("k", -(1 << 40), 1 << 40) == [number]
    with pytest.raises(errors.UsageError, match="must be a string"):
        read(f"k: {text}").text("k")


@pytest.mark.parametrize("text", ["8.5", "1e-3", "1e21", "22:22", "0o8", "yes", "'5'", ".inf"])
def test_what_is_no_whole_number(text: str) -> None:
    with pytest.raises(errors.UsageError, match="k must be a whole number"):
        read(f"k: {text}").integer("k", 0, 100)


@pytest.mark.parametrize("words", [("y", "n"), ("yes", "no"), ("On", "OFF"), ("TRUE", "False")])
def test_truth_values(words: tuple[str, str]) -> None:
    assert [read(f"k: {word}").boolean("k") for word in words] == [True, False]
    for word in words:
        with pytest.raises(
            errors.UsageError, match=r"must be a string \(in quotes, where it looks like a truth value\)"
        ):
            read(f"k: {word}").text("k")


@pytest.mark.parametrize(("text", "quantity"), [("010", "8"), ("0x40", "64"), ("1_000", "1000"), ("1.5", "1.5"), ("64Mi", "64Mi")])  # fmt: skip
def test_quantities_that_are_numbers(text: str, quantity: str) -> None:
    assert read(f"k: {text}").quantity("k") == quantity


def values(mapping: yamlread.Mapping | None) -> dict[str, int | None]:
    assert mapping is not None
    return {key: mapping.integer(key, 0, 10) for key in mapping.left()}


@pytest.mark.parametrize(
    ("text", "merged"),
    [
        ("b: &b {v: 1, w: 2}\nk:\n  <<: *b\n  v: 3\n", {"v": 3, "w": 2}),
        ("b: &b {v: 1, w: 2}\nk:\n  v: 3\n  <<: *b\n", {"v": 3, "w": 2}),
        ("a: &a {v: 1}\nb: &b {v: 2, w: 3}\nk: {<<: [*a, *b]}\n", {"v": 1, "w": 3}),
        ("a: &a {<<: {q: 1}, r: 4}\nk: {<<: *a, r: 2}\n", {"q": 1, "r": 2}),
        ("k: {<<: {v: 1}, <<: {v: 2, w: 3}}\n", {"v": 1, "w": 3}),
        ("k: {'<<': 5}\n", {"<<": 5}),
        # An anchor that is defined again.
        ("a: &x {v: 1}\nb: &x {v: 2}\nk: *x\n", {"v": 2}),
    ],
)
def test_anchors_and_merges(text: str, merged: dict[str, int]) -> None:
    assert values(read(text).mapping("k")) == merged


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("k:\n  <<: 5\n", "f.yaml, line 2: k.<< must be a mapping, or a list of mappings"),
        ("k: {<<: [{a: 1}, 5]}\n", "f.yaml, line 1: k.<< must be a mapping, or a list of mappings"),
        ("a: &a {[x]: 1}\nk: {<<: *a}\n", "f.yaml, line 1: k has a key that is no text"),
        (
            "a0: &a0 {v: 1}\n" + "".join(f"a{n}: &a{n} {{<<: *a{n - 1}}}\n" for n in range(1, 100)) + "k: {<<: *a99}\n",
            "f.yaml, line 101: k.<< merges mappings that merge mappings, too deep",
        ),
    ],
    ids=["a number", "a list with a number", "a list as a key", "too deep"],
)
def test_what_can_not_be_merged(text: str, problem: str) -> None:
    with pytest.raises(errors.UsageError) as caught:
        read(text).mapping("k")
    assert caught.value.message == problem


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('k: "it~\'s"', "it's"),
        ("k: \"~'~'ä~'\" # ~'", "''ä'"),
        ("k: 'it~'", "it~"),
        ("k: it~'s", "it~'s"),
        ('\ufeffk: "~\'"', "'"),
        ("k: \"~~'~'~~~'\"", "~''~'"),
        ('j: "\u2028\u0085" \nk: "~\'"', "'"),
        ("j: |\n  it~'s \"~'\nk: \"~'\"", "'"),
        ("j: 'a~'\nk: \"a 'b~' ~\n  c~'\"", "a 'b' c'"),
        ('"~\'": 1\nk: "a\n  b~\'"', "a b'"),
    ],
)
def test_an_apostrophe_may_be_escaped_in_double_quotes(text: str, value: str) -> None:
    """With a tilde for the backslash."""
    assert read(text.replace("~", "\\")).text("k") == value.replace("~", "\\")


def test_other_escapes_are_refused() -> None:
    assert refusal('k: "\\\'\\q"').message.endswith("found unknown escape character")
    assert refusal('k: "\u2028\\q"\n').message.endswith("found unknown escape character")


def test_many_escaped_apostrophes_cost_no_more_than_two_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many they are, and wherever they stand."""
    lines = [f"k{number}: \"it\\'s\" # \\'" for number in range(400)]
    readings, parse = [], yaml.parse

    def counted(*arguments: Any, **named: Any) -> Any:
        readings.append(1)
        return parse(*arguments, **named)

    monkeypatch.setattr(yaml, "parse", counted)
    found = read("\n".join(lines))
    assert {found.text(f"k{number}") for number in range(400)} == {"it's"}
    assert len(readings) <= 3


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a:\n  b: 1\n\tc: 2\n", "line 3, column 1"),
        ("a:\n\t- b\n", "line 2, column 1"),
        ("\ta: 1\n", "line 1, column 1"),
        ("a:\n  \tb: 1\n", "line 2"),
    ],
)
def test_tabs_are_named(text: str, place: str) -> None:
    error = refusal(text)
    assert error.message.startswith(f"f.yaml, {place}")
    assert error.message.endswith("this is no YAML: there is a tab, and YAML is indented by spaces alone")


@pytest.mark.parametrize(
    ("take", "problem", "hint"),
    [
        (lambda each: each.required_text("image"), "imge is not supported", 'did you mean "image"?'),
        (lambda each: each.required_text("name"), "name is missing", ""),
    ],
)
def test_a_key_that_is_missing_is_told_where_it_was_meant(take: Any, problem: str, hint: str) -> None:
    with pytest.raises(errors.UsageError) as caught:
        take(read("other: 1\nimge: x\n"))
    assert caught.value.message == f"f.yaml, line {2 if hint else 1}: {problem}"
    assert caught.value.hint == hint


def test_what_has_little_in_common_is_not_proposed() -> None:
    document = read("valueFrom: {}\n")
    document.text("value")
    with pytest.raises(errors.UsageError, match="valueFrom is not supported") as caught:
        document.end()
    assert caught.value.hint == ""
