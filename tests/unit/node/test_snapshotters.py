"""Whether a snapshotter works here: k3s's checks, and its sentences."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.host import mounts
from nixlet.node import config, snapshotters
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


#: Asks a store as somebody whom permissions stop.
_ASK = """
import asyncio, sys
from nixlet import errors
from nixlet.node import snapshotters
from nixlet.store.daemon import client
try:
    asyncio.run(snapshotters.check_store(client.DaemonStore(client.DaemonSettings(socket=sys.argv[1]))))
except errors.NixletError as error:
    print(error.message, error.hint, sep="\\n")
"""


@pytest.mark.parametrize("closed", ["directory", "socket"])
def test_who_may_not_ask_learns_whom_to_ask(tmp_path_factory: pytest.TempPathFactory, closed: str) -> None:
    import socket
    import tempfile

    with tempfile.TemporaryDirectory() as base, socket.socket(socket.AF_UNIX) as daemon:
        directory = Path(base) / "daemon-socket"
        directory.mkdir()
        path = directory / "socket"
        daemon.bind(str(path))
        daemon.listen()
        Path(base).chmod(0o755)
        directory.chmod(0o750 if closed == "directory" else 0o755)
        path.chmod(0o660)
        for each in (directory, path):
            os.chown(each, 0, 6)  # the group "disk", which every Debian has
        argv = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-c", _ASK, str(path)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    sentence, hint = done.stdout.splitlines()
    assert sentence == f"the Nix daemon's socket {path} can't be opened: Permission denied"
    what = f"the directory {directory} is" if closed == "directory" else "the socket is"
    mode = "0750" if closed == "directory" else "0660"
    assert hint == f"{what} for group disk (mode {mode}): join it, or run nixlet as root"


#: The same of a store and a state directory of one's own, where no daemon serves.
_ASK_OWN = """
import asyncio, os, sys
from nixlet import errors
from nixlet.node import snapshotters
from nixlet.store.daemon import client
os.environ |= {"NIX_STORE_DIR": f"{sys.argv[1]}/store", "NIX_STATE_DIR": f"{sys.argv[1]}/state", "HOME": sys.argv[1]}
try:
    asyncio.run(snapshotters.check_store(client.DaemonStore(client.DaemonSettings.from_environment(os.environ))))
    print("answers")
except errors.NixletError as error:
    print(error.message, error.hint, sep="\\n")
"""


@pytest.mark.parametrize("owner", [0, 65534])
def test_a_store_that_is_not_ours_to_write(owner: int) -> None:
    """The real Nix answers whoever may read, and would fail only when something is to be fetched."""
    import tempfile

    with tempfile.TemporaryDirectory() as base:
        Path(base).chmod(0o755)
        # What Nix itself wants to make at once is there.
        for name, owned_by in (("store", owner), ("state", 65534), ("store/.links", 65534)):
            (Path(base) / name).mkdir(mode=0o755)
            os.chown(Path(base) / name, owned_by, owned_by)
        argv = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-c", _ASK_OWN, base]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
        assert done.stdout, done.stderr
        sentence, *hint = done.stdout.splitlines()
    if owner:
        assert sentence == "answers"
    else:
        assert sentence == (
            f"no daemon serves {base}/state/daemon-socket/socket, and the store directory {base}/store (mode 0755) is"
            " not ours to write"
        )
        assert "nix-daemon.socket" in hint[0]


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


@pytest.mark.parametrize(("name", "instead"), [("fuse-overlayfs", '"native"'), ("stargz", '"overlayfs" or "native"')])
async def test_names_whose_support_is_to_come(layout: config.Layout, name: str, instead: str) -> None:
    error = await refusal(name, layout)
    assert error.message == (
        f'"{name}" snapshotter cannot be enabled for "{layout.containerd_root}", try using {instead}: '
        f"nixlet has no support for {name} yet"
    )


@pytest.mark.parametrize("name", ["native", "btrfs", "zfs", "devmapper", "my-own"])
async def test_others_are_containerds_business(layout: config.Layout, name: str) -> None:
    await snapshotters.check_supported(config.Settings(snapshotter=name), layout)
    assert not os.path.exists(layout.data_dir)


@pytest.mark.parametrize("name", ["nix", "overlayfs", "fuse-overlayfs", "stargz"])
async def test_elsewhere_than_on_linux(layout: config.Layout, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
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
