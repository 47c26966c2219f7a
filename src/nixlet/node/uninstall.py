"""Taking a node away: its pods, mounts, network, state, data and GC roots; never the store, nor what others put there.

First in order, as a node that runs would do it (so that containerd, runc and the CNI plugins give back what they took), then what
is left by hand. No tree is deleted while the mount table of any process shows something beneath it or bound from it.
"""

import asyncio
import contextlib
import dataclasses
import glob
import itertools
import logging
import os
import re
import shutil
import signal
from collections.abc import Iterator, Sequence

from nixlet import errors
from nixlet.containerd import cri
from nixlet.host import files, iptables, logfiles, mounts, network, process
from nixlet.kube import player
from nixlet.node import config as node_config
from nixlet.node import preflight, server, stand
from nixlet.rpc import channel as channels
from nixlet.store.daemon import client as nix

#: Seconds for processes to be gone after SIGKILL, and for mounts that a dying process still holds.
_PATIENCE = 10.0

#: Where containerd's CNI library keeps what the plugins answered, by network and container.
_CNI_RESULTS = "/var/lib/cni/results"

_log = logging.getLogger("nixlet.uninstall")


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What would go, and what stays.

    Attributes:
        trees: Directories and files that are deleted.
        emptied: Directories that are removed when nothing else is in them.
        bridge: The pods' bridge.
        kept: What stays, in words.
    """

    trees: tuple[str, ...]
    emptied: tuple[str, ...]
    bridge: str
    kept: tuple[str, ...]


def plan(settings: node_config.Settings) -> Plan:
    """What taking away the node of these settings means.

    Raises:
        NotFoundError: There is none.
        FailedPreconditionError: The store lies in what would be deleted.
    """
    layout = node_config.Layout(settings.data_dir, settings.state_dir)
    if not os.path.exists(layout.lock):
        raise errors.NotFoundError(
            f"there is no node at {layout.data_dir}", hint="say where it is: --data-dir and --state-dir"
        )
    nix_settings = nix.DaemonSettings.from_environment(os.environ)
    gcroots = os.path.join(nix_settings.gcroots, "nixlet")
    running = (layout.containerd_state, layout.runc_root, layout.cni_data_dir, layout.health_socket)
    logs = [settings.log + ending for ending in ("", *(f".{n}" for n in range(1, logfiles.BACKUPS + 1)))]
    roots = os.path.join(gcroots, stand.roots_owner(layout.snapshotter_root))
    # The log may have been sent to a terminal or to /dev/null.
    plain_logs = filter(_is_plain_file, logs if settings.log else ())
    trees = (*running, layout.agent, roots, layout.lock, *plain_logs)
    store = os.path.realpath(nix_settings.real_dir or nix_settings.store_dir)
    for tree in trees:
        if f"{store}/".startswith(f"{os.path.realpath(tree)}/"):
            raise errors.FailedPreconditionError(f"the Nix store {store} lies in {tree}, which would be deleted")
    kept = (
        f"the store paths in {nix_settings.store_dir} (nix-collect-garbage deletes what nothing else needs)",
        f"the configuration in {os.path.dirname(node_config.DEFAULT_PRIVATE_REGISTRY)}",
        "the programs: nixlet, containerd, runc, the CNI plugins, Nix",
    )
    present = tuple(tree for tree in trees if os.path.lexists(tree))
    return Plan(present, (layout.state_dir, layout.data_dir, gcroots), settings.bridge, kept)


def _is_plain_file(path: str) -> bool:
    return os.path.isfile(path) and not os.path.islink(path)


async def uninstall(settings: node_config.Settings) -> None:
    """Take the node away.

    Raises:
        FailedPreconditionError: It is running, or something is mounted that is not ours; what was not taken away yet stays.
    """
    preflight.check_root()
    layout = node_config.Layout(settings.data_dir, settings.state_dir)
    doomed = plan(settings)
    try:
        with files.exclusive_lock(layout.lock, what=f"the data directory {layout.data_dir}"):
            pass
    except errors.FailedPreconditionError as error:
        raise errors.FailedPreconditionError(
            f"the node is running: {error.message}", hint="stop it first, as in: systemctl disable --now nixlet"
        ) from error
    if not settings.container_runtime_endpoint:
        await _in_order(settings)
    with files.exclusive_lock(layout.lock, what=f"the data directory {layout.data_dir}"):
        sockets = _shim_sockets(layout)
        await _delete_containers(settings, layout)
        await _end_shims(layout)
        _remove(sockets)
        await _unmount(layout)
        network_name = f"nixlet-{settings.bridge}"
        await iptables.remove_rules(network=network_name)
        _remove(glob.glob(f"{_CNI_RESULTS}/{network_name}-*"))
        network.remove_bridge(settings.bridge)
        _check_free(doomed.trees)
        await asyncio.to_thread(_remove, doomed.trees)
    for directory in doomed.emptied:
        with contextlib.suppress(OSError):
            os.rmdir(directory)


async def _in_order(settings: node_config.Settings) -> None:
    """Start the node once more, and let it remove its pods and images."""
    quiet = dataclasses.replace(settings, health_address=node_config.NO_HEALTH)
    layout = node_config.Layout(settings.data_dir, settings.state_dir)
    try:
        async with server.running(quiet), channels.connect(layout.containerd_socket) as channel:
            runtime = cri.RuntimeClient(channel, layout.containerd_socket)
            images = cri.ImageClient(channel, layout.containerd_socket)
            for sandbox in await runtime.sandboxes():
                with contextlib.suppress(errors.NixletError):
                    await player.stop_sandbox(runtime, sandbox.id)
                    await runtime.remove_sandbox(sandbox.id)
            for image in await images.images():
                with contextlib.suppress(errors.NixletError):
                    await images.remove(image.id)
    except errors.NixletError as error:
        _log.warning("the node can't be started once more; its pods are ended by hand: %s", error)


def _directories(path: str) -> list[str]:
    try:
        return sorted(entry.path for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False))
    except (FileNotFoundError, NotADirectoryError):
        return []


async def _delete_containers(settings: node_config.Settings, layout: node_config.Layout) -> None:
    """Let runc end the containers that are left, with their cgroups."""
    runc = process.find_program(settings.runc)
    for namespace in _directories(layout.runc_root):
        for container in _directories(namespace) if runc else []:
            argv = [runc or "", "--root", namespace, "delete", "--force", os.path.basename(container)]
            with contextlib.suppress(errors.NixletError):
                await process.run(argv, timeout=_PATIENCE)


def _shim_sockets(layout: node_config.Layout) -> list[str]:
    """The sockets of shims, which lie outside of our directories; each bundle's file "address" names one."""
    found = []
    for namespace in _directories(os.path.join(layout.containerd_state, "io.containerd.runtime.v2.task")):
        for bundle in _directories(namespace):
            with contextlib.suppress(OSError, UnicodeDecodeError), open(f"{bundle}/address", encoding="utf-8") as file:
                address = file.read(200).strip().removeprefix("unix://")
                if re.fullmatch(r"/run/containerd/s/[0-9a-f]{64}", address):
                    found.append(address)
    return found


def _processes() -> Iterator[tuple[int, int, list[str]]]:
    """Number, parent and command line of each process."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                with open(f"/proc/{entry}/stat", encoding="utf-8", errors="replace") as file:
                    parent = int(file.read().rpartition(")")[2].split()[1])
                with open(f"/proc/{entry}/cmdline", "rb") as file:
                    command = file.read().decode(errors="surrogateescape").split("\0")
                yield int(entry), parent, command


def _shim_processes(layout: node_config.Layout) -> list[int]:
    """Our shims and all that runs below them, the deepest last."""
    listed = list(_processes())
    ours = [
        pid
        for pid, _, command in listed
        if "containerd-shim" in command[0] and ("-address", layout.containerd_socket) in itertools.pairwise(command)
    ]
    for pid in ours:
        ours.extend(child for child, parent, _ in listed if parent == pid)
    return ours


async def _end_shims(layout: node_config.Layout) -> None:
    deadline = asyncio.get_running_loop().time() + _PATIENCE
    while left := _shim_processes(layout):
        if asyncio.get_running_loop().time() > deadline:
            raise errors.FailedPreconditionError(f"process {left[0]} of a pod does not end")
        for pid in reversed(left):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(0.1)


async def _unmount(layout: node_config.Layout) -> None:
    """Unmount what containerd and the snapshotter mounted, deepest first, and never lazily: nothing may live on unseen."""
    for place in (layout.containerd_state, layout.containerd_root):
        for entry in reversed(mounts.below(place)):
            for attempt in range(20):
                try:
                    mounts.unmount(entry.path)
                    break
                except errors.FailedPreconditionError:
                    if attempt == 19:
                        raise
                    await asyncio.sleep(0.1)


def _namespaces() -> Iterator[str]:
    """The mount table of each mount namespace, through one of its processes."""
    seen = set()
    for entry in ["self", *filter(str.isdigit, os.listdir("/proc"))]:
        with contextlib.suppress(OSError):
            namespace = os.readlink(f"/proc/{entry}/ns/mnt")
            if namespace not in seen:
                seen.add(namespace)
                yield f"/proc/{entry}/mountinfo"


def _check_free(trees: Sequence[str]) -> None:
    """Check that nothing is mounted beneath trees, and nothing anywhere is bound from them or stacked on them.

    Raises:
        FailedPreconditionError: Something is.
    """
    own = list(mounts.table())
    for tree in filter(os.path.isdir, trees):
        real = os.path.realpath(tree)
        under = f"{real}/"
        # The mount that the tree lies on: what is bound from the tree names it by its path in that file system.
        base = max(
            (entry for entry in own if f"{real}/".startswith(f"{entry.path.rstrip('/')}/")), key=lambda e: len(e.path)
        )
        inside = os.path.normpath(f"{base.root.rstrip('/')}/{os.path.relpath(real, base.path)}")
        for mountinfo in _namespaces():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                for entry in mounts.table(mountinfo):
                    bound = entry.device == base.device and f"{entry.root}/".startswith(f"{inside}/")
                    if f"{entry.path}/".startswith(under) or bound or under in entry.options:
                        raise errors.FailedPreconditionError(
                            f"{tree} is not deleted: {entry.path} is mounted {'from' if bound else 'in'} it",
                            hint=f"look at it, and unmount it: umount {entry.path}",
                        )


def _remove(trees: Sequence[str]) -> None:
    for tree in trees:
        if os.path.isdir(tree) and not os.path.islink(tree):
            shutil.rmtree(tree)
        else:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(tree)
