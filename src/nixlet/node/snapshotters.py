"""Whether this host can run the snapshotter that a node is told to use, found out by trying it.

The names, and what is said of those that can't be used, are those of k3s's ``--snapshotter``.
"""

import asyncio
import contextlib
import grp
import os
import pwd
import stat
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple

from nixlet import errors
from nixlet.host import mounts, process, userns
from nixlet.node import config as node_config
from nixlet.node import preflight
from nixlet.rpc import server as rpc_server
from nixlet.store import paths
from nixlet.store.daemon import client as nix

NIX = "nix"

#: Asked for when a store is to show that it answers; nobody has it.
_NOBODYS = f"{'0' * 32}-nixlet"


async def check_supported(
    settings: node_config.Settings,
    layout: node_config.Layout,
    store: nix.DaemonStore | None,
    *,
    platform: str = sys.platform,
) -> None:
    """Check that the node's snapshotter works here; one that is not known is containerd's to judge.

    Args:
        settings: The node's settings.
        layout: Where things are. containerd's root is made if it isn't there, and taken away again.
        store: The store behind our own snapshotter.
        platform: The system that this is.

    Raises:
        UnsupportedError: It doesn't; the sentence says why, and what may work instead.
    """
    name = settings.snapshotter
    known = _KNOWN.get(name)
    # Somebody else's containerd has other people's snapshotters; ours needs the same in front of any containerd.
    if known is None or (settings.container_runtime_endpoint and name != NIX):
        return
    if platform != "linux":
        raise errors.UnsupportedError(f"{name} is not supported: unsupported platform", hint="run nixlet on Linux")
    root = layout.containerd_root
    try:
        with preflight.present(root):
            await known.check(layout, store)
    except errors.NixletError as error:
        instead = " or ".join(f'"{other}"' for other in known.instead)
        raise errors.UnsupportedError(
            f'"{name}" snapshotter cannot be enabled for "{root}", try using {instead}: {error.message}',
            hint=error.hint,
        ) from error


async def _check_overlay(layout: node_config.Layout, store: nix.DaemonStore | None) -> None:
    del store
    await asyncio.to_thread(check_overlay, layout.containerd_root, layout.data_dir)


def check_overlay(root: str, data_dir: str) -> None:
    """Mount a small overlay below a directory, as containerd will; blocks.

    Args:
        root: containerd's root.
        data_dir: The directory that a person would put elsewhere.

    Raises:
        UnsupportedError: The file system can't be used.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".check-", dir=root) as base:
            _check_d_type(base, root)
            _mount_overlay(base)
    except OSError as error:
        raise errors.UnsupportedError(
            f"{root} can't be written: {error.strerror}", hint=f"look at the rights and the file system of {data_dir}"
        ) from error
    except errors.FailedPreconditionError as error:
        if preflight.file_system(root) != "overlay":
            hint = (
                "load the kernel's overlay module (modprobe overlay), or use a directory on ext4, xfs, btrfs or tmpfs"
            )
            raise errors.UnsupportedError(f"failed to mount overlay: {error.message}", hint=hint) from error
        raise errors.UnsupportedError(
            f"failed to mount overlay: containers can't be given a root file system below {data_dir}, which is itself on an"
            " overlay",
            hint=f"put {data_dir} on a volume, or on another file system such as ext4, xfs, btrfs or tmpfs",
        ) from error


def _check_d_type(base: str, root: str) -> None:
    """Check that listing a directory tells what its entries are (readdir(3), d_type), which overlayfs goes by."""
    os.mkdir(os.path.join(base, "entry"))
    with os.scandir(base) as entries:
        entry = next(entries)
    # What is gone can't be asked any more: only the listing can know.
    os.rmdir(entry.path)
    if not entry.is_dir(follow_symlinks=False):
        raise errors.UnsupportedError(
            f"{root} does not support d_type. If the backing filesystem is xfs, please reformat with ftype=1 to enable"
            " d_type support"
        )


def _mount_overlay(base: str) -> None:
    for name in ("lower1", "lower2", "upper", "work", "merged"):
        os.mkdir(os.path.join(base, name))
    options = f"lowerdir={base}/lower2:{base}/lower1,upperdir={base}/upper,workdir={base}/work"
    merged = os.path.join(base, "merged")
    # Trusted attributes are out of reach in a user namespace.
    mounts.mount("overlay", merged, "overlay", 0, f"{options},userxattr" if userns.is_inside() else options)
    mounts.unmount(merged)


def find_nix_store() -> str:
    """The path of nix-store, by which k3s tells whether a host has Nix.

    Raises:
        UnavailableError: It is not on PATH.
    """
    path = process.find_program("nix-store")
    if path is None:
        raise errors.UnavailableError(
            "nix-store not found in PATH: install nix (https://nixos.org/download) to use the nix snapshotter",
            hint="where it is installed, put its directory on the PATH of nixlet's service",
        )
    return path


async def _check_nix(layout: node_config.Layout, store: nix.DaemonStore | None) -> None:
    find_nix_store()
    await _check_overlay(layout, store)
    assert store is not None
    preflight.check_nix(store.settings.stdio[0], store.settings.socket)
    await check_store(store)


async def check_store(store: nix.DaemonStore) -> str:
    """Check that a store answers and can take paths; its Nix's version, or an empty string where it doesn't say.

    Raises:
        UnavailableError: It doesn't answer; the sentence names the socket or directory at fault.
        PermissionDeniedError: It refuses us, or nobody could write what is fetched.
    """
    socket, directory = store.settings.socket, store.real_dir
    try:
        async with store.session() as session:
            await session.present({paths.from_name(_NOBODYS, store.store_dir)})
            version = session.nix_version
    except errors.NixletError as error:
        blame = _blame(store)
        if not blame:
            raise
        raise errors.UnavailableError(f"{error.message}; {blame}", hint=error.hint) from error
    # A store that is mounted read-only is Nix's own business: it mounts it anew for itself, or would have failed here.
    if _is_written_by_us(store) and not os.statvfs(directory).f_flag & os.ST_RDONLY:
        raise errors.PermissionDeniedError(
            f"no Nix daemon serves {socket}, and we can't write to the store: {_owned(directory)}",
            hint="start the Nix daemon (systemctl start nix-daemon.socket), or run nixlet as the store's owner",
        )
    return version


def _is_written_by_us(store: nix.DaemonStore) -> bool:
    """Whether what is fetched would be written with our rights, and those don't suffice."""
    directory = store.real_dir
    return not rpc_server.is_served(store.settings.socket) and os.path.isdir(directory) and not _may_write(directory)


def _may_write(path: str) -> bool:
    return os.access(path, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)


def _blame(store: nix.DaemonStore) -> str:
    """What stands between us and a store that did not answer, with owner and mode; empty: nothing that can be seen."""
    socket = store.settings.socket
    step = "/"
    for part in socket.strip("/").split("/"):
        if not os.access(step, os.X_OK):
            return f"its directory can't be entered: {_owned(step)}"
        step = os.path.join(step, part)
    if os.path.exists(socket) and not os.access(socket, os.W_OK):
        return f"we may not write to it: {_owned(socket)}"
    if rpc_server.is_served(socket):
        return ""
    for directory in (store.real_dir, store.settings.state_dir):
        if os.path.isdir(directory) and not _may_write(directory):
            return f"no daemon serves {socket}, and we can't write to {_owned(directory)}"
    return ""


def _owned(path: str) -> str:
    """A file with its mode and owner: "/run/x (drwxr-x---, root:nixbld)"."""
    found = os.stat(path)
    user, group = str(found.st_uid), str(found.st_gid)
    with contextlib.suppress(KeyError):
        user = pwd.getpwuid(found.st_uid).pw_name
        group = grp.getgrgid(found.st_gid).gr_name
    return f"{path} ({stat.filemode(found.st_mode)}, {user}:{group})"


async def _check_nothing(layout: node_config.Layout, store: nix.DaemonStore | None) -> None:
    """containerd's native snapshotter copies files, which works everywhere."""
    del layout, store


async def _refuse(layout: node_config.Layout, store: nix.DaemonStore | None) -> None:
    del layout, store
    raise errors.UnsupportedError(
        "nixlet can't run it yet",
        hint="use a containerd that runs already and has it: --container-runtime-endpoint",
    )


class _Known(NamedTuple):
    """A snapshotter by name: how its needs are checked, and what may do in its place."""

    check: Callable[[node_config.Layout, nix.DaemonStore | None], Awaitable[None]]
    instead: tuple[str, ...]


_KNOWN: Mapping[str, _Known] = {
    NIX: _Known(_check_nix, ("overlayfs", "native")),
    "overlayfs": _Known(_check_overlay, ("fuse-overlayfs", "native")),
    "native": _Known(_check_nothing, ()),
    "fuse-overlayfs": _Known(_refuse, ("native",)),
    "stargz": _Known(_refuse, ("overlayfs", "native")),
}
