"""Whether a snapshotter works here: k3s's checks, and its sentences."""

import contextlib
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.host import mounts, process
from nixlet.node.requirements import snapshotters
from nixlet.node.settings import config
from nixlet.store.daemon import client as nix

INSTEAD = 'snapshotter cannot be enabled for "{root}", try using {instead}: {cause}'


@pytest.fixture
def layout(tmp_path: Path) -> config.Layout:
    return config.Layout(f"{tmp_path}/data", f"{tmp_path}/state")


async def refusal(name: str, layout: config.Layout, store: nix.DaemonStore | None = None) -> errors.NixletError:
    with pytest.raises(errors.UnsupportedError) as raised:
        await snapshotters.check_supported(config.Settings(snapshotter=name), layout, store)
    return raised.value


def missing_store(tmp_path: Path) -> nix.DaemonStore:
    return nix.DaemonStore(nix.DaemonSettings(socket=f"{tmp_path}/no/socket"))


async def test_without_nix(layout: config.Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    error = await refusal("nix", layout, missing_store(tmp_path))
    assert error.message == (
        f'"nix" snapshotter cannot be enabled for "{layout.containerd_root}", try using "overlayfs" or "native": '
        "nix-store not found in PATH: install nix (https://nixos.org/download) to use the nix snapshotter"
    )
    assert str(tmp_path) in str(error.hint)


async def test_the_store_is_asked(layout: config.Layout, tmp_path: Path) -> None:
    """By the real Nix, through a daemon that is started for the question."""
    store = nix.DaemonStore(nix.DaemonSettings(socket=f"{tmp_path}/no/socket", environment=os.environ))
    await snapshotters.check_supported(config.Settings(snapshotter="nix"), layout, store)


async def test_a_nix_that_does_not_answer(
    layout: config.Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("nix-store", "nix-daemon"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'the database is locked' >&2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    store = nix.DaemonStore(nix.DaemonSettings(socket=f"{tmp_path}/no/socket", environment=os.environ))
    error = await refusal("nix", layout, store)
    assert error.message.startswith('"nix" snapshotter cannot be enabled for')
    assert f"{tmp_path}/nix-daemon --stdio does not serve: the database is locked" in error.message


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Somebody whom permissions stop, for the time of the context: this process, since another user may not read our Python."""
    groups = os.getgroups()
    os.setgroups([])
    os.setresgid(65534, 65534, 0)
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)
        os.setgroups(groups)


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A directory that everybody can reach."""
    with tempfile.TemporaryDirectory() as base:
        Path(base).chmod(0o755)
        yield Path(base)


@pytest.mark.parametrize("closed", ["directory", "socket"])
async def test_who_may_not_ask_learns_whom_to_ask(open_to_all: Path, closed: str) -> None:
    with socket.socket(socket.AF_UNIX) as daemon:
        directory = open_to_all / "daemon-socket"
        directory.mkdir()
        path = directory / "socket"
        daemon.bind(str(path))
        daemon.listen()
        directory.chmod(0o750 if closed == "directory" else 0o755)
        path.chmod(0o660)
        for each in (directory, path):
            os.chown(each, 0, 6)  # the group "disk", which every Debian has
        with as_nobody(), pytest.raises(errors.NixletError) as caught:
            await snapshotters.check_store(nix.DaemonStore(nix.DaemonSettings(socket=str(path))))
    assert caught.value.message == f"the Nix daemon's socket {path} can't be opened: Permission denied"
    what = f"the directory {directory} is" if closed == "directory" else "the socket is"
    mode = "0750" if closed == "directory" else "0660"
    assert caught.value.hint == f"{what} for group disk (mode {mode}): join it, or run nixlet as root"


@pytest.mark.parametrize("owner", [0, 65534])
async def test_a_store_that_is_not_ours_to_write(open_to_all: Path, owner: int) -> None:
    """The real Nix answers whoever may read, and would fail only when something is to be fetched."""
    # What Nix itself wants to make at once is there.
    for name, owned_by in (("store", owner), ("state", 65534), ("store/.links", 65534)):
        (open_to_all / name).mkdir(mode=0o755)
        os.chown(open_to_all / name, owned_by, owned_by)
    own = {"NIX_STORE_DIR": f"{open_to_all}/store", "NIX_STATE_DIR": f"{open_to_all}/state", "HOME": str(open_to_all)}
    store = nix.DaemonStore(nix.DaemonSettings.from_environment({**os.environ, **own}))
    with as_nobody():
        if owner:
            await snapshotters.check_store(store)
            return
        with pytest.raises(errors.PermissionDeniedError) as caught:
            await snapshotters.check_store(store)
    assert caught.value.message == (
        f"no daemon serves {open_to_all}/state/daemon-socket/socket, and the store directory {open_to_all}/store"
        " (mode 0755) is not ours to write"
    )
    assert "nix-daemon.socket" in caught.value.hint


async def test_overlays_work_here_and_leave_nothing(layout: config.Layout) -> None:
    await snapshotters.check_supported(config.Settings(snapshotter="overlayfs"), layout)
    assert os.listdir(layout.containerd_root) == []
    assert mounts.below(layout.containerd_root) == []


@contextlib.contextmanager
def overlay(directory: Path) -> Iterator[Path]:
    for name in ("lower", "upper", "work", "merged"):
        (directory / name).mkdir()
    options = f"lowerdir={directory}/lower,upperdir={directory}/upper,workdir={directory}/work"
    mounts.mount("overlay", str(directory / "merged"), "overlay", 0, options)
    try:
        yield directory / "merged"
    finally:
        mounts.unmount(str(directory / "merged"))


async def test_overlays_do_not_work_on_an_overlay(tmp_path: Path) -> None:
    with overlay(tmp_path) as merged:
        layout = config.Layout(f"{merged}/data", f"{tmp_path}/state")
        error = await refusal("overlayfs", layout)
        assert error.message.startswith(
            f'"overlayfs" snapshotter cannot be enabled for "{layout.containerd_root}", '
            'try using "fuse-overlayfs" or "native": failed to mount overlay: '
        )
        assert "volume" in str(error.hint)
        assert os.listdir(layout.containerd_root) == []


async def test_without_kinds_in_directories(layout: config.Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """As xfs was made before 2015; no kernel here has one."""
    monkeypatch.setattr(mounts, "has_file_types", lambda _: False)
    error = await refusal("overlayfs", layout)
    assert error.message.endswith(
        f": {layout.containerd_root} does not support d_type. If the backing filesystem is xfs, please reformat with "
        "ftype=1 to enable d_type support"
    )


async def test_snapshots_of_ours_are_not_for_containerds_program(
    layout: config.Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(tmp_path, monkeypatch, ("fuse-overlayfs", "mount.fuse3", "containerd-fuse-overlayfs-grpc"))
    root = Path(layout.snapshotter_root("fuse-overlayfs"))
    root.mkdir(parents=True)
    (root / "nixlet.db").touch()
    settings = config.Settings(snapshotter="native", also_snapshotter=("fuse-overlayfs",))
    with pytest.raises(errors.UnsupportedError) as raised:
        await snapshotters.check_supported(settings, layout)
    assert raised.value.message == FUSE_REFUSAL.format(
        layout.containerd_root,
        f"{root} holds snapshots of nixlet's own snapshotter, which can only be a node's first one",
    )
    assert os.listdir(root) == ["nixlet.db"]


STARGZ_REFUSAL = '"stargz" snapshotter cannot be enabled for "{}", try using "overlayfs" or "native": {}'


@pytest.mark.parametrize(
    ("there", "missing", "hint"),
    [
        ((), "fusermount", "install it (Debian: apt install fuse3), or put its directory on PATH"),
        (("fusermount",), "containerd-stargz-grpc", "install it, or put its directory on PATH"),
    ],
)
async def test_programs_of_stargz(
    layout: config.Layout,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    there: tuple[str, ...],
    missing: str,
    hint: str,
) -> None:
    only(tmp_path, monkeypatch, there)
    error = await refusal("stargz", layout)
    assert error.message == STARGZ_REFUSAL.format(layout.containerd_root, f"{missing} not installed")
    assert error.hint == hint
    assert not os.path.exists(layout.data_dir)


async def test_stargz_is_made_of_overlays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(tmp_path, monkeypatch, ("fusermount", "containerd-stargz-grpc"))
    with overlay(tmp_path) as merged:
        layout = config.Layout(f"{merged}/data", f"{tmp_path}/state")
        error = await refusal("stargz", layout)
    assert error.message.startswith(STARGZ_REFUSAL.format(layout.containerd_root, "failed to mount overlay: "))


def only(directory: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]) -> None:
    """Have these programs and no others, also where the machine has them."""
    for name in names:
        (directory / name).write_text("#!/bin/sh\n")
        (directory / name).chmod(0o755)
    monkeypatch.setattr(process, "find_program", lambda name: shutil.which(name, path=str(directory)))


FUSE_REFUSAL = '"fuse-overlayfs" snapshotter cannot be enabled for "{}", try using "native": {}'


@pytest.mark.parametrize(
    ("there", "missing", "package"),
    [((), "fuse-overlayfs", "fuse-overlayfs"), (("fuse-overlayfs",), "mount.fuse3", "fuse3")],
)
async def test_programs_of_fuse_overlayfs(
    layout: config.Layout,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    there: tuple[str, ...],
    missing: str,
    package: str,
) -> None:
    only(tmp_path, monkeypatch, there)
    error = await refusal("fuse-overlayfs", layout)
    assert error.message == FUSE_REFUSAL.format(layout.containerd_root, f"{missing} not installed")
    assert error.hint == f"install it (Debian: apt install {package}), or put its directory on PATH"
    assert not os.path.exists(layout.data_dir)


@pytest.mark.parametrize("name", ["native", "btrfs", "zfs", "devmapper", "my-own"])
async def test_others_are_containerds_business(layout: config.Layout, name: str) -> None:
    await snapshotters.check_supported(config.Settings(snapshotter=name), layout)
    assert not os.path.exists(layout.data_dir)


@pytest.mark.parametrize("name", ["nix", "overlayfs", "fuse-overlayfs", "stargz"])
async def test_elsewhere_than_on_linux(layout: config.Layout, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    error = await refusal(name, layout)
    assert error.message.endswith(f": {name} is not supported: unsupported platform")


async def test_somebody_elses_containerd_has_its_own_overlays(tmp_path: Path) -> None:
    with overlay(tmp_path) as merged:
        layout = config.Layout(f"{merged}/data", f"{tmp_path}/state")
        settings = config.Settings(
            snapshotter="overlayfs", container_runtime_endpoint="/run/containerd/containerd.sock"
        )
        await snapshotters.check_supported(settings, layout)
        assert not os.path.exists(layout.data_dir)
