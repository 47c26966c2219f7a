"""What a node that is being taken away left on the machine: ended, unmounted and deleted by hand."""

import asyncio
import contextlib
import itertools
import os
import shutil
import signal
from collections.abc import Iterator, Sequence

from nixlet import errors
from nixlet.host import detached, mounts, process
from nixlet.node.ownership import podtraces
from nixlet.node.requirements import plugins
from nixlet.node.settings import config as node_config

#: Seconds for processes to be gone after SIGKILL, and for mounts that a dying process still holds.
_PATIENCE = 10.0


async def delete_containers(settings: node_config.Settings, layout: node_config.Layout) -> None:
    """Let runc end the containers that are left, with their cgroups."""
    runc = process.find_program(settings.runc)
    for namespace in podtraces.directories(layout.runc_root):
        for container in podtraces.directories(namespace) if runc else []:
            argv = [runc or "", "--root", namespace, "delete", "--force", os.path.basename(container)]
            with contextlib.suppress(errors.NixletError):
                await process.run(argv, timeout=_PATIENCE)


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


async def end_shims(layout: node_config.Layout) -> None:
    """Kill the shims of a node's pods, and all that runs below them.

    Raises:
        FailedPreconditionError: One does not end.
    """
    deadline = asyncio.get_running_loop().time() + _PATIENCE
    while left := _shim_processes(layout):
        if asyncio.get_running_loop().time() > deadline:
            raise errors.FailedPreconditionError(f"process {left[0]} of a pod does not end")
        for pid in reversed(left):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(0.1)


async def end_plugin(plugin: plugins.Plugin) -> None:
    """End the program that serves a node's snapshots, where it goes on without the node.

    Raises:
        FailedPreconditionError: Another program serves its socket.
    """
    if pid := detached.serving(plugin.proxy.address, plugin.daemon):
        with contextlib.suppress(ProcessLookupError), contextlib.closing(detached.Detached(pid, (), "")) as watched:
            await watched.stop(_PATIENCE)


async def unmount(place: str, *, itself: bool = False) -> None:
    """Unmount what was mounted below a directory, deepest first, and never lazily: nothing may live on unseen.

    Args:
        place: The directory. What is mounted on it is a disk that somebody gave it, unless it is said to be ours.
        itself: Only what is mounted on the directory, and not what is below it.
    """
    for entry in reversed(mounts.below(place)):
        if itself != (entry.path == os.path.realpath(place)):
            continue
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


def check_free(trees: Sequence[str]) -> None:
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
                    # Layers are named as whoever mounted them named them, which may be by way of a link.
                    stacked = under in entry.options or f"{tree}/" in entry.options
                    bound = entry.device == base.device and f"{entry.root}/".startswith(f"{inside}/")
                    within = f"{entry.path}/".startswith(under)
                    if within or bound or stacked:
                        raise errors.FailedPreconditionError(
                            f"{tree} is not deleted: {entry.path} is mounted {'in' if within or not bound else 'from'} it",
                            hint=f"look at it, and unmount it: umount {entry.path}",
                        )


def remove(trees: Sequence[str]) -> None:
    """Delete directories with all that is in them, files and links; what isn't there is no trouble."""
    for tree in trees:
        if os.path.isdir(tree) and not os.path.islink(tree):
            shutil.rmtree(tree)
        else:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(tree)
