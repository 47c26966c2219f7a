"""Kubernetes' quantities."""

import fractions

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixlet.kube import quantity

SUFFIXES: dict[str, int | fractions.Fraction] = {
    "": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15, "E": 10**18,
    "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50, "Ei": 2**60,
    "m": fractions.Fraction(1, 10**3), "u": fractions.Fraction(1, 10**6), "n": fractions.Fraction(1, 10**9),
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("128974848", 128974848),
        ("129e6", 129_000_000),
        ("129E6", 129_000_000),
        ("129M", 129_000_000),
        ("128974848000m", 128974848),
        ("123Mi", 128974848),
        ("1.5Gi", 3 << 29),
        ("400m", 1),
        ("+5", 5),
        ("5.", 5),
        (".5k", 500),
        ("1E", 10**18),
        ("1e3", 1000),
        ("1E+3", 1000),
        ("1500e-3", 2),
        ("0.001Ki", 2),
        ("-0", 0),
        ("9223372036854775807", 2**63 - 1),
    ],
)
def test_bytes(text: str, value: int) -> None:
    assert quantity.parse(text) == value


@pytest.mark.parametrize(
    ("text", "value"), [("1", 1000), ("0.5", 500), ("500m", 500), ("1.5", 1500), ("100u", 1), ("1n", 1), ("1e-1", 100)]
)
def test_thousandths_of_a_core(text: str, value: int) -> None:
    assert quantity.parse(text, 1000) == value


@pytest.mark.parametrize(
    "text",
    ["", " ", "1 ", " 1", "1\n", ".", "+", "m", "1K", "1ki", "1KI", "1mi", "1mm", "1e", "1e1000", "1e3Mi", "1_000",
     "1,5", "0x10", "\N{ARABIC-INDIC DIGIT ONE}", "½", "nan", ".inf", "--1", "1.2.3", "1" * 65],
)  # fmt: skip
def test_what_is_no_quantity(text: str) -> None:
    with pytest.raises(ValueError, match=r"which is no quantity$") as caught:
        quantity.parse(text)
    assert str(caught.value) == f"is {text[:40]!r}, which is no quantity"


@pytest.mark.parametrize("text", ["9223372036854775808", "8Ei", "10E", "1e19", "1e999", "9" * 64])
def test_what_is_too_large(text: str) -> None:
    with pytest.raises(ValueError, match=r"which is too large$") as caught:
        quantity.parse(text)
    assert str(caught.value) == f"is {text[:40]!r}, which is too large"


@pytest.mark.parametrize("text", ["-1", "-1n", "-1e-999", "-8Ei"])
def test_what_is_negative(text: str) -> None:
    with pytest.raises(ValueError, match=r"which is negative$"):
        quantity.parse(text)


@given(st.decimals(min_value=0, max_value=7, places=6), st.sampled_from(sorted(SUFFIXES)), st.sampled_from([1, 1000]))
def test_every_number_is_rounded_up_from_its_exact_value(number: object, suffix: str, scale: int) -> None:
    exact = fractions.Fraction(str(number)) * SUFFIXES[suffix] * scale
    if exact <= 2**63 - 1:
        found = quantity.parse(f"{number}{suffix}", scale)
        assert 0 <= found - exact < 1
    else:
        with pytest.raises(ValueError, match="too large"):
            quantity.parse(f"{number}{suffix}", scale)


@given(st.text(alphabet="0123456789.+-eEkKMGTPimun \n", max_size=20))
def test_any_other_text_is_refused_with_one_kind_of_error(text: str) -> None:
    try:
        found: int | str = quantity.parse(text)
    except ValueError as error:
        found = str(error)
    if isinstance(found, str):
        assert found.startswith(f"is {text!r}, which is ")
    else:
        assert 0 <= found < 2**63


@pytest.mark.parametrize(("text", "limit"), [("6Mi", 6 << 20), ("128M", 128_000_000), ("0", 0), ("1e9", 10**9)])
def test_limits_of_memory(text: str, limit: int) -> None:
    assert quantity.memory_limit(text) == limit


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("128m", "0.128 bytes: did you mean 128Mi?"),
        ("512", "512 bytes: did you mean 512Mi?"),
        ("64k", "64000 bytes"),
        ("5Mi", "5.24288e+06 bytes"),
        ("1.5m", "0.0015 bytes"),
    ],
)
def test_limits_in_which_nothing_can_run(text: str, said: str) -> None:
    with pytest.raises(ValueError, match="and a container needs 6Mi at least") as caught:
        quantity.memory_limit(text)
    assert str(caught.value) == f"is {text!r}, and a container needs 6Mi at least: that is {said}"
