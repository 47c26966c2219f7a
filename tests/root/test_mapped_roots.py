"""Roots of containers in user namespaces: the owners that they show, and what is left of them."""

import asyncio
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.host import mounts
from nixlet.node.lifecycle import uninstall
from nixlet.node.ownership import marker
from nixlet.snapshots import model
from support import snapshotters
from support.nixstore import PrivateStore

OWNER = 100_000
MAPPED = {f"containerd.io/snapshot/{kind}mapping": f"0:{OWNER}:65536" for kind in ("uid", "gid")}


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[snapshotters.Rig]:
    store = PrivateStore(tmp_path / "nix")
    store.add("seed", "so that the store is there")
    made = snapshotters.Rig(tmp_path, store, "view")
    await made.snapshotter.start()
    yield made
    for info in [
        info async for page in made.snapshotter.pages() for info in page if info.kind is not model.Kind.COMMITTED
    ]:
        await made.snapshotter.remove(info.name)
    await made.snapshotter.cleanup()
    await made.snapshotter.close()
    made.snapshotter.unmount_views()
    assert mounts.below(str(tmp_path)) == []
    store.remove()


def owners(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_uid, status.st_gid


def roots(rig: snapshotters.Rig) -> list[str]:
    return [entry.path for entry in mounts.below(str(rig.root / "snapshots"))]


async def test_a_closure_has_its_owners_and_the_store_keeps_its_own(rig: snapshotters.Rig) -> None:
    one = rig.store.add("one", {"f": "1", "g": "2"})
    plain = rig.store.add("plain", "text")
    await rig.layer("layer", [one, plain])
    (mount,) = await rig.snapshotter.prepare("pod", "layer", MAPPED)
    assert (mount.type, mount.options, roots(rig)) == ("bind", ("rw", "rbind"), [mount.source])
    root = Path(mount.source)
    for path in ("", one, f"{one}/f", f"{one}/g", plain):
        assert owners(Path(f"{root}/{path}")) == (OWNER, OWNER), path
    assert Path(f"{root}{one}/f").read_text() == "1"
    assert Path(f"{root}{plain}").read_text() == "text"
    assert set(os.listdir(f"{root}{rig.store.store_dir}")) == {os.path.basename(one), os.path.basename(plain)}
    # What is changed is the container's.
    os.chmod(f"{root}{one}/f", 0o600)
    with open(f"{root}/new", "w") as file:
        file.write("x")
    assert {owners(Path(f"{one}/f")), owners(Path(one)), owners(Path(plain))} == {(0, 0)}
    assert stat.S_IMODE(os.stat(f"{one}/f").st_mode) != 0o600
    assert owners(rig.root / "snapshots" / Path(mount.source).parent.name / "fs") == (OWNER, OWNER)
    assert (await rig.snapshotter.usage("pod")).size < 1_000_000
    # What was there without a mapping is as before.
    (other,) = await rig.snapshotter.prepare("other", "layer", {})
    assert other.type == "overlay"
    await rig.snapshotter.remove("pod")
    await rig.snapshotter.cleanup()
    assert roots(rig) == []
    assert sorted(os.listdir(one)) == ["f", "g"]


async def test_owners_of_ordinary_layers_are_mapped(rig: snapshotters.Rig) -> None:
    mount = (await rig.snapshotter.prepare("ns/1/extract-1 base", "", {model.SNAPSHOT_REF_LABEL: "base"}))[0]
    Path(mount.source, "f").write_text("x")
    os.chown(f"{mount.source}/f", 5, 6)
    os.chown(mount.source, 7, 0)
    await rig.snapshotter.commit("base", "ns/1/extract-1 base", {})
    (active,) = await rig.snapshotter.prepare("pod", "base", MAPPED)
    (look,) = await rig.snapshotter.view("look", "base", MAPPED)
    assert look.options == ("ro", "rbind")
    for each in (active, look):
        assert owners(Path(each.source, "f")) == (OWNER + 5, OWNER + 6)
        assert owners(Path(each.source)) == (OWNER + 7, OWNER)
    Path(active.source, "g").touch()
    with pytest.raises(OSError, match="Read-only"):
        Path(look.source, "g").touch()


async def test_a_pod_with_nothing_below_it_has_a_root_of_its_own(rig: snapshotters.Rig) -> None:
    (mount,) = await rig.snapshotter.prepare("pod", "", MAPPED)
    assert owners(Path(mount.source)) == (OWNER, OWNER)
    Path(mount.source, "f").touch()


async def test_a_root_outlives_the_snapshotter_and_is_made_again(rig: snapshotters.Rig) -> None:
    one = rig.store.add("one", {"f": "1"})
    await rig.layer("layer", [one])
    made = await rig.snapshotter.prepare("pod", "layer", MAPPED)
    with open(f"{made[0].source}{one}/f") as file:
        await rig.reopen()
        rig.snapshotter.unmount_views()
        assert await rig.snapshotter.mounts("pod") == made
        assert file.read() == "1"
    assert len(roots(rig)) == 1
    mounts.unmount(made[0].source)
    assert await rig.snapshotter.mounts("pod") == made
    assert owners(Path(f"{made[0].source}{one}/f")) == (OWNER, OWNER)


async def test_many_ask_for_one_root_at_once(rig: snapshotters.Rig) -> None:
    await rig.layer("layer", [rig.store.add("one", {"f": "1"})])
    made = await rig.snapshotter.prepare("pod", "layer", MAPPED)
    mounts.unmount(made[0].source)
    assert await asyncio.gather(*(rig.snapshotter.mounts("pod") for _ in range(10))) == [made] * 10
    assert len(roots(rig)) == 1
    asked = asyncio.create_task(rig.snapshotter.mounts("pod"))
    await asyncio.sleep(0)
    asked.cancel()
    await asyncio.gather(*(rig.snapshotter.prepare(f"pod-{number}", "layer", MAPPED) for number in range(30)))
    assert len(roots(rig)) == 31
    await asyncio.gather(*(rig.snapshotter.remove(f"pod-{number}") for number in range(30)))
    await rig.snapshotter.cleanup()
    assert len(roots(rig)) == 1


async def test_what_a_crash_left_is_swept(rig: snapshotters.Rig) -> None:
    await rig.layer("layer", [rig.store.add("one", {"f": "1"})])
    await rig.snapshotter.prepare("pod", "layer", MAPPED)
    assert len(roots(rig)) == 1
    # The process ends right after a removal is recorded.
    await rig.snapshotter._db.remove_snapshot("pod")
    await rig.reopen()
    assert roots(rig) == []
    assert len(list((rig.root / "snapshots").iterdir())) == 1


@pytest.mark.parametrize(
    "labels",
    [
        {"containerd.io/snapshot/uidmapping": "0:100000:65536"},
        {**MAPPED, "containerd.io/snapshot/gidmapping": ""},
        {**MAPPED, "containerd.io/snapshot/gidmapping": "0:1"},
        {**MAPPED, "containerd.io/snapshot/gidmapping": "0:-1:1"},
        {**MAPPED, "containerd.io/snapshot/gidmapping": "0:100000:0"},
        {**MAPPED, "containerd.io/snapshot/gidmapping": "0:4294967290:65536"},
        {**MAPPED, "containerd.io/snapshot/gidmapping": "0:99999999999:1"},
        {**MAPPED, "containerd.io/snapshot/gidmapping": ",".join(["0:1:1"] * 1000)},
    ],
)
async def test_labels_that_cant_be_read_are_refused(rig: snapshotters.Rig, labels: dict[str, str]) -> None:
    with pytest.raises(errors.InvalidArgumentError, match="mapping is "):
        await rig.snapshotter.prepare("pod", "", labels)
    await rig.snapshotter.prepare("pod", "", {})


async def test_a_mapping_that_the_kernel_refuses_leaves_nothing(rig: snapshotters.Rig) -> None:
    overlapping = dict.fromkeys(MAPPED, "0:100000:10,5:200000:10")
    await rig.layer("layer", [rig.store.add("one", {"f": "1"})])
    with pytest.raises(errors.FailedPreconditionError, match="the kernel refuses a user namespace"):
        await rig.snapshotter.prepare("pod", "layer", overlapping)
    assert roots(rig) == []
    await rig.snapshotter.prepare("pod", "layer", MAPPED)


async def test_a_root_whose_owner_is_not_mapped_is_refused(rig: snapshotters.Rig) -> None:
    await rig.layer("layer", [rig.store.add("one", {"f": "1"})])
    with pytest.raises(errors.FailedPreconditionError, match="belongs to user 0, which"):
        await rig.snapshotter.prepare("pod", "layer", dict.fromkeys(MAPPED, "1:100000:10"))
    await rig.snapshotter.prepare("pod", "layer", MAPPED)


async def test_bind_mounts_of_store_paths_are_not_for_user_namespaces(tmp_path: Path) -> None:
    store = PrivateStore(tmp_path / "nix")
    rig = snapshotters.Rig(tmp_path, store, "bind")
    await rig.snapshotter.start()
    await rig.layer("layer", [store.add("one", {"f": "1"})])
    with pytest.raises(errors.UnsupportedError, match="can't have an image of store paths"):
        await rig.snapshotter.prepare("pod", "layer", MAPPED)
    await rig.snapshotter.close()
    store.remove()


async def test_a_root_that_nobody_has_is_taken_away_with_the_snapshotter(tmp_path: Path) -> None:
    """And one that a container still has keeps all of it from going."""
    store = PrivateStore(tmp_path / "nix")
    rig = snapshotters.Rig(tmp_path, store, "view")
    await rig.snapshotter.start()
    await rig.layer("layer", [store.add("one", {"f": "1"})])
    (mount,) = await rig.snapshotter.prepare("pod", "layer", MAPPED)
    marker.write_snapshotter(str(rig.root), str(tmp_path / "socket"), rig.roots.directory)
    container = tmp_path / "container"
    container.mkdir()
    mounts.mount(mount.source, str(container), "", mounts.MS_BIND)
    try:
        await rig.snapshotter.close()
        with pytest.raises(errors.FailedPreconditionError, match="container"):
            await uninstall.uninstall_snapshotter(str(rig.root))
        assert Path(mount.source).parent.exists()
    finally:
        mounts.unmount(str(container))
    await uninstall.uninstall_snapshotter(str(rig.root))
    assert mounts.below(str(tmp_path)) == []
    assert not (rig.root / "snapshots").exists()
    store.remove()
