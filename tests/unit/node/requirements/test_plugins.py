"""The snapshotter that is a proxy plugin: who serves it."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.host import process
from nixlet.node.requirements import plugins
from nixlet.node.settings import config
from nixlet.snapshots import model

DAEMON = "containerd-fuse-overlayfs-grpc"


@pytest.fixture
def layout(tmp_path: Path) -> config.Layout:
    return config.Layout(f"{tmp_path}/data", f"{tmp_path}/state")


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory whose programs are the only ones that are found."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setattr(process, "find_program", lambda name: shutil.which(name, path=str(directory)))
    return directory


def install(programs: Path, name: str) -> None:
    (programs / name).write_text("#!/bin/sh\n")
    (programs / name).chmod(0o755)


def found(name: str, layout: config.Layout) -> plugins.Plugin:
    plugin = plugins.of(config.Settings(snapshotter=name), layout)
    assert plugin is not None
    return plugin


def test_ours_is_the_first(layout: config.Layout) -> None:
    plugin = found("nix", layout)
    assert plugin.is_ours
    assert (plugin.proxy.address, plugin.proxy.root) == (layout.node_socket, layout.snapshotter_root("nix"))
    assert plugin.overlay is model.Overlay.KERNEL
    assert plugin.told() == "nix, served by nixlet's own snapshotter"


@pytest.mark.parametrize("name", ["overlayfs", "native", "zfs", "my-own"])
def test_others_are_containerds(layout: config.Layout, name: str) -> None:
    assert plugins.of(config.Settings(snapshotter=name), layout) is None


def test_fuse_overlayfs_of_somebody_elses_containerd_is_its_own(layout: config.Layout) -> None:
    settings = config.Settings(snapshotter="fuse-overlayfs", container_runtime_endpoint="/run/c.sock")
    assert plugins.of(settings, layout) is None


def test_fuse_overlayfs_is_served_by_containerds_program_where_that_is(layout: config.Layout, programs: Path) -> None:
    ours = found("fuse-overlayfs", layout)
    assert ours.is_ours
    assert ours.proxy.table() == {
        "type": "snapshot",
        "address": layout.node_socket,
        "exports": {
            "root": layout.snapshotter_root("fuse-overlayfs"),
            "enable_remote_snapshot_annotations": "true",
        },
        "capabilities": ["remap-ids"],
    }
    install(programs, DAEMON)
    theirs = found("fuse-overlayfs", layout)
    assert not theirs.is_ours
    # It reads no annotations, and leaves owners to containerd.
    assert theirs.proxy.table() == {
        "type": "snapshot",
        "address": layout.snapshotter_socket("fuse-overlayfs"),
        "exports": {"root": layout.snapshotter_root("fuse-overlayfs")},
    }
    assert theirs.overlay is ours.overlay is model.Overlay.FUSE_OVERLAYFS
    assert theirs.told() == (
        f"fuse-overlayfs, served by {DAEMON}, leaves one fuse-overlayfs for each container that runs"
    )


def test_who_has_made_the_snapshots_goes_on_with_them(layout: config.Layout, programs: Path) -> None:
    root = Path(layout.snapshotter_root("fuse-overlayfs"))
    root.mkdir(parents=True)
    install(programs, DAEMON)
    (root / "nixlet.db").touch()
    assert found("fuse-overlayfs", layout).is_ours
    (root / "nixlet.db").unlink()
    (root / "metadata.db").touch()
    (programs / DAEMON).unlink()
    theirs = found("fuse-overlayfs", layout)
    assert not theirs.is_ours
    with pytest.raises(errors.UnavailableError, match=f"^{DAEMON} not installed$"):
        theirs.needs[-1].check()


def test_stargz_goes_on_without_the_node(layout: config.Layout) -> None:
    plugin = found("stargz", layout)
    assert not plugin.is_ours
    assert plugin.goes_on
    # It is found again by its socket, which is a word of its own in its command.
    assert plugin.images == plugin.proxy.address == layout.snapshotter_socket("stargz")
    assert plugin.proxy.address in plugin.arguments
    assert plugin.proxy.table() == {
        "type": "snapshot",
        "address": layout.snapshotter_socket("stargz"),
        "exports": {"root": layout.snapshotter_root("stargz"), "enable_remote_snapshot_annotations": "true"},
    }
    assert plugin.told() == (
        "stargz, served by containerd-stargz-grpc, leaves itself running, with the file systems of layers"
    )


def test_several_on_one_node(layout: config.Layout, programs: Path) -> None:
    assert [each.proxy.name for each in plugins.of_node(config.Settings(), layout)] == ["nix"]
    settings = config.Settings(also_snapshotter=("stargz", "overlayfs", "fuse-overlayfs"))
    found = plugins.of_node(settings, layout)
    # overlayfs is containerd's own; ours can only be the first.
    assert [(each.proxy.name, each.is_ours) for each in found] == [
        ("nix", True),
        ("stargz", False),
        ("fuse-overlayfs", False),
    ]
    assert found[2].needs[-1].program == DAEMON
    assert [
        each.proxy.name for each in plugins.of_node(dataclasses.replace(settings, snapshotter="native"), layout)
    ] == [
        "stargz",
        "fuse-overlayfs",
    ]
