"""How layers name closures."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixlet import errors
from nixlet.store import closures, paths

PREFIX = closures.STORE_PATH_PREFIX


def made(number: int) -> paths.StorePath:
    return paths.from_name(f"{number:032}-p{number}")


@pytest.mark.parametrize(
    "labels",
    [
        {},
        {"containerd.io/snapshot.ref": "sha256:0"},
        # Without nix-layer the paths don't count; and nix-layer alone names none.
        {f"{PREFIX}0": str(made(0))},
        {closures.LAYER: "true"},
    ],
)
def test_a_layer_that_names_no_closure(labels: dict[str, str]) -> None:
    assert closures.parse_annotations(labels) is None


def test_the_closure_form_wins() -> None:
    labels = {closures.CLOSURE: str(made(1)), closures.LAYER: "true", f"{PREFIX}0": "--help"}
    assert closures.parse_annotations(labels) == closures.ClosureReference(made(1))


@pytest.mark.parametrize("value", ["true", "false", ""])
def test_the_list_form_is_sorted_by_number(value: str) -> None:
    labels = {closures.LAYER: value} | {f"{PREFIX}{number}": str(made(number)) for number in (10, 9, 0, 100)}
    parsed = closures.parse_annotations(labels)
    assert parsed is not None
    assert parsed.listed == (made(0), made(9), made(10), made(100))


@given(st.lists(st.integers(0, 500), min_size=1, unique=True))
def test_what_is_written_is_read_back(numbers: list[int]) -> None:
    for reference in (
        closures.ClosureReference(None, tuple(map(made, numbers))),
        closures.ClosureReference(made(numbers[0])),
    ):
        assert closures.parse_annotations(reference.annotations()) == reference


def test_equal_sets_have_one_identity_and_others_another() -> None:
    references = [closures.ClosureReference(made(number)) for number in range(3)]
    references += [closures.ClosureReference(None, (made(0), made(1))), closures.ClosureReference(None, (made(0),))]
    for one, other in itertools.combinations(references, 2):
        assert one.identity != other.identity
    assert closures.ClosureReference(None, (made(1), made(0))).identity == references[3].identity
    assert all("/" not in each.identity and len(each.identity) <= 64 for each in references)


@pytest.mark.parametrize("number", ["", "x", "-1", "+1", "1_0", "00", "01", " 1", "²", "1" * 10, "0/../../etc"])
def test_an_index_that_is_no_number_is_refused(number: str) -> None:
    with pytest.raises(errors.InvalidArgumentError, match="has no number at its end"):
        closures.parse_annotations({closures.LAYER: "true", f"{PREFIX}{number}": str(made(0))})


@pytest.mark.parametrize("value", ["", "/etc", "--help", "/nix/store/..", f"{made(0)}/bin", f"{made(0)}\n"])
def test_other_things_than_store_paths_are_refused(value: str) -> None:
    for labels in ({closures.CLOSURE: value}, {closures.LAYER: "true", f"{PREFIX}0": value}):
        with pytest.raises(errors.InvalidArgumentError, match="is not a store path"):
            closures.parse_annotations(labels)


def test_the_earliest_form_is_refused_in_words() -> None:
    with pytest.raises(errors.InvalidArgumentError, match=r"older than nix-snapshotter 0\.1") as caught:
        closures.parse_annotations({"containerd.io/snapshot/nix/store.0": made(0).name})
    assert caught.value.hint == "build the image again"


def test_too_many_paths_are_refused() -> None:
    many = {f"{PREFIX}{number}": str(made(0)) for number in range(closures.MAX_PATHS + 1)}
    with pytest.raises(errors.InvalidArgumentError, match="has 20001 paths, more than 20000"):
        closures.parse_annotations({closures.LAYER: "true", **many})
    with pytest.raises(errors.InvalidArgumentError, match="has 20001 paths, more than 20000"):
        closures.parse_store_paths(f"{made(0)}\n" * (closures.MAX_PATHS + 1))
    with pytest.raises(errors.InvalidArgumentError, match="is larger than"):
        closures.parse_store_paths(b"\n" * (closures.MAX_LIST_BYTES + 1))


def test_a_list_keeps_its_order_and_drops_repetitions() -> None:
    listed = (made(3), made(1), made(2))
    text = "".join(f"{path}\n" for path in (*listed, made(3)))
    assert closures.parse_store_paths(text) == closures.parse_store_paths(text.encode()) == listed
    assert closures.parse_store_paths(text.rstrip("\n")) == listed
    assert closures.parse_store_paths(b"") == ()


@pytest.mark.parametrize("line", [b"/etc/passwd", b"\xff\xfe", b" ", f"{made(0)}\r".encode(), f"{made(0)}/x".encode()])
def test_a_list_of_something_else_is_refused(line: bytes) -> None:
    with pytest.raises(errors.InvalidArgumentError, match="is not a store path"):
        closures.parse_store_paths(f"{made(0)}\n".encode() + line + b"\n")
