"""The names of preloaded images, and what stands in lists."""

from pathlib import Path

import pytest

from nixlet import errors
from nixlet.node import preload

DIGEST = f"sha256:{'0' * 64}"


@pytest.mark.parametrize(
    ("names", "registries", "more"),
    [
        (["docker.io/library/a:1"], [], ["docker.io/library/a@D"]),
        (
            ["docker.io/library/a:1"],
            ["r.example"],
            ["docker.io/library/a@D", "r.example/library/a:1", "r.example/library/a@D"],
        ),
        (["docker.io/b/a:1"], ["r.example/x/"], ["docker.io/b/a@D", "r.example/x/b/a:1", "r.example/x/b/a@D"]),
        # It is there already; another registry whose name merely begins like that is not.
        (["r.example/a:1"], ["r.example"], ["r.example/a@D"]),
        (["r.example.org/a:1"], ["r.example"], ["r.example.org/a@D", "r.example/a:1", "r.example/a@D"]),
        (["r.example/x/a:1"], ["r.example/x"], ["r.example/x/a@D"]),
        (["r.example/xy/a:1"], ["r.example/x"], ["r.example/xy/a@D", "r.example/x/xy/a:1", "r.example/x/xy/a@D"]),
        # By digest alone.
        (["r.example/a@D"], ["s.example"], ["s.example/a@D"]),
        # Each name once, also where two names have one repository.
        (["r.example/a:1", "r.example/a:2"], [], ["r.example/a@D"]),
        (["nix:0/nix/store/0c0qxbrxlfz2nzi6jxz6a3ssa0cl6lrw-a.tar:latest"], ["r.example"], []),
        ([], ["r.example"], []),
    ],
)
def test_further_names(names: list[str], registries: list[str], more: list[str]) -> None:
    names, more = ([each.replace("@D", f"@{DIGEST}") for each in some] for some in (names, more))
    assert preload.further_names(names, DIGEST, registries) == [*names, *more]


def test_a_list_of_references(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"\n  a:1 \r\n\t\nb\xff\n" + b"c" * 65536)
    assert preload.references_in(str(path)) == ["a:1", "b\N{REPLACEMENT CHARACTER}", "c" * 65536]
    path.write_bytes(b"a:1\n" + b"c" * 65537)
    with pytest.raises(errors.InvalidArgumentError, match=r"list\.txt has a line of more than 65536 bytes"):
        preload.references_in(str(path))
