"""Which snapshotters a node can have, and whether the one it is to have works here; checks and sentences are k3s's.

Other names than those below are containerd's business: it has the snapshotter built in, or a drop-in names a proxy plugin.
"""

import asyncio
import contextlib
import json
import logging
import os
import stat
import sys
import tempfile
from collections.abc import Mapping

from nixlet import errors
from nixlet.containerd import config as containerd_config
from nixlet.host import files, fuseoverlay, mounts, process, unixsocket, userns
from nixlet.node.requirements import plugins, preflight
from nixlet.node.settings import config as node_config
from nixlet.snapshots import model
from nixlet.store import paths
from nixlet.store.daemon import client as nix

#: What to try instead, by snapshotter.
_INSTEAD: Mapping[str, str] = {
    "overlayfs": '"fuse-overlayfs" or "native"',
    "fuse-overlayfs": '"native"',
    "stargz": '"overlayfs" or "native"',
    containerd_config.NIX: '"overlayfs" or "native"',
}

_log = logging.getLogger("nixlet.node")

#: Seconds after which somebody is looked for who keeps Nix from answering.
_ANSWER_TIMEOUT = 2.0

#: The name of a store path that nobody has.
_NOBODYS = f"{'0' * 32}-nixlet"


def refused(snapshotter: str, root: str, cause: errors.NixletError) -> errors.NixletError:
    """Why a snapshotter can't be had, and what to try instead.

    Args:
        snapshotter: Its name.
        root: containerd's root.
        cause: What is wrong.
    """
    error = errors.UnsupportedError(
        f"{json.dumps(snapshotter)} snapshotter cannot be enabled for {json.dumps(root, ensure_ascii=False)}, "
        f"try using {_INSTEAD[snapshotter]}: {cause.message}",
        hint=cause.hint,
    )
    error.__cause__ = cause
    return error


async def check_supported(
    settings: node_config.Settings, layout: node_config.Layout, store: nix.DaemonStore | None = None
) -> None:
    """Check that the snapshotters work here; for ours, whether the store answers. Where containers' roots can be is probed apart.

    Raises:
        UnsupportedError: One doesn't; the sentence says what to try instead.
    """
    own = not settings.container_runtime_endpoint
    for name in (settings.snapshotter, *settings.also_snapshotter):
        plugin = plugins.of(settings, layout) if name == settings.snapshotter else _further(name, settings, layout)
        try:
            await _check(name, layout, plugin, own=own)
            if store is not None and name == settings.snapshotter:
                await check_store(store, name)
        except errors.NixletError as error:
            if name in _INSTEAD:
                raise refused(name, layout.containerd_root, error) from error
            raise


def _further(name: str, settings: node_config.Settings, layout: node_config.Layout) -> plugins.Plugin | None:
    return next((each for each in plugins.further(settings, layout) if each.proxy.name == name), None)


async def _check(name: str, layout: node_config.Layout, plugin: plugins.Plugin | None, *, own: bool) -> None:
    if name in _INSTEAD and not sys.platform.startswith("linux"):
        raise errors.UnsupportedError(f"{name} is not supported: unsupported platform")
    if name == "overlayfs" and own:
        await asyncio.to_thread(check_overlay, layout.containerd_root)
    if plugin is None:
        return
    for need in plugin.needs:
        need.check()
    if plugin.daemon and plugin.has_snapshots_of_ours():
        raise errors.FailedPreconditionError(
            f"{plugin.proxy.root} holds snapshots of nixlet's own snapshotter, which can only be a node's first one",
            hint=f"use --snapshotter {name}, or remove its images, pods and directory",
        )
    if plugin.overlay is model.Overlay.FUSE_OVERLAYFS:
        await check_fuse_overlay(layout.containerd_root)
    if name == containerd_config.STARGZ:
        await asyncio.to_thread(check_overlay, os.path.join(plugin.proxy.root, "snapshotter"))


async def check_store(store: nix.DaemonStore, snapshotter: str = containerd_config.NIX) -> None:
    """Check that there is Nix, and that its store answers a question, unless it waits for a garbage collection.

    Args:
        store: The store.
        snapshotter: What it is for.

    Raises:
        UnavailableError: There is none, or it doesn't; the sentence names the socket or directory at fault.
        PermissionDeniedError: We may not ask.
    """
    settings = store.settings
    if process.find_program("nix-store") is None and not os.path.exists(settings.socket):
        raise errors.UnavailableError(
            f"nix-store not found in PATH: install nix (https://nixos.org/download) to use the {snapshotter} snapshotter",
            hint=f"PATH is {os.environ.get('PATH', '')}; a service's is set in its unit, or in /etc/default/nixlet",
        )
    preflight.check_nix(settings.stdio[0], settings.socket)
    if userns.is_inside():
        # Its own nix-daemon would try, and complain of something else.
        check_ours(store)
    asking = asyncio.create_task(_ask(store), name="a question to Nix")
    try:
        while not asking.done():
            await asyncio.wait([asking], timeout=_ANSWER_TIMEOUT)
            if not asking.done() and (who := await asyncio.to_thread(store.awaited)):
                # What is there can be started meanwhile.
                _log.warning("the Nix store %s does not answer yet: %s", store.store_dir, who)
                return
        await asking
    finally:
        asking.cancel()
        await asyncio.wait([asking])
    # A store that is mounted read-only is Nix's business: it mounts it anew for itself, or would not have answered.
    if os.path.isdir(store.real_dir) and not os.statvfs(store.real_dir).f_flag & os.ST_RDONLY:
        check_ours(store)


def check_ours(store: nix.DaemonStore) -> None:
    """Check that a daemon keeps a store, or that it is ours to write.

    Raises:
        PermissionDeniedError: Neither.
    """
    settings, directory = store.settings, store.real_dir
    if not unixsocket.is_served(settings.socket) and os.path.isdir(directory) and not os.access(directory, os.W_OK):
        mode = stat.S_IMODE(os.stat(directory).st_mode)
        raise errors.PermissionDeniedError(
            f"no daemon serves {settings.socket}, and the store directory {directory} (mode {mode:04o}) is not ours to write",
            hint="start the Nix daemon (systemctl start nix-daemon.socket), or run nixlet as the directory's owner",
        )


async def _ask(store: nix.DaemonStore) -> None:
    """A question that the database must answer, about a path that nobody has."""
    async with store.session() as session:
        await session.present({paths.from_name(_NOBODYS, store.store_dir)})


def check_binds(containerd: str) -> None:
    """Check that a version of containerd can bind store paths into containers, which in a user namespace is the only way.

    Raises:
        UnsupportedError: It can't.
    """
    if containerd.startswith("1.6."):
        raise errors.UnsupportedError(
            f"containerd {containerd} can't bind store paths into containers, and an ordinary user's node has no other way",
            hint="use containerd 1.7 or later: --containerd",
        )


def check_overlay(root: str) -> None:
    """Check that containers' roots can be overlays below a directory, by mounting one (blocking); nothing stays behind.

    Raises:
        UnsupportedError: They can't.
        FailedPreconditionError: The directory can't be made.
    """
    files.make_directory(root, mode=0o700)
    with tempfile.TemporaryDirectory(prefix=".check-overlay-", dir=root, ignore_cleanup_errors=True) as base:
        if not mounts.has_file_types(base):
            raise errors.UnsupportedError(
                f"{root} does not support d_type. If the backing filesystem is xfs, please reformat with ftype=1 to "
                "enable d_type support"
            )
        for name in ("lower1", "lower2", "upper", "work", "merged"):
            files.new_directory(os.path.join(base, name))
        merged = os.path.join(base, "merged")
        layers = f"lowerdir={base}/lower2:{base}/lower1,upperdir={base}/upper,workdir={base}/work"
        options = ",".join((layers, *mounts.overlay_attributes()))
        with contextlib.ExitStack() as stack:
            try:
                mounts.mount("overlay", merged, "overlay", 0, options)
            except errors.NixletError as error:
                raise errors.UnsupportedError(
                    f"failed to mount overlay: {error.message}",
                    hint="use a data directory on a file system such as ext4, xfs, btrfs or tmpfs, such as a volume",
                ) from error
            stack.callback(mounts.unmount, merged)
            with open(os.path.join(merged, "written"), "w", encoding="ascii"):
                pass


async def check_fuse_overlay(root: str) -> None:
    """Check that containers' roots can be shown by fuse-overlayfs below a directory, by having it show one; nothing stays behind.

    Raises:
        UnsupportedError: They can't.
        FailedPreconditionError: The directory can't be made.
    """
    files.make_directory(root, mode=0o700)
    with tempfile.TemporaryDirectory(prefix=".check-fuse-overlay-", dir=os.path.realpath(root)) as base:
        for name in ("lower1", "lower2", "merged"):
            files.new_directory(os.path.join(base, name))
        for name in ("lower1", "lower2"):
            files.new_directory(os.path.join(base, name, f"of-{name}"))
        try:
            options = f"lowerdir={base}/lower2:{base}/lower1"
            async with fuseoverlay.shown(os.path.join(base, "merged"), options, apart=True) as seen:
                if sorted(os.listdir(seen)) != ["of-lower1", "of-lower2"]:
                    raise errors.UnsupportedError("it shows wrong content")
        except (errors.NixletError, OSError) as error:
            raise errors.UnsupportedError(
                f"fuse-overlayfs not functional, make sure running with kernel >= 4.18: {error}",
                hint="" if os.path.exists("/dev/fuse") else "there is no /dev/fuse: modprobe fuse",
            ) from error
