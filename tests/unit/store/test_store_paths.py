"""The grammar of store paths, and Nix's base 32."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixlet import errors
from nixlet.store import paths

HASH = "0123456789abcdfghijklmnpqrsvwxyz"
NAME_CHARACTERS = "abcXYZ019+-._?="


def is_name(name: str) -> bool:
    return name not in {".", ".."} and not name.startswith((".-", "..-"))


@given(
    st.text(paths.NIX32, min_size=32, max_size=32), st.text(NAME_CHARACTERS, min_size=1, max_size=211).filter(is_name)
)
def test_what_fits_the_grammar_is_taken(digest: str, name: str) -> None:
    parsed = paths.parse(f"/nix/store/{digest}-{name}")
    assert (parsed, parsed.name, parsed.hash_part) == (f"/nix/store/{digest}-{name}", f"{digest}-{name}", digest)
    assert parsed == paths.from_name(parsed.name)
    assert {parsed: 1}[paths.StorePath(str(parsed))] == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "/etc/passwd",
        "/nix/store",
        "/nix/store/",
        f"{HASH}-name",
        f"/nix/store/{HASH}",
        f"/nix/store/{HASH}-",
        f"/nix/store/{HASH}name",
        f"/nix/store/{HASH[:-1]}-name",
        f"/nix/store/{HASH.replace('0', 'e')}-name",
        f"/nix/store/{HASH.upper()}-name",
        f"/nix/store/{HASH}-na me",
        f"/nix/store/{HASH}-name\n",
        f"/nix/store/{HASH}-n\x00",
        f"/nix/store/{HASH}-ä",
        f"/nix/store/{HASH}-.",
        f"/nix/store/{HASH}-..",
        f"/nix/store/{HASH}-.-x",
        f"/nix/store/{HASH}-..-x",
        f"/nix/store/{HASH}-{'n' * 212}",
        f"/nix/store/{HASH}-name/bin",
        f"/nix/store/../store/{HASH}-name",
        f"/nix/store//{HASH}-name",
        f"/other/store/{HASH}-name",
        f"--option/nix/store/{HASH}-name",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(errors.InvalidArgumentError, match="is not a store path below /nix/store"):
        paths.parse(text)


def test_the_sentence_shows_the_text_shortened_and_escaped() -> None:
    with pytest.raises(errors.InvalidArgumentError) as caught:
        paths.parse("/nix/store/\x1b[31m" + "x" * 10_000)
    assert "\x1b" not in caught.value.message
    assert r"\x1b[31mxxx" in caught.value.message
    assert len(caught.value.message) < 250


def test_another_store_has_its_own_paths() -> None:
    assert paths.parse(f"/srv/store/{HASH}-x", "/srv/store").name == f"{HASH}-x"
    with pytest.raises(errors.InvalidArgumentError, match="below /srv/store"):
        paths.parse(f"/nix/store/{HASH}-x", "/srv/store")
