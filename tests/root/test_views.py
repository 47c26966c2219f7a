"""Views: what a container sees of a closure, in every form that a store path can have."""

import contextlib
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.host import mounts
from nixlet.snapshots import model, views


class Place:
    """A store and a directory for views, the latter perhaps on a file system of its own."""

    def __init__(self, directory: Path) -> None:
        self.store = directory / "store"
        self.views_dir = directory / "fs" / "views"
        self.store.mkdir()

    def views(self) -> views.Views:
        self.views_dir.mkdir(exist_ok=True)
        return views.Views(str(self.views_dir), store_dir="/nix/store", real_store_dir=str(self.store))

    def seen(self, number: int | str) -> Path:
        return self.views_dir / str(number) / "v" / "nix" / "store"


def show(made: views.Views, names: Iterable[str], strategy: model.Strategy = model.Strategy.VIEW) -> str:
    """Show closure 1."""
    seen, missing = made.look(names)
    assert not missing
    return made.show(1, seen, strategy)


@pytest.fixture(params=["same file system", "another file system"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    (tmp_path / "fs").mkdir()
    if request.param != "same file system":
        mounts.mount("tmpfs", str(tmp_path / "fs"), "tmpfs")
    yield Place(tmp_path)
    for entry in reversed(mounts.below(str(tmp_path))):
        mounts.unmount(entry.path)


def fill(store: Path) -> list[str]:
    package = store / "pkg"
    (package / "bin").mkdir(parents=True)
    (package / "bin" / "tool").write_text("tool")
    (package / "bin" / "tool").chmod(0o555)
    (store / "empty").mkdir()
    (store / "file").write_text("small")
    (store / "file").chmod(0o444)
    (store / "program").write_bytes(b"#!/bin/sh\n" + b"x" * 200_000)
    (store / "program").chmod(0o555)
    (store / "link").symlink_to("/nix/store/pkg/bin/tool")
    (store / "dangling").symlink_to("/nowhere")
    odd = "a+b-c._?=Z"
    (store / odd).mkdir()
    for path in (package, store / "empty", store / "file", store / "program", store / odd):
        os.utime(path, (1, 1))
    package.chmod(0o555)
    (store / "secret").mkdir()
    (store / "secret" / "key").write_text("secret")
    return ["pkg", "empty", "file", "program", "link", "dangling", odd]


def test_a_view_shows_exactly_its_closure(place: Place) -> None:
    names = fill(place.store)
    show(place.views(), names)
    seen = place.seen(1)
    assert sorted(os.listdir(seen)) == sorted(names)
    assert (seen / "pkg/bin/tool").read_text() == "tool"
    assert os.listdir(seen / "empty") == []
    assert (seen / "file").read_text() == "small"
    assert (seen / "program").read_bytes() == (place.store / "program").read_bytes()
    assert os.readlink(seen / "link") == "/nix/store/pkg/bin/tool"
    assert os.readlink(seen / "dangling") == "/nowhere"
    assert not (seen / "secret").exists()
    for name in names:
        here, there = os.lstat(seen / name), os.lstat(place.store / name)
        assert stat.S_IFMT(here.st_mode) == stat.S_IFMT(there.st_mode)
        assert (here.st_mode, here.st_uid, here.st_gid) == (there.st_mode, there.st_uid, there.st_gid)
        # A directory's size is its file system's business.
        assert stat.S_ISDIR(here.st_mode) or here.st_size == there.st_size
        assert here.st_mtime == there.st_mtime
    assert stat.S_IMODE(os.stat(seen / "pkg").st_mode) == 0o555
    # Nobody can write to what many containers share.
    with pytest.raises(OSError, match="Read-only"):
        (seen / "new").write_text("x")


def test_a_big_plain_file_is_not_copied_to_another_file_system(place: Place) -> None:
    names = fill(place.store)
    show(place.views(), names)
    meta = place.views_dir / "1.meta"
    used = sum(os.lstat(base + "/" + name).st_blocks * 512 for base, _, files in os.walk(meta) for name in files)
    linked = os.stat(meta / "v/nix/store/program").st_ino == os.stat(place.store / "program").st_ino
    assert linked or used < 100_000


def test_a_view_is_made_once_and_taken_away_whole(place: Place) -> None:
    names = fill(place.store)
    made = place.views()
    before = len(list(mounts.table()))
    show(made, names)
    show(made, names)
    assert len(list(mounts.table())) == before + 1
    assert made.layer(1, model.Strategy.VIEW) == f"{place.views_dir}/1/v"
    assert made.numbers() == {1}
    made.remove(1)
    assert len(list(mounts.table())) == before
    assert os.listdir(place.views_dir) == []
    made.remove(1)
    assert (place.store / "file").read_text() == "small"


def test_a_missing_path_is_named_and_nothing_is_left(place: Place) -> None:
    made = place.views()
    assert made.look(["gone"]) == ({}, ["gone"])
    with pytest.raises(errors.FailedPreconditionError, match="/nix/store/gone is missing from the Nix store") as caught:
        made.show(1, {"gone": views.Seen(1, 2, 3, stat.S_IFDIR | 0o555, 0, 0, "")})
    assert caught.value.hint == "bring it back with: nix-store --realise /nix/store/gone"
    assert os.listdir(place.views_dir) == []


def test_metadata_of_a_crash_is_made_anew(place: Place) -> None:
    names = fill(place.store)
    made = place.views()
    (place.views_dir / "1.meta.new" / "v").mkdir(parents=True)
    assert made.numbers() == {1}
    show(made, names)
    assert sorted(os.listdir(place.seen(1))) == sorted(names)


@contextlib.contextmanager
def container(place: Place, *layers: str) -> Iterator[Path]:
    """A container's root over some layers, as containerd would mount it."""
    base = place.views_dir.parent
    for name in ("upper", "work", "root"):
        (base / name).mkdir()
    options = f"lowerdir={':'.join(layers)},upperdir={base}/upper,workdir={base}/work"
    mounts.mount("overlay", str(base / "root"), "overlay", 0, options)
    try:
        yield base / "root"
    finally:
        mounts.unmount(str(base / "root"))


def test_a_hostile_layer_reaches_nothing_through_a_view(place: Place) -> None:
    """Layers that carry overlayfs's own attributes, above and below the view."""
    names = fill(place.store)
    made = place.views()
    layer = show(made, names)
    hostile = place.views_dir.parent / "hostile"
    for number, target in enumerate(
        ("/secret", "/nix/store/secret", "/store/secret", "/v/nix/store/secret", "/../store")
    ):
        trap = hostile / f"trap{number}"
        trap.mkdir(parents=True)
        os.setxattr(trap, "trusted.overlay.redirect", target.encode())
    file = hostile / "file-trap"
    file.write_bytes(b"")
    os.truncate(file, 6)
    os.setxattr(file, "trusted.overlay.metacopy", b"")
    os.setxattr(file, "trusted.overlay.redirect", b"/secret/key")
    for layers in ((str(hostile), layer), (layer, str(hostile))):
        with container(place, *layers) as root:
            found = []
            for base, directories, files in os.walk(root):
                found += [f"{base}/{name}" for name in (*directories, *files) if name in {"secret", "key"}]
            assert found == []
            with contextlib.suppress(OSError):
                assert b"secret" not in (root / "file-trap").read_bytes()
        for name in ("upper", "work", "root"):
            os.system(f"rm -rf {place.views_dir.parent}/{name}")


def test_an_unmounted_view_harms_no_running_container(place: Place) -> None:
    names = fill(place.store)
    made = place.views()
    with container(place, show(made, names)) as root:
        made.unmount_all()
        assert not mounts.is_mount_point(str(place.views_dir / "1"))
        assert (root / "nix/store/pkg/bin/tool").read_text() == "tool"
        assert (root / "nix/store/file").read_text() == "small"


def _replace_directory(path: Path) -> None:
    """With the same number, as file systems give it to the next file, where they do."""
    shutil.rmtree(path)
    path.mkdir()
    (path / "new").write_text("new")


def _replace_file(path: Path) -> None:
    path.unlink()
    path.write_text("new")


def _turn_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/nix/store/new")


def _turn_into_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("new")


@pytest.mark.parametrize("strategy", list(model.Strategy))
@pytest.mark.parametrize(
    ("name", "replace"),
    [
        ("pkg", _replace_directory),
        ("file", _replace_file),
        ("program", _replace_file),
        ("link", _turn_link),
        ("empty", _turn_into_file),
        ("pkg", lambda path: path.chmod(0o500)),
    ],
    ids=["directory", "file", "large file", "link", "directory to file", "mode"],
)
def test_the_next_container_sees_what_was_replaced_and_one_that_runs_keeps_what_it_has(
    place: Place, strategy: model.Strategy, name: str, replace: Callable[[Path], object]
) -> None:
    def look(layer: str) -> object:
        path = Path(layer) / "nix" / "store" / name
        status = path.lstat()
        if path.is_symlink():
            return os.readlink(path)
        if path.is_dir():
            return status.st_mode, sorted(os.listdir(path))
        return path.read_bytes()

    def there() -> object:
        path = place.store / name
        if path.is_symlink():
            return os.readlink(path)
        # A skeleton has mount points only.
        listed = sorted(os.listdir(path)) if path.is_dir() and strategy is model.Strategy.VIEW else []
        return (path.stat().st_mode, listed) if path.is_dir() else path.read_bytes()

    names = fill(place.store)
    made = place.views()
    before = show(made, names, strategy)
    with container(place, before) as root:
        had = look(str(root))
        replace(place.store / name)
        now = show(made, names, strategy)
        assert look(now) == there()
        # A directory that was deleted, and not renamed away, is empty for everybody who had it.
        assert look(str(root)) == had or replace is _replace_directory
        # Nothing changes without a reason, and the one before is there for a container that is just starting.
        assert show(made, names, strategy) == now
        assert len([*mounts.below(str(place.views_dir))]) <= 2
    # What comes after a restart, without knowledge of what is mounted.
    again = show(place.views(), names, strategy)
    assert look(again) == there()
    made.remove(1)
    assert os.listdir(place.views_dir) == []
    assert mounts.below(str(place.views_dir)) == []


@pytest.mark.parametrize("strategy", list(model.Strategy))
def test_what_was_made_before_the_machine_started_is_made_again(place: Place, strategy: model.Strategy) -> None:
    """A power cut leaves names without content: nothing is trusted that was not made in this boot."""
    names = fill(place.store)
    place.views_dir.mkdir(exist_ok=True)

    def in_boot(boot: str) -> views.Views:
        return views.Views(str(place.views_dir), store_dir="/nix/store", real_store_dir=str(place.store), boot=boot)

    first = in_boot("first")
    show(first, names, strategy)
    first.unmount_all()
    (tree,) = [entry for entry in place.views_dir.iterdir() if entry.suffix]
    (tree / "v/nix/store/file").unlink()
    (tree / "v/nix/store/file").touch()
    layer = show(in_boot("second"), names, strategy)
    assert (Path(layer) / "nix/store/file").read_text() == "small"
    assert [entry for entry in place.views_dir.iterdir() if entry.suffix] == [tree]


def test_a_view_that_somebody_is_in_goes_all_the_same(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    made = place.views()
    monkeypatch.chdir(show(made, fill(place.store)))
    made.remove(1)
    assert os.listdir(place.views_dir) == []
    assert mounts.below(str(place.views_dir)) == []


def test_one_view_that_stays_mounted_keeps_no_other(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = place.views()
    names = fill(place.store)
    seen, _ = made.look(names)
    for number in (1, 2, 3):
        made.show(number, seen)
    unmount = mounts.unmount

    def refuse(target: str, flags: int = 0) -> None:
        if target.endswith("/2"):
            raise errors.FailedPreconditionError("can't unmount it")
        unmount(target, flags)

    with monkeypatch.context() as patch:
        patch.setattr(mounts, "unmount", refuse)
        made.unmount_all()
        made.remove(3)
    assert [entry.path for entry in mounts.below(str(place.views_dir))][-1:] == [str(place.views_dir / "2")]
    assert f"the view {place.views_dir}/2 stays mounted: can't unmount it" in caplog.text
    made.unmount_all()


@pytest.mark.parametrize("within", ["pkg", "pkg/bin", "program"])
def test_a_path_that_something_is_mounted_on_is_refused_where_that_would_not_be_seen(place: Place, within: str) -> None:
    made, names = place.views(), fill(place.store)
    covered = place.store / within
    other = place.store.parent / "other"
    if covered.is_dir():
        other.mkdir()
    else:
        other.write_text("another")
    # Of the same file system, and recognised all the same.
    mounts.mount(str(other), str(covered), "", mounts.MS_BIND)
    with pytest.raises(errors.FailedPreconditionError, match=f"something is mounted on {covered}, which") as caught:
        show(made, names)
    assert caught.value.hint == f"unmount it: umount {covered}"
    assert os.listdir(place.views_dir) == []
    # What is not in the closure is none of its business; and bind mounts show what is mounted.
    show(made, [name for name in names if name != within.partition("/")[0]])
    show(made, names, model.Strategy.BIND)
    mounts.unmount(str(covered))
    show(made, names)


def test_a_directory_that_has_the_number_of_the_one_before_is_shown_by_a_new_mount(place: Place) -> None:
    made, names = place.views(), fill(place.store)
    seen, _ = made.look(names)
    before = made.show(1, seen)
    assert made.show(1, seen) == before
    later = {**seen, "pkg": seen["pkg"]._replace(changed=seen["pkg"].changed + 1)}
    assert made.show(1, later) != before


def test_a_container_that_was_given_the_view_before_can_still_start(place: Place) -> None:
    made, names = place.views(), fill(place.store)
    before = show(made, names)
    os.rename(place.store / "pkg", place.store / "old")
    (place.store / "pkg").mkdir()
    assert show(made, names) != before
    with container(place, before) as root:
        assert sorted(os.listdir(root / "nix/store")) == sorted(names)
