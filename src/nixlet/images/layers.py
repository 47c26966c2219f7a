"""A Nix image's layer: mount points for the store paths, and links from the root into the store.

The tar file holds no content of the store, only the places where the snapshotter shows it: an empty directory for each store path
that is a directory, an empty file for every other, and for each file below a ``copyToRoot`` path a link at the same place below /.
Equal inputs give equal bytes: names are sorted, owners and times are zero.
"""

import dataclasses
import hashlib
import io
import os
import tarfile
import zlib
from collections.abc import Sequence
from typing import Literal

from nixlet import errors
from nixlet.store.paths import StorePath

#: zlib's default; a fixed value, since the level is part of the bytes.
_LEVEL = 6

#: RFC 1952: magic, deflate, no flags, no time, no extra flags, unknown system.
_GZIP_HEADER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"

#: Links to directories are looked into only where trees overlap; more than this, one below another, go round in a circle. The
#: kernel follows 40, but gives up after half of them when it has to begin anew.
_MAX_LINKS = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """What the layer has at a place: a directory, an empty file, or a link to ``target``."""

    kind: Literal["directory", "file", "link"]
    target: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class LayerBlob:
    """A layer, gzip'ed, and the digest of what it is when unpacked."""

    content: bytes
    diff_id: str


def plan(closure: Sequence[StorePath], copy_to_root: Sequence[StorePath]) -> dict[str, Entry]:
    """What the layer holds, by path relative to /, sorted as the tar file has it.

    Raises:
        NotFoundError: A store path does not exist.
        InvalidArgumentError: A ``copyToRoot`` path is no directory, or two of them have different things at one place.
    """
    for path in (*closure, *copy_to_root):
        if not os.path.lexists(path):
            raise errors.NotFoundError(
                f"{path} does not exist", hint="build it first; the closure must list the outputs of finished builds"
            )
    for path in copy_to_root:
        if not os.path.isdir(path):
            raise errors.InvalidArgumentError(
                f"{path} can't be copied to the image's root: it is no directory",
                hint="copyToRoot takes packages, or directories such as buildEnv makes",
            )
    entries: dict[str, Entry] = {}
    _merge("", list(dict.fromkeys(copy_to_root)), entries)
    for path in closure:
        # isdir follows links: a bind mount onto the path would follow them, too.
        _add_mount_point(path, Entry("directory" if os.path.isdir(path) else "file"), entries)
    # The order of a walk through the tree: a directory's content directly behind it.
    return dict(sorted(entries.items(), key=lambda item: item[0].split("/")))


def _merge(place: str, sources: Sequence[str], entries: dict[str, Entry], links: int = 0) -> None:
    """Join directories that belong at one place, which so many links lead to."""
    children: dict[str, list[str]] = {}
    for source in sources:
        for name in os.listdir(source):
            children.setdefault(name, []).append(f"{source}/{name}")
    for name, found in children.items():
        below = f"{place}/{name}" if place else name
        directories = [path for path in found if os.path.isdir(path)]
        if len(found) == 1:
            mergeable = not os.path.islink(found[0]) and bool(directories)
        else:
            mergeable = len(directories) == len(found) and links < _MAX_LINKS
        if mergeable:
            entries[below] = Entry("directory")
            _merge(below, found, entries, links + any(map(os.path.islink, found)))
        elif len({os.path.realpath(path) for path in found}) == 1:
            entries[below] = Entry("link", found[0])
        else:
            raise errors.InvalidArgumentError(
                f"{found[0]} and {found[1]} can't both be /{below}",
                hint="leave one of them out of copyToRoot, or join them with buildEnv, which can choose",
            )


def _add_mount_point(path: str, entry: Entry, entries: dict[str, Entry]) -> None:
    parts = path.strip("/").split("/")
    for length in range(1, len(parts)):
        _claim("/".join(parts[:length]), Entry("directory"), path, entries)
    _claim("/".join(parts), entry, path, entries)


def _claim(place: str, entry: Entry, path: str, entries: dict[str, Entry]) -> None:
    known = entries.setdefault(place, entry)
    if known.kind != entry.kind:
        raise errors.InvalidArgumentError(
            f"{known.target or 'copyToRoot'} can't be /{place}: the store path {path} needs that place",
            hint="leave it out of copyToRoot",
        )


def render(entries: dict[str, Entry]) -> LayerBlob:
    """The layer's tar file, gzip'ed."""
    sink = _GzipSink()
    with tarfile.open(fileobj=sink, mode="w|", format=tarfile.PAX_FORMAT, bufsize=tarfile.RECORDSIZE) as tar:
        for name, entry in entries.items():
            info = tarfile.TarInfo(name)
            if entry.kind == "directory":
                info.type, info.mode = tarfile.DIRTYPE, 0o755
            elif entry.kind == "link":
                info.type, info.mode, info.linkname = tarfile.SYMTYPE, 0o777, entry.target
            else:
                info.mode = 0o555
            tar.addfile(info)
    return sink.finish()


class _GzipSink(io.RawIOBase):
    """Compresses what is written to it, and computes the digest of it."""

    def __init__(self) -> None:
        super().__init__()
        self._deflate = zlib.compressobj(_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
        self._pieces = [_GZIP_HEADER]
        self._digest = hashlib.sha256()
        self._crc = 0
        self._length = 0

    def write(self, data: bytes) -> int:  # type: ignore[override]  # tarfile writes bytes
        self._digest.update(data)
        self._crc = zlib.crc32(data, self._crc)
        self._length += len(data)
        self._pieces.append(self._deflate.compress(data))
        return len(data)

    def finish(self) -> LayerBlob:
        trailer = self._crc.to_bytes(4, "little") + (self._length % 2**32).to_bytes(4, "little")
        content = b"".join((*self._pieces, self._deflate.flush(), trailer))
        return LayerBlob(content, f"sha256:{self._digest.hexdigest()}")
