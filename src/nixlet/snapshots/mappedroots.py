"""Roots of containers in user namespaces, whose files have the owners that the container's image gave them.

containerd says with a snapshot how users and groups are mapped. It can't show a closure so itself: it would map one directory that all
layers are below, without the views that are mounted there, or own every file anew. So such a root is mounted here, over id-mapped
clones of its layers, and what containerd gets is a bind mount of it. overlayfs can't be id-mapped: the view of a closure is made once
more, over clones of its metadata and of the store, and lives in the root alone.

The root is mounted in its snapshot's directory, and stays as long as that: over the end of this process, too.
"""

import contextlib
import json
import os
import weakref
from asyncio import Lock, to_thread
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from nixlet import errors
from nixlet.host import files, idmapped, mounts, uncut, userns
from nixlet.snapshots import views

#: Labels by which containerd asks for such a root: extents "inside:outside:size", with commas between them.
_UIDS = "containerd.io/snapshot/uidmapping"
_GIDS = "containerd.io/snapshot/gidmapping"

#: Where a root is mounted in the directory of its snapshot, and a view while the root is being mounted over it.
_ROOT = "root"
_VIEW = "view"

#: The highest number of a user or group, and how many extents the kernel takes (user_namespaces(7)).
_HIGHEST = (1 << 32) - 2
_MOST = 340


class Owners(NamedTuple):
    """How a container's users and groups are mapped to those of this machine."""

    uids: tuple[userns.Extent, ...]
    gids: tuple[userns.Extent, ...]

    def outside(self, uid: int, gid: int) -> tuple[int, int]:
        """What a user and group of the image are on this machine.

        Raises:
            FailedPreconditionError: One of them is not mapped.
        """
        return _outside("user", self.uids, uid), _outside("group", self.gids, gid)


def owners(labels: Mapping[str, str]) -> Owners | None:
    """How a snapshot's labels ask for its owners to be mapped; None for a root as it is.

    Raises:
        InvalidArgumentError: They can't be read.
    """
    if _UIDS not in labels and _GIDS not in labels:
        return None
    return Owners(_extents(_UIDS, labels.get(_UIDS, "")), _extents(_GIDS, labels.get(_GIDS, "")))


def recorded(labels: str) -> Owners | None:
    """The same of labels as the database has them (JSON), which mostly say nothing of owners."""
    return owners(json.loads(labels)) if _UIDS in labels or _GIDS in labels else None


def _extents(label: str, text: str) -> tuple[userns.Extent, ...]:
    problem = errors.InvalidArgumentError(
        f"the snapshot's label {label} is {text[:100]!r}, and should be like 0:65536:65536"
    )
    parts = text.split(",")
    if len(parts) > _MOST:
        raise problem
    extents = []
    for part in parts:
        numbers = part.split(":")
        if len(numbers) != 3 or not all(
            number.isascii() and number.isdecimal() and len(number) < 11 for number in numbers
        ):
            raise problem
        extent = userns.Extent(*map(int, numbers))
        if not extent.size or max(extent.inside, extent.outside) + extent.size - 1 > _HIGHEST:
            raise problem
        extents.append(extent)
    return tuple(extents)


def _outside(kind: str, extents: Sequence[userns.Extent], number: int) -> int:
    for each in extents:
        if each.inside <= number < each.inside + each.size:
            return each.outside + number - each.inside
    raise errors.FailedPreconditionError(
        f"the image's root directory belongs to {kind} {number}, which the pod's user namespace does not map",
        hint="run the pod without a user namespace of its own (hostUsers: true)",
    )


class MappedRoots:
    """The roots that are mounted in the directories of snapshots."""

    def __init__(self, snapshots: str, overlay_options: Sequence[str] = ()) -> None:
        """Roots in the directories below one, whose overlays have some options besides."""
        self._snapshots = snapshots
        self._options = tuple(overlay_options)
        # A lock lives as long as somebody holds or awaits it.
        self._locks: weakref.WeakValueDictionary[int, Lock] = weakref.WeakValueDictionary()

    async def show(self, number: int, layers: Sequence[str | views.Pieces], owners: Owners, *, writable: bool) -> str:
        """Where a snapshot's root is mounted.

        Args:
            number: The snapshot's.
            layers: The directories of its layers, or what shows their closures; top first.
            owners: How its owners are mapped.
            writable: Whether it has an upper layer.

        Raises:
            FailedPreconditionError: The kernel refuses a mount or a user namespace.
        """
        directory = os.path.join(self._snapshots, str(number))
        root = os.path.join(directory, _ROOT)
        async with self._locks.setdefault(number, Lock()):
            if not mounts.is_mount_point(root):
                async with userns.made(owners.uids, owners.gids) as namespace:
                    await uncut.to_its_end(to_thread(self._mount, directory, layers, namespace, writable=writable))
        return root

    def _mount(self, directory: str, layers: Sequence[str | views.Pieces], namespace: int, *, writable: bool) -> None:
        root, own = os.path.join(directory, _ROOT), os.path.join(directory, "fs")
        with contextlib.ExitStack() as stack:
            lower = [
                stack.enter_context(_clone(layer, namespace))
                if isinstance(layer, str)
                else stack.enter_context(_view(layer, namespace, os.path.join(directory, _VIEW)))
                for layer in layers
            ]
            # What nobody writes to is below nothing: an overlay has two layers at least.
            options = [f"upperdir={own}", f"workdir={directory}/work"] if writable else []
            lowers = ":".join(lower if writable else [own, *lower])
            with contextlib.suppress(FileExistsError):
                files.new_directory(root)
            text = ",".join((*self._options, *options, f"lowerdir={lowers}"))
            mounts.mount("overlay", root, "overlay", 0 if writable else mounts.MS_RDONLY, text)


@contextlib.contextmanager
def _clone(directory: str, namespace: int | None) -> Iterator[str]:
    """A name of the clone of a directory, which is id-mapped by a user namespace."""
    fd = idmapped.clone(directory, namespace)
    try:
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


@contextlib.contextmanager
def _view(pieces: views.Pieces, namespace: int, place: str) -> Iterator[str]:
    """A name of the layer that shows a closure; an overlay over it keeps it, and nobody else sees it."""
    with contextlib.suppress(FileExistsError):
        files.new_directory(place)
    with _clone(pieces.meta, namespace) as meta, _clone(pieces.store, namespace) as store:
        mounts.mount("overlay", place, "overlay", mounts.MS_RDONLY, pieces.options(meta, store))
    with contextlib.ExitStack() as stack:
        try:
            # Nothing can be mounted over what has been unmounted, but over a clone of it.
            shown = stack.enter_context(_clone(os.path.join(place, views.LAYER), None))
        finally:
            mounts.unmount(place, mounts.MNT_DETACH | mounts.UMOUNT_NOFOLLOW)
        os.rmdir(place)
        yield shown


def unmount(directory: str) -> None:
    """Unmount what is mounted of a snapshot's root in its directory (blocking).

    Raises:
        FailedPreconditionError: The kernel refused.
    """
    for name in (_ROOT, _VIEW):
        mounts.unmount(os.path.join(directory, name), mounts.MNT_DETACH | mounts.UMOUNT_NOFOLLOW)
