"""The snapshotter with a real, private Nix store and real mounts, without containerd."""

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.host import mounts
from nixlet.snapshots import model, snapshotter
from nixlet.store import policy, realiser, roots
from nixlet.store.daemon import client
from support.nixstore import PrivateStore

LAYER = "containerd.io/snapshot/nix-layer"
PATH = "containerd.io/snapshot/nix-store-path."


class Rig:
    def __init__(self, directory: Path, store: PrivateStore) -> None:
        self.root = directory / "root"
        self.store = store
        self.daemon = client.DaemonStore(store.settings)
        self.roots = roots.Roots(self.daemon.settings.gcroots, "test")
        self.snapshotter = self.open()

    def open(self) -> snapshotter.Snapshotter:
        bringer = realiser.Realiser(self.daemon, self.roots, policy.Policy())
        return snapshotter.Snapshotter(
            str(self.root),
            store_dir=self.store.store_dir,
            real_store_dir=self.store.store_dir,
            realise=bringer,
            gc_roots=self.roots,
        )

    async def reopen(self) -> None:
        """As after a crash: nothing is closed in order."""
        await self.snapshotter.close()
        self.snapshotter = self.open()
        await self.snapshotter.start()

    async def layer(self, name: str, paths: Sequence[str], parent: str = "", *, labelled: bool = True) -> None:
        """Unpack a Nix layer as containerd does."""
        labels = {model.SNAPSHOT_REF_LABEL: name}
        if labelled:
            labels |= {LAYER: "true"} | {f"{PATH}{number}": path for number, path in enumerate(paths)}
        key = f"ns/1/extract-1 {name}"
        (mount,) = await self.snapshotter.prepare(key, parent, labels)
        upper = mount.source if mount.type == "bind" else option(mount, "upperdir")
        for path in paths:
            os.makedirs(upper + path)
        await self.snapshotter.commit(name, key, labels)


def option(mount: model.Mount, name: str) -> str:
    (value,) = [each.partition("=")[2] for each in mount.options if each.startswith(f"{name}=")]
    return value


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    store = PrivateStore(tmp_path / "nix")
    store.add("seed", "so that the store is there")
    made = Rig(tmp_path, store)
    await made.snapshotter.start()
    yield made
    await made.snapshotter.close()
    made.snapshotter.unmount_views()
    assert mounts.below(str(tmp_path)) == []
    store.remove()


def content(rig: Rig, mount: model.Mount) -> list[str]:
    """The names that a container would see in the store."""
    target = rig.root.parent / "mnt"
    target.mkdir(exist_ok=True)
    mounts.mount("overlay", str(target), "overlay", 0, ",".join(mount.options))
    try:
        return sorted(os.listdir(str(target) + rig.store.store_dir))
    finally:
        mounts.unmount(str(target))


async def test_one_mount_shows_the_closure(rig: Rig) -> None:
    one, two = rig.store.add("one", {"f": "1"}), rig.store.add("two", {"f": "2"})
    await rig.layer("layer", [one, two])
    (mount,) = await rig.snapshotter.prepare("container", "layer", {})
    assert mount.type == "overlay"
    assert content(rig, mount) == sorted([os.path.basename(one), os.path.basename(two)])
    assert await rig.snapshotter.mounts("container") == [mount]


async def test_a_view_of_a_nix_layer_is_read_only_and_shows_the_closure(rig: Rig) -> None:
    one = rig.store.add("one", {"f": "1"})
    await rig.layer("layer", [one])
    (mount,) = await rig.snapshotter.view("look", "layer", {})
    assert not any(each.startswith("upperdir") for each in mount.options)
    assert content(rig, mount) == [os.path.basename(one)]


async def test_the_closure_survives_commits_and_updates_without_labels(rig: Rig) -> None:
    one = rig.store.add("one", {"f": "1"})
    labels = {model.SNAPSHOT_REF_LABEL: "layer", LAYER: "true", f"{PATH}0": one}
    await rig.snapshotter.prepare("ns/1/extract-1 layer", "", labels)
    await rig.snapshotter.commit("layer", "ns/1/extract-1 layer", {})
    await rig.snapshotter.update("layer", {}, None)
    assert rig.snapshotter.closure_of("layer") == (one,)
    (mount,) = await rig.snapshotter.prepare("container", "layer", {})
    assert content(rig, mount) == [os.path.basename(one)]


async def test_labels_of_a_containers_own_snapshot_select_nothing(rig: Rig) -> None:
    one, two = rig.store.add("one", {"f": "1"}), rig.store.add("two", {"f": "2"})
    await rig.layer("layer", [one])
    for key, labels in (
        ("container", {LAYER: "true", f"{PATH}0": two}),
        # Without a chain ID to be committed as it is no unpack, whatever its key.
        ("ns/1/extract-x", {LAYER: "true", f"{PATH}0": two}),
        ("ns/1/container", {LAYER: "true", f"{PATH}0": two, model.SNAPSHOT_REF_LABEL: "y"}),
    ):
        (mount,) = await rig.snapshotter.prepare(key, "layer", labels)
        assert content(rig, mount) == [os.path.basename(one)]


async def test_a_layer_that_was_unpacked_without_labels_is_mended(rig: Rig) -> None:
    one = rig.store.add("one", {"f": "1"})
    await rig.layer("layer", [one], labelled=False)
    (mount,) = await rig.snapshotter.prepare("before", "layer", {})
    assert mount.type == "overlay"
    assert rig.snapshotter.closure_of("layer") == ()
    await rig.snapshotter.update("layer", {LAYER: "true", f"{PATH}0": one}, [f"labels.{LAYER}", f"labels.{PATH}0"])
    assert rig.snapshotter.closure_of("layer") == (one,)
    (mount,) = await rig.snapshotter.prepare("after", "layer", {})
    assert (await rig.snapshotter.mounts("before"))[0].options != mount.options
    assert content(rig, mount) == [os.path.basename(one)]


async def test_images_that_share_a_closure_share_its_view(rig: Rig) -> None:
    one = rig.store.add("one", {"f": "1"})
    await rig.layer("a", [one])
    await rig.layer("b", [one])
    (first,) = await rig.snapshotter.prepare("c1", "a", {})
    (second,) = await rig.snapshotter.prepare("c2", "b", {})
    assert option(first, "lowerdir").split(":")[0] == option(second, "lowerdir").split(":")[0]
    assert len(mounts.below(str(rig.root))) == 1


async def test_two_nix_layers_with_an_ordinary_one_between(rig: Rig) -> None:
    one, two = rig.store.add("one", {"f": "1"}), rig.store.add("two", {"f": "2"})
    await rig.layer("a", [one])
    (mount,) = await rig.snapshotter.prepare("ns/1/extract-2 b", "a", {model.SNAPSHOT_REF_LABEL: "b"})
    edited = Path(option(mount, "upperdir") + one)
    edited.mkdir(parents=True)
    (edited / "g").write_text("added")
    await rig.snapshotter.commit("b", "ns/1/extract-2 b", {})
    await rig.layer("c", [two], "b")
    (mount,) = await rig.snapshotter.prepare("container", "c", {})
    assert content(rig, mount) == sorted([os.path.basename(one), os.path.basename(two)])
    target = rig.root.parent / "mnt"
    mounts.mount("overlay", str(target), "overlay", 0, ",".join(mount.options))
    try:
        assert sorted(os.listdir(str(target) + one)) == ["f", "g"]
    finally:
        mounts.unmount(str(target))


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
    (mount,) = await rig.snapshotter.mounts("before")
    assert content(rig, mount) == [os.path.basename(one)]


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
    for orphan in ("snapshots/new-abc/fs", "snapshots/999/fs", "views/77.meta/v", "views/78.meta.new"):
        (rig.root / orphan).mkdir(parents=True)
    rig.roots.add("orphan", [])
    await rig.reopen()
    assert sorted(os.listdir(rig.root / "snapshots")) == ["1", "2"]
    assert {name.partition(".")[0] for name in os.listdir(rig.root / "views")} == {"1"}
    assert len(rig.roots.names()) == 1
    (mount,) = await rig.snapshotter.mounts("container")
    assert content(rig, mount) == [os.path.basename(one)]


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
    with pytest.raises(errors.FailedPreconditionError, match="user namespaces"):
        await rig.snapshotter.prepare("b", "", {"containerd.io/snapshot/uidmapping": "0:100000:65536"})
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
