"""Bind mounts of store paths, for the strategy of that name: which a container gets, and onto what.

Only directories are bound. Files and links are in the skeleton itself, since not every containerd can bind a file to a file.
"""

import errno
import os
import stat
from collections.abc import Iterable
from typing import NamedTuple

from nixlet.snapshots import model

#: By what overlayfs marks a directory that hides all that lies below it in lower layers; the second in user namespaces, the third by
#: fuse-overlayfs.
_OPAQUE = ("trusted.overlay.opaque", "user.overlay.opaque", "user.fuseoverlayfs.opaque")

#: What fuse-overlayfs makes where it can't make the kernel's marks: a file for each name that is hidden, and one for all of them.
_WHITEOUT = ".wh."
_OPAQUE_WHITEOUT = ".wh..wh..opq"


class Lower(NamedTuple):
    """One lower layer of an overlay: its directory, and whether that is the skeleton of a closure."""

    directory: str
    skeleton: bool


def binds(layers: Iterable[Lower], *, store_dir: str, real_store_dir: str) -> list[model.Mount]:
    """The bind mounts over an overlay; what a layer hides of those below it is not bound. Blocks.

    An ordinary layer's edits inside the directory of a store path are covered by its bind mount.

    Args:
        layers: The overlay's layers, top first.
        store_dir: The store as containers see it.
        real_store_dir: The directory with its files.
    """
    hidden: set[str] = set()
    bound: set[str] = set()
    for layer in layers:
        entries = _entries(layer.directory, store_dir)
        if entries is None:
            break
        if layer.skeleton:
            bound |= {name for name, mode in entries.items() if stat.S_ISDIR(mode)} - hidden
        hidden |= {name.removeprefix(_WHITEOUT) for name, mode in entries.items() if not stat.S_ISDIR(mode)}
        if _is_opaque(layer.directory, store_dir):
            break
    return [
        model.Mount("bind", os.path.join(real_store_dir, name), ("ro", "rbind"), os.path.join(store_dir, name))
        for name in sorted(bound)
    ]


def _steps(layer: str, store_dir: str) -> Iterable[str]:
    """The directories on the way to a layer's store directory, itself the last."""
    path = layer
    for part in store_dir.strip("/").split("/"):
        path = os.path.join(path, part)
        yield path


def _entries(layer: str, store_dir: str) -> dict[str, int] | None:
    """What a layer has in the store's directory, with modes; None if it hides that directory of the layers below."""
    for path in _steps(layer, store_dir):
        # The layer's content is foreign: a link in it would lead this look astray, on the host.
        try:
            mode = os.lstat(path).st_mode
        except FileNotFoundError:
            return {}
        if not stat.S_ISDIR(mode):
            return None
    with os.scandir(path) as entries:
        return {entry.name: entry.stat(follow_symlinks=False).st_mode for entry in entries}


def _is_opaque(layer: str, store_dir: str) -> bool:
    for path in _steps(layer, store_dir):
        if os.path.lexists(os.path.join(path, _OPAQUE_WHITEOUT)):
            return True
        for attribute in _OPAQUE:
            try:
                if os.getxattr(path, attribute, follow_symlinks=False) == b"y":
                    return True
            except OSError as error:
                if error.errno == errno.ENOENT:
                    return False
    return False
