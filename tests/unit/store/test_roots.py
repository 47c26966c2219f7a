"""GC roots as directories of symlinks, the fewest that keep a closure, and which paths a policy lets through."""

import os
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixlet import errors
from nixlet.store import interface, paths, policy, roots


def made(number: int) -> paths.StorePath:
    return paths.from_name(f"{number:032}-p{number}")


def known(number: int, references: Iterable[int] = (), **fields: Any) -> interface.PathInfo:
    return interface.PathInfo(made(number), "", "", frozenset(map(made, references)), 0, 0, **fields)


@pytest.fixture
def gc_roots(tmp_path: Path) -> roots.Roots:
    return roots.Roots(str(tmp_path), "node")


def test_links_lead_to_the_paths(gc_roots: roots.Roots, tmp_path: Path) -> None:
    gc_roots.set("layer", [made(1), made(2)])
    directory = tmp_path / "nixlet" / "node" / "layer"
    assert {name: os.readlink(directory / name) for name in os.listdir(directory)} == {
        made(1).name: made(1),
        made(2).name: made(2),
    }
    assert gc_roots.names() == ["layer"]
    assert gc_roots.paths("layer") == sorted([made(1).name, made(2).name])


def test_the_same_again_changes_nothing(gc_roots: roots.Roots, tmp_path: Path) -> None:
    gc_roots.set("layer", [made(1)])
    before = os.stat(tmp_path / "nixlet" / "node" / "layer").st_ino
    gc_roots.set("layer", [made(1), made(1)])
    assert os.stat(tmp_path / "nixlet" / "node" / "layer").st_ino == before
    gc_roots.set("layer", [made(2)])
    assert gc_roots.paths("layer") == [made(2).name]
    assert os.listdir(tmp_path / "nixlet" / "node") == ["layer"]


def test_the_last_one_takes_the_directories_along(gc_roots: roots.Roots, tmp_path: Path) -> None:
    other = roots.Roots(str(tmp_path), "other")
    gc_roots.set("a", [made(1)])
    gc_roots.set("b", [])
    other.set("c", [made(1)])
    gc_roots.remove("a")
    assert gc_roots.names() == ["b"]
    gc_roots.remove("b")
    gc_roots.remove("b")
    assert os.listdir(tmp_path / "nixlet") == ["other"]
    other.remove("c")
    assert os.listdir(tmp_path) == []
    assert gc_roots.names() == gc_roots.paths("a") == []


@pytest.mark.parametrize("name", ["", ".", "..", "../other", "a/b"])
def test_a_name_that_leads_elsewhere_is_refused(gc_roots: roots.Roots, name: str) -> None:
    for action in (lambda: gc_roots.set(name, []), lambda: gc_roots.remove(name), lambda: gc_roots.paths(name)):
        with pytest.raises(errors.InvalidArgumentError, match="can't be the name of a GC root"):
            action()


def test_a_change_is_on_the_disk_before_anything_is_let_go(
    gc_roots: roots.Roots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, directory = tmp_path / "nixlet" / "node", tmp_path / "nixlet" / "node" / "layer"
    steps: list[tuple[str, object]] = []
    fsync, unlink = os.fsync, os.unlink

    def synced(fd: int) -> None:
        fsync(fd)
        place = Path(os.readlink(f"/proc/self/fd/{fd}"))
        steps.append((str(place.relative_to(tmp_path)), sorted(each.name for each in place.iterdir())))

    def unlinked(path: str) -> None:
        unlink(path)
        steps.append(("unlinked", os.path.basename(path)))

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "unlink", unlinked)
    above = [(".", ["nixlet"]), ("nixlet", ["node"])]
    named = ("nixlet/node", ["layer"])
    gc_roots.set("layer", [made(1), made(2)])
    assert steps == [*above, ("nixlet/node/layer", [made(1).name, made(2).name]), named]
    steps.clear()
    # What is above is on the disk by now, and stays there.
    gc_roots.set("layer", [made(2), made(3)])
    three = [made(number).name for number in (1, 2, 3)]
    assert steps == [("nixlet/node/layer", three), named, ("unlinked", made(1).name)]
    assert sorted(os.listdir(directory)) == three[1:]
    assert os.listdir(own) == ["layer"]
    # Unless it is made anew.
    gc_roots.remove("layer")
    steps.clear()
    gc_roots.set("layer", [made(3)])
    assert steps == [*above, ("nixlet/node/layer", [made(3).name]), named]
    # And whoever made it for another run may have been killed before it was.
    steps.clear()
    roots.Roots(str(tmp_path), "node").set("layer", [made(3)])
    assert steps == [*above, ("nixlet/node/layer", [made(3).name]), named]


def test_what_an_older_version_left_half_made_can_be_removed(gc_roots: roots.Roots, tmp_path: Path) -> None:
    (tmp_path / "nixlet" / "node" / ".new-crashed").mkdir(parents=True)
    assert gc_roots.names() == [".new-crashed"]
    gc_roots.remove(".new-crashed")
    assert os.listdir(tmp_path) == []


def test_threads_and_owners_do_not_get_in_each_others_way(tmp_path: Path) -> None:
    failures: list[Exception] = []
    shared = roots.Roots(str(tmp_path), "shared")

    def work(own: roots.Roots) -> None:
        try:
            for number in range(40):
                for gc_roots in (own, shared):
                    gc_roots.set("layer", [made(number)])
                    gc_roots.remove("layer")
        except (errors.NixletError, OSError) as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(roots.Roots(str(tmp_path), f"o{number}"),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert os.listdir(tmp_path) == []


def test_a_directory_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "nixlet").write_text("in the way")
    with pytest.raises(errors.FailedPreconditionError, match=f"can't change the GC roots in {tmp_path}/nixlet/node"):
        roots.Roots(str(tmp_path), "node").set("layer", [made(1)])


def test_a_read_only_file_system_is_told() -> None:
    # Nothing can be made in /proc, by nobody.
    with pytest.raises(
        (errors.FailedPreconditionError, errors.PermissionDeniedError), match="can't change the GC roots"
    ):
        roots.Roots("/proc", "node").set("layer", [made(1)])


@given(st.dictionaries(st.integers(0, 12), st.sets(st.integers(0, 14), max_size=4), max_size=12))
def test_the_top_paths_reach_every_member(graph: dict[int, set[int]]) -> None:
    infos = {made(number): known(number, references) for number, references in graph.items()}
    tops = interface.top_paths(infos)
    reached: set[paths.StorePath] = set()
    pending = list(tops)
    while pending:
        path = pending.pop()
        if path in infos and path not in reached:
            reached.add(path)
            pending.extend(infos[path].references)
    assert reached == infos.keys()
    assert len(set(tops)) == len(tops)


def test_only_what_nothing_refers_to_needs_a_root() -> None:
    chain = {made(n): known(n, [n, n + 1, 99]) for n in range(5)}
    assert interface.top_paths(chain) == (made(0),)
    circle = {made(0): known(0, [1]), made(1): known(1, [0])}
    assert len(interface.top_paths(circle)) == 1
    assert interface.top_paths({}) == ()


def test_deny_wants_somebody_to_vouch_for_each_path() -> None:
    deny = policy.Policy("deny")
    deny.check([known(1, ultimate=True), known(2, signatures=frozenset({"k:s"})), known(3, content_address="text:x")])
    with pytest.raises(errors.PermissionDeniedError, match=f"{made(4)} is unsigned") as caught:
        deny.check([known(1, ultimate=True), known(4)])
    assert "nix store sign" in caught.value.hint
    policy.Policy("allow").check([known(4)])
    assert (deny.restricts, policy.Policy().restricts) == (True, False)


def test_an_interrupted_change_leaves_the_old_roots(
    gc_roots: roots.Roots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gc_roots.set("layer", [made(1)])

    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "symlink", full)
    with pytest.raises(errors.ResourceExhaustedError, match="No space left on device"):
        gc_roots.set("layer", [made(2)])
    assert gc_roots.paths("layer") == [made(1).name]
    assert os.listdir(tmp_path / "nixlet" / "node") == ["layer"]
    shutil.rmtree(tmp_path / "nixlet")


@pytest.mark.parametrize("killed_at", range(3))
def test_whoever_makes_a_directory_and_is_killed_hides_it_from_nobody(
    gc_roots: roots.Roots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    """It has the mode that the umask leaves, until it is used again."""
    chmod, left = os.chmod, [None] * killed_at

    def killed(path: str, mode: int) -> None:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        chmod(path, mode)

    umask = os.umask(0o077)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "chmod", killed)
            with pytest.raises(KeyboardInterrupt):
                gc_roots.set("layer", [made(1)])
        places = [tmp_path / "nixlet", tmp_path / "nixlet/node", tmp_path / "nixlet/node/layer"]
        assert places[killed_at].stat().st_mode & 0o7777 == 0o700
        roots.Roots(str(tmp_path), "node").set("layer", [made(1)])
    finally:
        os.umask(umask)
    assert [place.stat().st_mode & 0o7777 for place in places] == [0o755] * 3


@pytest.mark.parametrize("place", ["nixlet", "nixlet/node", "nixlet/node/layer", "nixlet/node/layer/own"])
def test_what_is_somebodys_own_is_neither_entered_nor_removed(
    gc_roots: roots.Roots, tmp_path: Path, place: str
) -> None:
    """As a link into the store, whose links would be deleted in it."""
    environment = tmp_path / "environment"
    (environment / "node/layer").mkdir(parents=True)
    for directory in (environment, environment / "node", environment / "node/layer"):
        (directory / "bin").symlink_to("/elsewhere")
    own = tmp_path / place
    own.parent.mkdir(parents=True, exist_ok=True)
    if place.endswith("own"):
        own.write_text("")
    else:
        own.symlink_to(environment)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(errors.FailedPreconditionError, match=f"{own} is none of them, and stays") as caught:
        gc_roots.remove("layer")
    assert "move it" in caught.value.hint
    with pytest.raises(errors.FailedPreconditionError, match=f"{own} is none of them, and stays"):
        gc_roots.set("layer", [made(1)])
    with pytest.raises(errors.FailedPreconditionError, match="is none of them"):
        gc_roots.paths("layer")
    assert sorted(tmp_path.rglob("*")) == before
    # What is beside it is none the worse for it.
    if place == "nixlet/node/layer":
        assert gc_roots.names() == ["layer"]
        gc_roots.set("other", [made(1)])
        gc_roots.remove("other")
        assert gc_roots.names() == ["layer"]
