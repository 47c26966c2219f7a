"""The layer of a Nix image: what it has where, and the same bytes every time."""

import gzip
import hashlib
import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixlet import errors
from nixlet.images import layers
from nixlet.store import paths


class Store:
    """Directories and files with store paths' names, below a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.count = 0

    def path(self, name: str) -> paths.StorePath:
        self.count += 1
        return paths.parse(f"{self.directory}/{self.count:032}-{name}", str(self.directory))

    def tree(self, name: str, *files: str) -> paths.StorePath:
        made = self.path(name)
        os.mkdir(made)
        for file in files:
            place = Path(made, file)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(file)
        return made


@pytest.fixture
def store(tmp_path: Path) -> Store:
    (tmp_path / "store").mkdir()
    return Store(tmp_path / "store")


def relative(path: str) -> str:
    return path.removeprefix("/")


def test_mount_points_have_the_kind_of_their_path(store: Store) -> None:
    directory, file, link, directory_link, broken = (store.path(name) for name in ("d", "f", "l", "dl", "b"))
    os.mkdir(directory)
    Path(file).write_text("content")
    os.symlink(file, link)
    os.symlink(directory, directory_link)
    os.symlink("/nowhere", broken)
    closure = [directory, file, link, directory_link, broken]
    planned = layers.plan(closure, [])
    assert [planned[relative(path)].kind for path in closure] == ["directory", "file", "file", "directory", "file"]
    parents = planned.keys() - {relative(path) for path in closure}
    assert all(planned[parent].kind == "directory" for parent in parents)
    assert relative(str(store.directory)) in parents


def test_trees_are_joined_by_links(store: Store) -> None:
    one = store.tree("one", "bin/a", "share/doc/x")
    two = store.tree("two", "bin/b", "share/doc/y", "etc/z")
    os.mkdir(f"{one}/empty")
    os.symlink("bin", f"{one}/sbin")
    planned = layers.plan([], [one, two])
    assert planned == {
        "bin": layers.Entry("directory"),
        "bin/a": layers.Entry("link", f"{one}/bin/a"),
        "bin/b": layers.Entry("link", f"{two}/bin/b"),
        "empty": layers.Entry("directory"),
        "etc": layers.Entry("directory"),
        "etc/z": layers.Entry("link", f"{two}/etc/z"),
        "sbin": layers.Entry("link", f"{one}/sbin"),
        "share": layers.Entry("directory"),
        "share/doc": layers.Entry("directory"),
        "share/doc/x": layers.Entry("link", f"{one}/share/doc/x"),
        "share/doc/y": layers.Entry("link", f"{two}/share/doc/y"),
    }
    assert list(planned) == sorted(planned)


def test_links_to_directories_are_looked_into_where_trees_overlap(store: Store) -> None:
    package = store.tree("package", "bin/a", "lib/x")
    environment = store.tree("environment", "share/y")
    os.symlink(f"{package}/bin", f"{environment}/bin")
    os.symlink(f"{package}/lib", f"{environment}/lib")
    other = store.tree("other", "bin/b")
    planned = layers.plan([], [environment, other])
    assert planned["bin/a"] == layers.Entry("link", f"{environment}/bin/a")
    assert planned["bin/b"] == layers.Entry("link", f"{other}/bin/b")
    assert planned["lib"] == layers.Entry("link", f"{environment}/lib")


def test_the_same_file_in_two_trees_is_no_conflict(store: Store) -> None:
    package = store.tree("package", "bin/a")
    trees = [store.tree("one"), store.tree("two")]
    for tree in trees:
        os.mkdir(f"{tree}/bin")
        os.symlink(f"{package}/bin/a", f"{tree}/bin/a")
    assert layers.plan([], trees)["bin/a"] == layers.Entry("link", f"{trees[0]}/bin/a")


@pytest.mark.parametrize(("first", "second"), [("x", "x/y"), ("x/y", "x"), ("x", "x"), ("a/x", "a/x")])
def test_conflicts_name_both(store: Store, first: str, second: str) -> None:
    one, two = store.tree("one", first), store.tree("two", second)
    with pytest.raises(errors.InvalidArgumentError) as caught:
        layers.plan([], [one, two])
    place = os.path.commonpath([first, second])
    assert str(caught.value) == f"{one}/{place} and {two}/{place} can't both be /{place}"


def test_trees_that_go_round_in_circles(store: Store) -> None:
    trees = [store.tree("one"), store.tree("two")]
    for tree in trees:
        os.symlink(".", f"{tree}/self")
    with pytest.raises(errors.InvalidArgumentError, match="can't both be /self/self"):
        layers.plan([], trees)


def test_a_link_where_the_store_must_be(store: Store) -> None:
    first = relative(str(store.directory)).partition("/")[0]
    tree, path = store.tree("tree", first), store.tree("path")
    with pytest.raises(
        errors.InvalidArgumentError, match=f"{tree}/{first} can't be /{first}: the store path {path} needs"
    ):
        layers.plan([path], [tree])


def test_what_cant_be_copied(store: Store) -> None:
    file = store.path("file")
    with pytest.raises(errors.NotFoundError, match=f"{file} does not exist"):
        layers.plan([], [file])
    with pytest.raises(errors.NotFoundError, match=f"{file} does not exist"):
        layers.plan([file], [])
    Path(file).write_text("x")
    with pytest.raises(errors.InvalidArgumentError, match="it is no directory"):
        layers.plan([], [file])


def test_golden_bytes() -> None:
    entries = {
        "bin": layers.Entry("directory"),
        "bin/hello": layers.Entry("link", "/nix/store/0c0qxbrxlfz2nzi6jxz6a3ssa0cl6lrw-hello/bin/hello"),
        "nix": layers.Entry("directory"),
        "nix/store": layers.Entry("directory"),
        "nix/store/0c0qxbrxlfz2nzi6jxz6a3ssa0cl6lrw-hello": layers.Entry("directory"),
        "nix/store/1c0qxbrxlfz2nzi6jxz6a3ssa0cl6lrw-file": layers.Entry("file"),
        "share/" + "n" * 120: layers.Entry("link", "/nix/store/" + "t" * 150),
        "share/é": layers.Entry("link", "/ü"),
    }
    blob = layers.render(entries)
    assert blob == layers.render(entries)
    # The header has neither a time nor a system; the digest is of the tar file, which no compressor's version changes.
    assert blob.content[:10] == bytes.fromhex("1f8b08000000000000ff")
    assert blob.diff_id == "sha256:f765abb4cc2cbf8ff72c171744e4a287cfa0b96b366b7c18549fb39fcdc57de0"
    plain = gzip.decompress(blob.content)
    assert f"sha256:{hashlib.sha256(plain).hexdigest()}" == blob.diff_id
    with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == list(entries)
    assert {(m.uid, m.gid, m.uname, m.gname, m.mtime) for m in members} == {(0, 0, "", "", 0)}
    assert {m.mode for m in members if m.isdir()} == {0o755}
    assert {(m.mode, m.size) for m in members if m.isfile()} == {(0o555, 0)}
    assert [m.linkname for m in members if m.issym()] == [e.target for e in entries.values() if e.kind == "link"]


NAME = st.text(st.characters(exclude_characters="/\x00", codec="utf-8"), min_size=1, max_size=150).filter(
    lambda name: name not in {".", ".."}
)


@given(
    st.dictionaries(
        st.lists(NAME, min_size=1, max_size=4).map("/".join), st.text(min_size=1).filter(lambda t: "\x00" not in t)
    )
)
def test_any_names_survive(links: dict[str, str]) -> None:
    blob = layers.render({name: layers.Entry("link", target) for name, target in links.items()})
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(blob.content))) as tar:
        assert {member.name: member.linkname for member in tar} == links
