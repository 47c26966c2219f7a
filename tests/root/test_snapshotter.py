"""The snapshotter with a real, private Nix store and real mounts, without containerd."""

import asyncio
import contextlib
import os
import shutil
import stat
import subprocess
import threading
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from nixlet import errors
from nixlet.host import mounts
from nixlet.snapshots import closures, faults, metadata, model, tables
from nixlet.store import closures as closure_references
from nixlet.store import paths, roots
from support import disks
from support.nixstore import PrivateStore
from support.snapshotters import LAYER, PATH, Rig, option


def closure_of(rig: Rig, name: str) -> tuple[str, ...]:
    """The store paths that a committed snapshot and its ancestors bring along, sorted."""
    known = rig.snapshotter._db
    row = known.get(name)
    layers = [tables.Layer(row.id, row.closure), *known.chain(row.parent)]
    names = {name for layer in layers if layer.closure for name in known.closure(layer.closure).names}
    return tuple(f"{rig.store.store_dir}/{name}" for name in sorted(names))


@pytest.fixture(params=["view", "bind"])
async def rig(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    store = PrivateStore(tmp_path / "nix")
    store.add("seed", "so that the store is there")
    made = Rig(tmp_path, store, request.param)
    await made.snapshotter.start()
    # Finding it out takes a path of the store as its example, which a test may delete.
    await made.snapshotter.strategy()
    yield made
    await made.snapshotter.close()
    made.snapshotter.unmount_views()
    assert mounts.below(str(tmp_path)) == []
    store.remove()


@contextlib.contextmanager
def seen(rig: Rig, made: Sequence[model.Mount]) -> Iterator[Path]:
    """What a container would see: the mounts made as containerd makes them."""
    root = rig.root.parent / "mnt"
    root.mkdir(exist_ok=True)
    try:
        for mount in made:
            target = str(root) + mount.target
            if mount.type == "overlay":
                mounts.mount("overlay", target, "overlay", 0, ",".join(mount.options))
            else:
                assert mount.options == ("ro", "rbind")
                mounts.mount(mount.source, target, "", mounts.MS_BIND | mounts.MS_REC)
        yield root
    finally:
        for entry in reversed(mounts.below(str(root))):
            mounts.unmount(entry.path)


def content(rig: Rig, made: Sequence[model.Mount]) -> dict[str, list[str]]:
    """The store paths that a container would see, with the names in each."""
    with seen(rig, made) as root:
        store = str(root) + rig.store.store_dir
        return {name: sorted(os.listdir(f"{store}/{name}")) for name in os.listdir(store)}


def shown(**paths: str) -> dict[str, list[str]]:
    """The content of store paths with one file each."""
    return {os.path.basename(path): [name] for name, path in paths.items()}


async def test_a_container_sees_the_closure(rig: Rig) -> None:
    one, two = rig.store.add("one", {"f": "1"}), rig.store.add("two", {"g": "2"})
    await rig.layer("layer", [one, two])
    made = await rig.snapshotter.prepare("container", "layer", {})
    assert made[0].type == "overlay"
    # Plain options, which every containerd knows: one mount for a view, one more for each path with bind mounts.
    assert {each.target for each in made[1:]} == (set() if rig.strategy == "view" else {one, two})
    assert content(rig, made) == shown(f=one, g=two)
    assert await rig.snapshotter.mounts("container") == made


async def test_a_view_of_a_nix_layer_is_read_only_and_shows_the_closure(rig: Rig) -> None:
    one = rig.store.add("one", {"f": "1"})
    await rig.layer("layer", [one])
    made = await rig.snapshotter.view("look", "layer", {})
    assert not any(each.startswith("upperdir") for each in made[0].options)
    assert content(rig, made) == shown(f=one)


async def test_the_closure_survives_commits_and_updates_without_labels(rig: Rig) -> None:
    one = rig.store.add("one", {"f": "1"})
    labels = {model.SNAPSHOT_REF_LABEL: "layer", LAYER: "true", f"{PATH}0": one}
    await rig.snapshotter.prepare("ns/1/extract-1 layer", "", labels)
    await rig.snapshotter.commit("layer", "ns/1/extract-1 layer", {})
    await rig.snapshotter.update("layer", {}, None)
    assert closure_of(rig, "layer") == (one,)
    made = await rig.snapshotter.prepare("container", "layer", {})
    assert content(rig, made) == shown(f=one)


async def test_labels_of_a_containers_own_snapshot_select_nothing(rig: Rig) -> None:
    one, two = rig.store.add("one", {"f": "1"}), rig.store.add("two", {"f": "2"})
    await rig.layer("layer", [one])
    for key, labels in (
        ("container", {LAYER: "true", f"{PATH}0": two}),
        # Without a chain ID to be committed as it is no unpack, whatever its key.
        ("ns/1/extract-x", {LAYER: "true", f"{PATH}0": two}),
        ("ns/1/container", {LAYER: "true", f"{PATH}0": two, model.SNAPSHOT_REF_LABEL: "y"}),
    ):
        made = await rig.snapshotter.prepare(key, "layer", labels)
        assert content(rig, made) == shown(f=one)


async def test_a_layer_that_was_unpacked_without_labels_is_mended(rig: Rig) -> None:
    one = rig.store.add("one", {"f": "1"})
    await rig.layer("layer", [one], labelled=False)
    made = await rig.snapshotter.prepare("before", "layer", {})
    assert [mount.type for mount in made] == ["overlay"]
    assert closure_of(rig, "layer") == ()
    await rig.snapshotter.update("layer", {LAYER: "true", f"{PATH}0": one}, [f"labels.{LAYER}", f"labels.{PATH}0"])
    assert closure_of(rig, "layer") == (one,)
    made = await rig.snapshotter.prepare("after", "layer", {})
    assert (await rig.snapshotter.mounts("before"))[0].options != made[0].options
    assert content(rig, made) == shown(f=one)


async def test_labels_dont_say_that_a_layer_has_another_closure(rig: Rig) -> None:
    one, two = rig.store.add("one", {"f": "1"}), rig.store.add("two", {"f": "2"})
    await rig.layer("layer", [one])
    with pytest.raises(errors.FailedPreconditionError, match="the layer layer has another closure already"):
        await rig.snapshotter.update("layer", {f"{PATH}0": two}, [f"labels.{PATH}0"])
    assert (await rig.snapshotter.stat("layer")).labels[f"{PATH}0"] == one
    # The same closure, however it is named.
    await rig.snapshotter.update("layer", {f"{PATH}7": one, "a": "b"}, [f"labels.{PATH}7", "labels.a"])
    assert (await rig.snapshotter.stat("layer")).labels["a"] == "b"
    assert closure_of(rig, "layer") == (one,)


async def test_a_layer_is_not_committed_with_another_closure_than_it_was_unpacked_with(rig: Rig) -> None:
    one, two = rig.store.add("one", {"f": "1"}), rig.store.add("two", {"f": "2"})
    key, labels = "ns/1/extract-1 layer", {model.SNAPSHOT_REF_LABEL: "layer", LAYER: "true"}
    await rig.snapshotter.prepare(key, "", {**labels, f"{PATH}0": one})
    with pytest.raises(errors.FailedPreconditionError, match="the layer layer was unpacked with another closure"):
        await rig.snapshotter.commit("layer", key, {**labels, f"{PATH}0": two})
    await rig.snapshotter.commit("layer", key, {**labels, f"{PATH}5": one})
    assert closure_of(rig, "layer") == (one,)


async def test_a_layer_is_not_mended_with_a_closure_that_lacks_what_it_needs(rig: Rig) -> None:
    one, two = rig.store.add("one", {"f": "1"}), rig.store.add("two", {"f": "2"})
    await rig.layer("layer", [one], labelled=False)
    with pytest.raises(errors.FailedPreconditionError, match=f"a mount point for {one}, which its closure lacks"):
        await rig.snapshotter.update("layer", {LAYER: "true", f"{PATH}0": two}, [f"labels.{LAYER}", f"labels.{PATH}0"])
    assert LAYER not in (await rig.snapshotter.stat("layer")).labels
    assert closure_of(rig, "layer") == ()
    await rig.snapshotter.cleanup()
    assert rig.roots.names() == []


async def test_a_layer_is_mended_with_what_is_there_and_nothing_is_fetched(rig: Rig) -> None:
    one = rig.store.add("one", {"f": "1"})
    cache = rig.store.directory / "cache"
    rig.store.nix("nix", "copy", "--to", f"file://{cache}", one)
    rig.store.nix("nix-store", "--delete", one)
    with (rig.store.directory / "conf" / "nix.conf").open("a") as conf:
        conf.write(f"substituters = file://{cache}\nrequire-sigs = false\n")
    await rig.layer("layer", [one], labelled=False)
    labels = {LAYER: "true", f"{PATH}0": one}
    with pytest.raises(errors.FailedPreconditionError, match=f"{one} is not in the Nix store") as caught:
        await rig.snapshotter.update("layer", labels, [f"labels.{LAYER}", f"labels.{PATH}0"])
    assert not os.path.exists(one)
    assert LAYER not in (await rig.snapshotter.stat("layer")).labels
    # As the hint says.
    rig.store.nix(*caught.value.hint.partition(": ")[2].split())
    await rig.snapshotter.update("layer", labels, [f"labels.{LAYER}", f"labels.{PATH}0"])
    assert content(rig, await rig.snapshotter.prepare("container", "layer", {})) == shown(f=one)


async def test_images_that_share_a_closure_share_its_view(rig: Rig) -> None:
    one = rig.store.add("one", {"f": "1"})
    await rig.layer("a", [one])
    await rig.layer("b", [one])
    first, *_ = await rig.snapshotter.prepare("c1", "a", {})
    second, *_ = await rig.snapshotter.prepare("c2", "b", {})
    assert option(first, "lowerdir").split(":")[0] == option(second, "lowerdir").split(":")[0]
    assert len(mounts.below(str(rig.root))) == (1 if rig.strategy == "view" else 0)


async def test_two_nix_layers_with_an_ordinary_one_between(rig: Rig) -> None:
    one, two, three = (rig.store.add(name, {"f": name}) for name in ("one", "two", "three"))
    await rig.layer("a", [one, three])
    mount, *_ = await rig.snapshotter.prepare("ns/1/extract-2 b", "a", {model.SNAPSHOT_REF_LABEL: "b"})
    edited = Path(option(mount, "upperdir") + one)
    edited.mkdir(parents=True)
    (edited / "g").write_text("added")
    # The layer also removes a store path, and has a directory by the name of one that no closure here brings along.
    os.mknod(option(mount, "upperdir") + three, stat.S_IFCHR, 0)
    foreign = rig.store.add("foreign", {"f": "secret"})
    Path(option(mount, "upperdir") + foreign).mkdir()
    await rig.snapshotter.commit("b", "ns/1/extract-2 b", {})
    await rig.layer("c", [two], "b")
    made = await rig.snapshotter.prepare("container", "c", {})
    assert content(rig, made) == {
        # A bind mount covers what an ordinary layer adds to a store path.
        os.path.basename(one): ["f", "g"] if rig.strategy == "view" else ["f"],
        os.path.basename(two): ["f"],
        os.path.basename(foreign): [],
    }


@pytest.mark.parametrize("kind", ["opaque", "link", "file"])
async def test_an_ordinary_layer_that_hides_the_store_hides_it(rig: Rig, kind: str) -> None:
    one = rig.store.add("one", {"f": "1"})
    await rig.layer("a", [one])
    mount, *_ = await rig.snapshotter.prepare("ns/1/extract-2 b", "a", {model.SNAPSHOT_REF_LABEL: "b"})
    above = Path(option(mount, "upperdir") + rig.store.store_dir)
    above.parent.mkdir(parents=True)
    if kind == "opaque":
        above.mkdir()
        os.setxattr(above, "trusted.overlay.opaque", b"y")
    elif kind == "link":
        above.symlink_to(rig.store.store_dir)
    else:
        above.write_text("")
    await rig.snapshotter.commit("b", "ns/1/extract-2 b", {})
    made = await rig.snapshotter.prepare("container", "b", {})
    assert len(made) == 1
    with seen(rig, made) as root:
        store = Path(str(root) + rig.store.store_dir)
        assert store.is_symlink() if kind == "link" else store.is_file() if kind == "file" else not os.listdir(store)


async def test_paths_of_every_form_and_name(rig: Rig) -> None:
    names: dict[str, str | dict[str, str]] = {
        "plain-file": "text",
        "a+b-c.d_e?f=g": {"f": "1"},
        "x" * 150: {"f": "1"},
        "nothing-in-it": {},
    }
    paths = {name: rig.store.add(name, content) for name, content in names.items()}
    source = rig.store.directory / "sources" / "link"
    source.symlink_to(paths["plain-file"])
    # Nix adds what a link points to; a link itself comes from a build.
    drv = (
        f'derivation {{ name = "link"; system = builtins.currentSystem; builder = "/bin/sh";'
        f' args = [ "-c" "/bin/ln -s {paths["plain-file"]} $out" ]; }}'
    )
    link = rig.store.nix("nix-build", "--no-out-link", "-E", drv)
    await rig.layer("layer", [*paths.values(), link])
    made = await rig.snapshotter.prepare("container", "layer", {})
    with seen(rig, made) as root:
        assert len(os.listdir(str(root) + rig.store.store_dir)) == 5
        assert Path(str(root) + paths["plain-file"]).read_text() == "text"
        assert os.readlink(str(root) + link) == paths["plain-file"]
        assert os.listdir(str(root) + paths["nothing-in-it"]) == []
        for name in ("a+b-c.d_e?f=g", "x" * 150):
            assert os.listdir(str(root) + paths[name]) == ["f"]


@pytest.mark.slow
async def test_a_path_of_100_000_files(rig: Rig) -> None:
    """Nothing is done for each file: the closure is shown by one view, or one bind mount."""
    big = rig.store.add("big", {f"file-{number}": "" for number in range(100_000)})
    await rig.layer("layer", [big])
    made = await rig.snapshotter.prepare("container", "layer", {})
    assert len(made) == (1 if rig.strategy == "view" else 2)
    (tree,) = [*rig.root.glob("views/*.meta"), *rig.root.glob("views/*.skeleton")]
    assert [files for _, _, files in os.walk(tree) if files] == [["record.json"]]
    with seen(rig, made) as root:
        assert len(os.listdir(str(root) + big)) == 100_000


async def test_a_snapshot_keeps_its_strategy(rig: Rig) -> None:
    one = rig.store.add("one", {"f": "1"})
    await rig.layer("layer", [one])
    before = await rig.snapshotter.prepare("before", "layer", {})
    rig.strategy = "bind" if rig.strategy == "view" else "view"
    await rig.reopen()
    assert await rig.snapshotter.mounts("before") == before
    after = await rig.snapshotter.prepare("after", "layer", {})
    assert len(after) != len(before)
    assert content(rig, before) == content(rig, after) == shown(f=one)


async def test_bind_mounts_are_refused_to_a_client_that_drops_their_targets(tmp_path: Path, rig: Rig) -> None:
    async def check() -> None:
        raise errors.UnsupportedError("containerd is version 1.6.20")

    one = rig.store.add("one", {"f": "1"})
    await rig.snapshotter.close()
    rig.check_targets = check
    rig.snapshotter = rig.open()
    await rig.snapshotter.start()
    await rig.layer("layer", [one])
    if rig.strategy == "view":
        assert content(rig, await rig.snapshotter.prepare("container", "layer", {})) == shown(f=one)
    else:
        with pytest.raises(errors.UnsupportedError, match=r"version 1\.6\.20"):
            await rig.snapshotter.prepare("container", "layer", {})
        # What has no closure needs no targets.
        assert len(await rig.snapshotter.prepare("plain", "", {})) == 1


async def test_a_collected_path_is_told_with_the_way_back(rig: Rig) -> None:
    one = rig.store.add("one", {"f": "1"})
    await rig.layer("layer", [one])
    await rig.snapshotter.prepare("before", "layer", {})
    # By force, past the root that protects it.
    subprocess.run(["chmod", "-R", "u+w", rig.store.store_dir], check=True)
    subprocess.run(["rm", "-rf", one], check=True)
    rig.store.nix("nix-store", "--delete", "--ignore-liveness", one)
    with pytest.raises(errors.FailedPreconditionError, match=f"{one} is missing from the Nix store") as caught:
        await rig.snapshotter.mounts("before")
    assert caught.value.hint == f"bring it back with: nix-store --realise {one}"
    with pytest.raises(errors.FailedPreconditionError):
        await rig.snapshotter.prepare("after", "layer", {})
    with pytest.raises(errors.NotFoundError):
        await rig.snapshotter.stat("after")
    assert rig.store.add("one2", {"f": "1"})
    (rig.store.directory / "sources" / "again").mkdir()
    (rig.store.directory / "sources" / "again" / "one").mkdir()
    (rig.store.directory / "sources" / "again" / "one" / "f").write_text("1")
    assert rig.store.nix("nix-store", "--add", str(rig.store.directory / "sources/again/one")) == one
    made = await rig.snapshotter.mounts("before")
    assert content(rig, made) == shown(f=one)


async def test_a_full_disk_leaves_no_half_of_what_shows_a_closure(rig: Rig, tmp_path: Path) -> None:
    one, two = rig.store.add("one", {"f": "1"}), rig.store.add("two", {"g": "2"})
    await rig.snapshotter.close()
    kept = rig.root
    with disks.disk("tmpfs", tmp_path / "disk", 16) as small:
        rig.root = small / "root"
        rig.snapshotter = rig.open()
        try:
            await rig.snapshotter.start()
            await rig.snapshotter.strategy()
            await rig.layer("layer", [one, two])
            disks.fill(small)
            disks.leave_a_little(small)
            with pytest.raises(
                errors.ResourceExhaustedError, match=f"{rig.root} can't be used: No space left"
            ) as caught:
                await rig.snapshotter.prepare("container", "layer", {})
            assert caught.value.hint.startswith("make room")
            disks.make_room(small)
            made = await rig.snapshotter.prepare("container", "layer", {})
            assert content(rig, made) == shown(f=one, g=two)
        finally:
            await rig.snapshotter.close()
            rig.snapshotter.unmount_views()
            rig.root = kept
            rig.snapshotter = rig.open()


async def test_roots_protect_while_a_layer_needs_them_and_go_with_it(rig: Rig) -> None:
    one = rig.store.add("one", {"f": "1"})
    await rig.layer("layer", [one])
    await asyncio.to_thread(rig.store.nix, "nix-store", "--gc")
    assert os.path.exists(one)
    await rig.snapshotter.prepare("container", "layer", {})
    with pytest.raises(errors.FailedPreconditionError, match="cannot remove"):
        await rig.snapshotter.remove("layer")
    await rig.snapshotter.remove("container")
    await rig.snapshotter.remove("layer")
    await rig.snapshotter.cleanup()
    assert mounts.below(str(rig.root)) == []
    assert os.listdir(rig.root / "snapshots") == []
    assert os.listdir(rig.root / "views") == []
    assert rig.roots.names() == []
    await asyncio.to_thread(rig.store.nix, "nix-store", "--gc")
    assert not os.path.exists(one)


async def test_what_a_crash_leaves_is_swept_and_what_was_acknowledged_stays(rig: Rig) -> None:
    one = rig.store.add("one", {"f": "1"})
    await rig.layer("layer", [one])
    await rig.snapshotter.prepare("container", "layer", {})
    for orphan in ("snapshots/somebody's", "snapshots/999/fs", "views/77.meta/v", "views/78.meta.new"):
        (rig.root / orphan).mkdir(parents=True)
    rig.roots.set("orphan", [])
    await rig.reopen()
    assert sorted(os.listdir(rig.root / "snapshots")) == ["1", "2", "somebody's"]
    assert {name.partition(".")[0] for name in os.listdir(rig.root / "views")} == {"1"}
    assert len(rig.roots.names()) == 1
    made = await rig.snapshotter.mounts("container")
    assert content(rig, made) == shown(f=one)


async def test_a_directory_that_a_power_cut_took_is_missed(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    await rig.snapshotter.prepare("a", "", {})
    await rig.snapshotter.commit("layer", "a", {})
    await rig.snapshotter.prepare("container", "layer", {})
    for number in (1, 2):
        shutil.rmtree(rig.root / "snapshots" / str(number))
    await rig.reopen()
    assert "layer 1 has lost its content" in caplog.text
    assert "snapshot 2 has lost its content" in caplog.text
    # Nothing starts without what its layer had; the layer can be removed, to be pulled again.
    with pytest.raises(errors.FailedPreconditionError, match="layer 1 has lost its content") as caught:
        await rig.snapshotter.mounts("container")
    assert "pull them again" in caught.value.hint
    with pytest.raises(errors.FailedPreconditionError, match="layer 1 has lost its content"):
        await rig.snapshotter.prepare("other", "layer", {})
    for key in ("container", "layer"):
        await rig.snapshotter.remove(key)
    await rig.snapshotter.prepare("a", "", {})
    await rig.snapshotter.commit("layer", "a", {})
    await rig.snapshotter.prepare("container", "layer", {})


class GivingUp(faults.Faults):
    """A caller who gives up at the moment when a step is reached."""

    def __init__(self, step: str) -> None:
        super().__init__()
        self.step = step
        self.caller: asyncio.Task[object] | None = None
        self.loop = asyncio.get_running_loop()

    def reach(self, step: faults.Step) -> None:
        if step == self.step and self.caller is not None:
            self.loop.call_soon_threadsafe(self.caller.cancel)
            self.step = ""


@pytest.mark.parametrize(
    "step",
    ["closure-realised", "directory-made", "directory-renamed", "snapshot-recorded", "view-built", "removal-recorded"],
)
async def test_a_caller_who_gives_up_leaves_nothing(rig: Rig, step: str) -> None:
    one = rig.store.add("one", {"f": "1"})
    rig.faults = giving_up = GivingUp("skeleton-built" if (step, rig.strategy) == ("view-built", "bind") else step)
    await rig.reopen()
    await rig.layer("layer", [one])

    async def live() -> None:
        key, labels = "ns/1/extract-2 other", {model.SNAPSHOT_REF_LABEL: "other", LAYER: "true", f"{PATH}0": two}
        await rig.snapshotter.prepare(key, "", labels)
        await rig.snapshotter.remove(key)
        await rig.snapshotter.prepare("container", "layer", {})
        await rig.snapshotter.remove("container")

    two = rig.store.add("two", {"f": "2"})
    giving_up.caller = asyncio.create_task(live())
    await asyncio.wait([giving_up.caller])
    assert giving_up.caller.cancelled()
    # The keys are free for whoever tries again at once.
    await live()
    await rig.snapshotter.close()
    assert os.listdir(rig.root / "snapshots") == ["1"]
    assert len(rig.roots.names()) == 1
    rig.snapshotter = rig.open()
    await rig.snapshotter.start()
    assert {name.partition(".")[0] for name in os.listdir(rig.root / "views")} == {"1"}


async def test_cleaning_up_takes_nothing_from_those_who_work_meanwhile(rig: Rig) -> None:
    """Layers of shared closures and containers come and go in many hands, while a collector sweeps again and again."""
    paths = [rig.store.add(f"p{number}", {"f": str(number)}) for number in range(2)]
    working = True

    async def work(hand: int) -> None:
        for turn in range(6):
            path, name = paths[(hand + turn) % 2], f"{hand}-{turn}"
            await rig.layer(name, [path])
            made = await rig.snapshotter.prepare(f"container {name}", name, {})
            directory = Path(option(made[0], "upperdir"))
            assert directory.is_dir()
            assert os.listdir(f"{option(made[0], 'lowerdir').split(':')[0]}{rig.store.store_dir}") == [
                os.path.basename(path)
            ]
            await rig.snapshotter.remove(f"container {name}")
            if turn < 5:
                await rig.snapshotter.remove(name)

    async def sweep() -> None:
        while working:
            await rig.snapshotter.cleanup()
            await asyncio.sleep(0)

    sweeping = asyncio.create_task(sweep())
    await asyncio.gather(*(work(hand) for hand in range(8)))
    working = False
    await sweeping
    await rig.snapshotter.cleanup()
    left = [info.name async for page in rig.snapshotter.pages() for info in page]
    assert len(left) == len(os.listdir(rig.root / "snapshots")) == 8
    assert len(rig.roots.names()) == 2
    await asyncio.to_thread(rig.store.nix, "nix-store", "--gc")
    assert all(os.path.exists(path) for path in paths)


class Gate(faults.Faults):
    """Holds up commits while it is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.reached = threading.Event(), threading.Event()
        self.open.set()

    def reach(self, step: faults.Step) -> None:
        if step == "changes-made" and not self.open.is_set():
            self.reached.set()
            assert self.open.wait(60)


async def test_an_end_lets_no_closure_go_whose_record_is_being_made(rig: Rig) -> None:
    rig.faults = gate = Gate()
    await rig.reopen()
    one = rig.store.add("one", {"f": "1"})
    labels = {model.SNAPSHOT_REF_LABEL: "layer", LAYER: "true", f"{PATH}0": one}
    # The next change is made in the other thread.
    await asyncio.gather(*(rig.snapshotter._db.settled() for _ in range(2)))
    gate.open.clear()
    preparing = asyncio.create_task(rig.snapshotter.prepare("ns/1/extract-1 layer", "", labels))
    assert await asyncio.to_thread(gate.reached.wait, 60)
    ending = asyncio.create_task(rig.snapshotter._tasks.finish(0.05))
    done, _ = await asyncio.wait([ending], timeout=0.5)
    assert not done
    assert len(rig.roots.names()) == 1
    gate.open.set()
    async with asyncio.timeout(60):
        await ending
    with pytest.raises(asyncio.CancelledError):
        await preparing
    (closure,) = rig.snapshotter._db.closures()
    assert rig.roots.names() == [closure.identity]


async def test_mount_forms_of_ordinary_snapshots(rig: Rig) -> None:
    (first,) = await rig.snapshotter.prepare("a", "", {})
    assert (first.type, first.options) == ("bind", ("rw", "rbind"))
    await rig.snapshotter.commit("base", "a", {})
    (view,) = await rig.snapshotter.view("v", "base", {})
    assert (view.type, view.options) == ("bind", ("ro", "rbind"))
    (child,) = await rig.snapshotter.prepare("c", "base", {})
    assert child.type == "overlay"
    assert option(child, "lowerdir") == first.source
    assert {"workdir", "upperdir", "lowerdir"} <= {each.partition("=")[0] for each in child.options}


async def test_refusals(rig: Rig) -> None:
    await rig.snapshotter.prepare("a", "", {})
    with pytest.raises(errors.AlreadyExistsError):
        await rig.snapshotter.prepare("a", "", {})
    with pytest.raises(errors.NotFoundError):
        await rig.snapshotter.prepare("b", "missing", {})
    with pytest.raises(errors.InvalidArgumentError):
        await rig.snapshotter.prepare("b", "a", {})
    with pytest.raises(errors.InvalidArgumentError):
        await rig.snapshotter.prepare("", "", {})
    with pytest.raises(errors.InvalidArgumentError, match="labels take"):
        await rig.snapshotter.prepare("b", "", {"big": "x" * (5 << 20)})
    with pytest.raises(errors.InvalidArgumentError, match="can't be changed"):
        await rig.snapshotter.update("a", {}, ["kind"])
    await rig.snapshotter.commit("c", "a", {})
    with pytest.raises(errors.FailedPreconditionError):
        await rig.snapshotter.mounts("c")
    with pytest.raises(errors.FailedPreconditionError):
        await rig.snapshotter.commit("d", "c", {})
    assert [info.name async for page in rig.snapshotter.pages() for info in page] == ["c"]


async def test_usage_counts_blocks_and_inodes_once(rig: Rig) -> None:
    (mount,) = await rig.snapshotter.prepare("a", "", {})
    (Path(mount.source) / "file").write_bytes(b"x" * 100_000)
    os.link(Path(mount.source) / "file", Path(mount.source) / "hard link")
    await rig.snapshotter.commit("c", "a", {})
    usage = await rig.snapshotter.usage("c")
    argv = ["du", "-s", "--block-size=1", mount.source]
    du = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    assert (usage.size, usage.inodes) == (int(du.split()[0]), 2)


async def _in_new_container(rig: Rig, key: str) -> dict[str, list[str]]:
    made = await rig.snapshotter.prepare(key, "layer", {})
    return await asyncio.to_thread(content, rig, made)


async def test_a_path_that_was_deleted_and_brought_back_is_seen_whole(rig: Rig) -> None:
    """Without a restart, whoever brought it back and however the file system numbers it."""
    one, two = rig.store.add("one", {"f": "1"}), rig.store.add("two", {"g": "2"})
    await rig.layer("layer", [one, two])
    assert await _in_new_container(rig, "first") == shown(f=one, g=two)
    for turn in range(5):
        subprocess.run(["cp", "-a", one, f"{rig.root}/copy"], check=True)
        subprocess.run(["rm", "-rf", one], check=True)
        if turn % 2:
            with pytest.raises(
                errors.FailedPreconditionError, match=f"the store path {one} is missing from the disk, though Nix"
            ) as caught:
                await rig.snapshotter.prepare(f"refused-{turn}", "layer", {})
            assert f"nix-store --repair-path {one}" in caught.value.hint
        os.rename(f"{rig.root}/copy", one)
        assert await _in_new_container(rig, f"after-{turn}") == shown(f=one, g=two)
    assert len(mounts.below(str(rig.root))) <= 2


async def test_a_path_that_was_repaired_is_seen_repaired_by_the_next_container(rig: Rig) -> None:
    """As Nix does it: the new one is renamed into the place of the old one, which a running container keeps."""
    one, plain = rig.store.add("one", {"f": "1"}), rig.store.add("plain", "sound")
    os.chmod(plain, 0o644)
    Path(plain).write_text("corrupt")
    await rig.layer("layer", [one])
    await rig.snapshotter.prepare("empty", "layer", {})
    running = await rig.snapshotter.prepare("running", "layer", {})
    with seen(rig, running) as root:
        assert os.listdir(str(root) + one) == ["f"]
        os.rename(one, f"{rig.store.store_dir}/.old")
        os.mkdir(one)
        Path(one, "repaired").touch()
        made = await rig.snapshotter.prepare("next", "layer", {})
        assert os.listdir(str(root) + one) == ["f"]
        shutil.rmtree(f"{rig.store.store_dir}/.old")
    assert content(rig, made) == shown(repaired=one)


async def test_a_change_in_the_same_tick_as_the_look_is_seen(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """File systems count time in steps: what changes twice in one looks unchanged."""
    one = rig.store.add("one", {"f": "1"})
    await rig.layer("layer", [one])
    stat_of, store = os.stat, rig.store.store_dir
    now = stat_of(store)

    def coarse(path: str, **more: Any) -> object:
        return now if path == store else stat_of(path, **more)

    monkeypatch.setattr(os, "stat", coarse)
    assert await _in_new_container(rig, "first") == shown(f=one)
    os.rename(one, f"{rig.root}/copy")
    with pytest.raises(errors.FailedPreconditionError, match=f"{one} is missing"):
        await rig.snapshotter.prepare("refused", "layer", {})
    os.rename(f"{rig.root}/copy", one)
    assert await _in_new_container(rig, "second") == shown(f=one)


async def test_an_unchanged_store_costs_a_few_looks(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [rig.store.add(f"p{number}", {"f": str(number)}) for number in range(20)]
    await rig.layer("layer", paths)
    monkeypatch.setattr(closures, "_TICK", 0)
    await rig.snapshotter.prepare("first", "layer", {})
    looked: list[object] = []
    for name in ("stat", "lstat"):
        look = getattr(os, name)

        def counting(path: object, *args: object, look: Any = look, **more: object) -> object:
            looked.append(path)
            return look(path, *args, **more)

        monkeypatch.setattr(os, name, counting)
    await rig.snapshotter.mounts("first")
    # The store's directory, and where the view is mounted; no path of the closure, and nothing of its metadata.
    assert looked.count(rig.store.store_dir) == 1
    assert not set(looked) & set(paths)
    views = [each for each in looked if str(each).startswith(f"{rig.root}/views")]
    assert rig.strategy == "bind" or len(views) <= 2


async def noted_layer(rig: Rig, name: str, *paths: str) -> str:
    """A layer whose closureInfo was written by hand, and refers to nothing; the closureInfo."""
    info = rig.store.add(f"closure-info-{name}", {"store-paths": "".join(f"{path}\n" for path in paths)})
    labels = {model.SNAPSHOT_REF_LABEL: name, "containerd.io/snapshot/nix-closure": info}
    await rig.snapshotter.prepare(f"ns/1/extract-1 {name}", "", labels)
    await rig.snapshotter.commit(name, f"ns/1/extract-1 {name}", labels)
    return info


@pytest.mark.parametrize("form", ["listed", "closureInfo"])
@pytest.mark.parametrize("lost", ["all", "one", "another", "the directory"])
async def test_lost_roots_are_made_again_at_the_start(rig: Rig, form: str, lost: str) -> None:
    one, two = rig.store.add("one", {"f": "1"}), rig.store.add("two", {"f": "2"})
    needed = {one, two}
    if form == "listed":
        await rig.layer("layer", [one, two])
    else:
        needed.add(await noted_layer(rig, "layer", one, two))
    (name,) = rig.roots.names()
    linked = Path(rig.daemon.settings.gcroots, "nixlet/test", name)
    if lost == "the directory":
        rig.roots.remove(name)
    for link in sorted(linked.glob("*"))[slice(*{"all": (0, 9), "one": (0, 1), "another": (1, 2)}.get(lost, (0, 0)))]:
        link.unlink()
    await rig.reopen()
    assert set(rig.roots.paths(name)) == set(map(os.path.basename, needed))
    await asyncio.to_thread(rig.store.nix, "nix-store", "--gc")
    assert all(map(os.path.exists, needed))


async def test_a_root_that_cannot_be_made_fails_no_start_and_no_other_root(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    layers = {name: rig.store.add(name, {"f": name}) for name in ("one", "two", "three")}
    identities: dict[str, str] = {}
    for name, path in layers.items():
        await rig.layer(name, [path])
        (identities[name],) = set(rig.roots.names()) - set(identities.values())
    for identity in identities.values():
        rig.roots.remove(identity)
    roots_directory = Path(rig.daemon.settings.gcroots, "nixlet/test")
    roots_directory.mkdir(parents=True)
    # A person's own, in the place of one of ours and beside them.
    for own in (identities["two"], "own"):
        (roots_directory / own).symlink_to(layers["two"])
    await rig.reopen()
    assert f"the garbage collector may take paths of the closure {identities['two']}" in caplog.text
    assert set(rig.roots.names()) == {*identities.values(), "own"}
    assert os.listdir(layers["two"]) == ["f"]
    assert rig.roots.paths(identities["three"]) == [os.path.basename(layers["three"])]
    assert "GC root own" not in caplog.text
    (roots_directory / identities["two"]).unlink()
    await rig.reopen()
    assert rig.roots.paths(identities["two"]) == [os.path.basename(layers["two"])]
    (roots_directory / "own").unlink()


async def test_a_closure_is_rooted_on_the_disk_before_it_is_recorded(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    one = rig.store.add("one", {"f": "1"})
    synced: list[str] = []
    fsync, record = os.fsync, metadata.Metadata.create_snapshot

    def syncing(fd: int) -> None:
        fsync(fd)
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))

    def recording(*args: Any, **more: Any) -> Any:
        synced.append("recorded")
        return record(*args, **more)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(metadata.Metadata, "create_snapshot", recording)
    await rig.layer("layer", [one])
    (name,) = rig.roots.names()
    root = f"{rig.daemon.settings.gcroots}/nixlet/test/{name}"
    assert [each for each in synced[: synced.index("recorded")] if each.startswith(rig.daemon.settings.gcroots)] == [
        rig.daemon.settings.gcroots,
        os.path.dirname(os.path.dirname(root)),
        root,
        os.path.dirname(root),
    ]


async def test_a_layer_is_on_the_disk_before_it_is_committed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    upper = (await rig.snapshotter.prepare("a", "", {}))[0].source
    os.makedirs(f"{upper}/bin")
    Path(upper, "bin/pause").write_text("a program")
    os.symlink("/etc/shadow", f"{upper}/bin/link")
    os.mkfifo(f"{upper}/bin/pipe")
    steps: list[str] = []
    fsync, commit = os.fsync, metadata.Metadata.commit_snapshot

    def syncing(fd: int) -> None:
        fsync(fd)
        steps.append(os.readlink(f"/proc/self/fd/{fd}"))

    async def committing(*args: Any, **more: Any) -> bool:
        made = await commit(*args, **more)
        if made:
            steps.append("committed")
        return made

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(metadata.Metadata, "commit_snapshot", committing)
    await rig.snapshotter.commit("layer", "a", {})
    snapshot = os.path.dirname(upper)
    assert steps == [f"{upper}/bin/pause", f"{upper}/bin", upper, snapshot, os.path.dirname(snapshot), "committed"]


async def test_mount_points_that_a_closure_covers_are_on_the_disk_by_their_names(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many they are. What has something in it, or is elsewhere, is synced as in any layer."""
    one, two = rig.store.add("one", {"f": "1"}), rig.store.add("two", {"f": "2"})
    key, labels = "ns/1/extract-1 layer", {model.SNAPSHOT_REF_LABEL: "layer", LAYER: "true"}
    labels |= {f"{PATH}0": one, f"{PATH}1": two}
    upper = (await rig.snapshotter.prepare(key, "", labels))[0].source
    for directory in (one, f"{two}/empty", "/elsewhere"):
        os.makedirs(upper + directory)
    synced: list[str] = []
    fsync = os.fsync

    def syncing(fd: int) -> None:
        fsync(fd)
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))

    monkeypatch.setattr(os, "fsync", syncing)
    await rig.snapshotter.commit("layer", key, labels)
    below = [each.removeprefix(upper) for each in synced if each.startswith(f"{upper}/")]
    above = [os.path.dirname(one)]
    while above[-1] != "/":
        above.append(os.path.dirname(above[-1]))
    assert sorted(below) == sorted([f"{two}/empty", two, "/elsewhere", *above[:-1]])


async def test_a_large_layer_is_committed_without_waiting_for_the_disk(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    upper = (await rig.snapshotter.prepare("a", "", {}))[0].source
    Path(upper, "image").write_bytes(bytes(17 << 20))
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    await rig.snapshotter.commit("layer", "a", {})
    assert f"{upper}/image" not in synced
    assert upper not in synced


async def test_what_cannot_be_swept_fails_no_start(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    for orphan in ("snapshots/997/fs", "snapshots/998/fs", "snapshots/999/fs"):
        (rig.root / orphan).mkdir(parents=True)
    place = str(rig.root / "snapshots/998/fs")
    mounts.mount("tmpfs", place, "tmpfs")
    try:
        await rig.reopen()
        assert os.listdir(rig.root / "snapshots") == ["998"]
        assert f"the directory {rig.root}/snapshots/998 of a removed snapshot stays" in caplog.text
    finally:
        mounts.unmount(place)
    await rig.reopen()
    assert os.listdir(rig.root / "snapshots") == []


async def test_a_closure_is_held_until_it_is_rooted(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    one = rig.store.add("one", {"f": "1"})
    rooting = roots.Roots.set

    def collecting(self: roots.Roots, name: str, rooted: Iterable[paths.StorePath]) -> None:
        rig.store.nix("nix-store", "--gc")
        rooting(self, name, rooted)

    monkeypatch.setattr(roots.Roots, "set", collecting)
    await rig.layer("layer", [one])
    assert content(rig, await rig.snapshotter.prepare("container", "layer", {})) == shown(f=one)


async def test_who_leaves_a_closure_takes_nothing_from_who_is_about_to_record_it(rig: Rig) -> None:
    one = rig.store.add("one", {"f": "1"})
    reference = closure_references.parse_annotations({LAYER: "true", f"{PATH}0": one}, rig.store.store_dir)
    assert reference is not None
    kept = rig.snapshotter._closures
    async with kept.realised(reference) as closure:
        # As for somebody who left before, and as every sweep does.
        await kept.drop_unused([closure.identity])
        assert rig.roots.paths(closure.identity) == [os.path.basename(one)]
        await rig.snapshotter.cleanup()
        assert rig.roots.paths(closure.identity) == [os.path.basename(one)]
    await rig.snapshotter.cleanup()
    assert rig.roots.names() == []


async def test_a_store_that_is_gone_is_named_as_what_is_gone(rig: Rig) -> None:
    one = rig.store.add("one", {"f": "1"})
    await rig.layer("layer", [one])
    store, away = rig.store.store_dir, f"{rig.store.directory}/away"
    for first in (True, False):
        if not first:
            await rig.snapshotter.prepare("container", "layer", {})
        os.rename(store, away)
        try:
            with pytest.raises(errors.FailedPreconditionError, match=f"the Nix store {store} can't be used: No such"):
                await rig.snapshotter.prepare("refused", "layer", {})
        finally:
            os.rename(away, store)
