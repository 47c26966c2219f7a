"""Layers that containerd knows and its snapshotter has lost, with a disk of its own for example: they are in their own way.

containerd answers that such a snapshot exists when it is to be made, and that there is none when it is asked for. Removing its record
helps, but containerd refuses that as long as it knows of something that stands upon it.
"""

import contextlib

from nixlet import errors
from nixlet.containerd import imagestore
from nixlet.images import model, targets


async def forget(containerd: imagestore.ImageStore, snapshotter: str, name: str) -> None:
    """Have containerd forget a layer that is lost, and before that what stands upon it and is lost as well.

    Args:
        containerd: The containerd.
        snapshotter: What it calls the snapshotter.
        name: The layer's chain ID.

    Raises:
        FailedPreconditionError: Something that stands upon it is not lost, or belongs to no image and no container.
    """
    keys = dict.fromkeys([name, *await _chains(containerd)])
    keys |= dict.fromkeys(
        each.snapshot_key for each in await containerd.containers({}) if each.snapshotter == snapshotter
    )
    lost = [key for key in keys if await containerd.snapshot(snapshotter, key) is None]
    count = -1
    while name in lost and len(lost) != count:
        count, left = len(lost), list[str]()
        for key in lost:
            try:
                await containerd.remove_snapshot(snapshotter, key)
            except errors.FailedPreconditionError:
                # What stands upon it comes first.
                left.append(key)
        lost = left
    if name in lost:
        raise errors.FailedPreconditionError(
            f"containerd knows the layer {name}, which the snapshotter {snapshotter} has lost, and something upon it",
            hint="remove what has that layer; or stop containerd, and move its root directory away as well",
        )


async def _chains(containerd: imagestore.ImageStore) -> set[str]:
    """The names of all images' layers, as far as the images can be read."""
    found: set[str] = set()
    for digest in {record.target.digest for record in await containerd.images()}:
        for manifest in await targets.manifests_of(containerd, digest):
            with contextlib.suppress(errors.NixletError):
                found.update(model.chain_ids((await targets.read_config(containerd, manifest)).rootfs.diff_ids))
    return found
