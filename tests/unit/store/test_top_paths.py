"""The roots that keep a set of store paths alive."""

from collections.abc import Collection, Mapping

from hypothesis import given
from hypothesis import strategies as st

from nixlet.store import interface, paths

Graph = dict[int, set[int]]


def made(number: int) -> paths.StorePath:
    return paths.from_name(f"{number:032}-p{number}")


def infos_of(graph: Mapping[int, Collection[int]]) -> dict[paths.StorePath, interface.PathInfo]:
    return {
        made(number): interface.PathInfo(made(number), "", "", frozenset(map(made, references)), 0, 0)
        for number, references in graph.items()
    }


def tops_of(graph: Mapping[int, Collection[int]]) -> set[int]:
    tops = interface.top_paths(infos_of(graph))
    assert len(set(tops)) == len(tops)
    return {number for number in graph if made(number) in tops}


def kept_by(roots: Collection[int], graph: Graph) -> set[int]:
    """What a collector keeps of a graph, found by adding references until nothing is new."""
    kept = set(roots)
    while more := {reference for number in kept for reference in graph.get(number, ())} - kept:
        kept |= more
    return kept


# References may form circles, name the path itself, and lead out of the set.
GRAPHS = st.dictionaries(st.integers(0, 12), st.sets(st.integers(0, 14), max_size=4), max_size=12)
WITHOUT_CIRCLES = st.dictionaries(st.integers(0, 12), st.sets(st.integers(0, 12), max_size=4), max_size=12).map(
    lambda graph: {number: {each for each in references if each <= number} for number, references in graph.items()}
)


@given(GRAPHS)
def test_rooting_the_tops_keeps_every_member(graph: Graph) -> None:
    tops = tops_of(graph)
    assert tops <= graph.keys() <= kept_by(tops, graph)


@given(WITHOUT_CIRCLES)
def test_without_circles_no_top_can_be_spared(graph: Graph) -> None:
    tops = tops_of(graph)
    for top in tops:
        assert top not in kept_by(tops - {top}, graph)


@given(GRAPHS)
def test_the_answer_does_not_depend_on_the_order(graph: Graph) -> None:
    infos = infos_of(graph)
    assert interface.top_paths(infos) == interface.top_paths(dict(reversed(infos.items())))


def test_simple_graphs() -> None:
    assert interface.top_paths({}) == ()
    assert tops_of({1: []}) == {1}
    assert tops_of({1: [1]}) == {1}
    assert tops_of({3: [2], 2: [1], 1: []}) == {3}
    assert tops_of({3: [1], 2: [1], 1: [0]}) == {2, 3}
    assert tops_of({1: [2], 2: [1]}) == {1}
    assert tops_of({0: [1], 1: [2], 2: [1]}) == {0}
    assert tops_of({1: [2], 2: [3], 3: [1], 4: []}) == {1, 4}


def test_a_long_chain_needs_no_deep_stack() -> None:
    length = 5_000
    chain = {number: [number - 1] for number in range(1, length)} | {0: []}
    assert interface.top_paths(infos_of(chain)) == (made(length - 1),)
