"""What a snapshot is: containerd's snapshots model (package core/snapshots), as values."""

import dataclasses
import enum
import re
from collections.abc import Mapping, Sequence

from nixlet import errors

#: Labels of one snapshot may take this many bytes, keys and values together; gRPC's limit is 16 MiB a message.
MAX_LABEL_BYTES = 4 << 20

#: The label by which an unpacker names the chain ID that a layer's snapshot will be committed as.
SNAPSHOT_REF_LABEL = "containerd.io/snapshot.ref"

#: How an unpacker's keys begin, behind the "<namespace>/<number>/" that containerd's metadata store puts in front.
UNPACK_KEY_PREFIX = "extract-"

#: The end of the key of a pod's volume: the directory for those, the sandbox's ID, the digest of the image's manifest.
_VOLUME = re.compile(r"/image-volumes/[0-9a-f]{64}/[0-9a-f]{64}$")


class Kind(enum.IntEnum):
    """The kinds of snapshots, numbered as on the wire."""

    VIEW = 1
    ACTIVE = 2
    COMMITTED = 3


class Strategy(enum.StrEnum):
    """How a container gets to see the closures of its layers; in the order in which they are preferred."""

    VIEW = "view"
    BIND = "bind"


class Overlay(enum.StrEnum):
    """Who makes the overlay that is a container's root, as the type of its mount.

    The second is containerd's way of saying that mount.fuse3(8) starts fuse-overlayfs(1).
    """

    KERNEL = "overlay"
    FUSE_OVERLAYFS = "fuse3.fuse-overlayfs"


@dataclasses.dataclass(frozen=True, slots=True)
class Info:
    """A snapshot as clients see it.

    Attributes:
        name: Its key (active, view) or name (committed).
        parent: The name of the committed snapshot below it, or an empty string.
        kind: Which of the three it is.
        created: Nanoseconds since the epoch.
        updated: Nanoseconds since the epoch.
        labels: What clients attached to it.
    """

    name: str
    parent: str
    kind: Kind
    created: int
    updated: int
    labels: Mapping[str, str]


@dataclasses.dataclass(frozen=True, slots=True)
class Mount:
    """One mount that a client has to make, in order, to see a snapshot: type, source, and options as mount(8) takes them.

    The target is a path below the snapshot's root; empty for the root itself.
    """

    type: str
    source: str
    options: tuple[str, ...]
    target: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """What a snapshot takes of the disk, without its parents: bytes in blocks, and inodes, each inode once."""

    size: int
    inodes: int


def is_unpack(key: str, labels: Mapping[str, str]) -> bool:
    """Whether a snapshot is a layer that is being unpacked, the only kind whose labels may name store paths.

    containerd also copies a pod's own annotations into the labels of its containers' snapshots, but those have the
    container's ID as their key and no chain ID to be committed as.
    """
    return key.rsplit("/", 1)[-1].startswith(UNPACK_KEY_PREFIX) and bool(labels.get(SNAPSHOT_REF_LABEL))


def is_volume(key: str) -> bool:
    """Whether a snapshot is to be a volume of a pod: containerd's key is then the place where it mounts it."""
    return _VOLUME.search(key) is not None


def check_key(key: str) -> None:
    """Check a snapshot's key or name.

    Raises:
        InvalidArgumentError: It is empty.
    """
    if not key:
        raise errors.InvalidArgumentError("a snapshot's key or name can't be empty")


def check_labels(labels: Mapping[str, str]) -> None:
    """Check the labels of one snapshot.

    Raises:
        InvalidArgumentError: They are too large.
    """
    size = sum(len(key) + len(value) for key, value in labels.items())
    if size > MAX_LABEL_BYTES:
        raise errors.InvalidArgumentError(f"the snapshot's labels take {size} bytes, more than {MAX_LABEL_BYTES}")


def updated_labels(
    current: Mapping[str, str], labels: Mapping[str, str], fields: Sequence[str] | None
) -> dict[str, str]:
    """The labels after an update of the fields named ("labels", "labels.KEY"); of all without fields.

    Raises:
        InvalidArgumentError: A field can't be changed.
    """
    if not fields:
        return dict(labels)
    new = dict(current)
    for field in fields:
        if field == "labels":
            new = dict(labels)
        elif field.startswith("labels."):
            key = field.removeprefix("labels.")
            if labels.get(key):
                new[key] = labels[key]
            else:
                new.pop(key, None)
        else:
            raise errors.InvalidArgumentError(f"the field {field} of a snapshot can't be changed")
    return new
