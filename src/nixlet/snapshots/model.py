"""What a snapshot is: containerd's snapshots model (package core/snapshots), as values."""

import dataclasses
import enum
from collections.abc import Mapping

#: Labels of one snapshot may take this many bytes, keys and values together; gRPC's limit is 16 MiB a message.
MAX_LABEL_BYTES = 4 << 20

#: The label by which an unpacker names the chain ID that a layer's snapshot will be committed as.
SNAPSHOT_REF_LABEL = "containerd.io/snapshot.ref"

#: How an unpacker's keys begin, behind the "<namespace>/<number>/" that containerd's metadata store puts in front.
UNPACK_KEY_PREFIX = "extract-"

#: Labels by which containerd asks for a root whose owners are mapped (pods in user namespaces).
ID_MAPPING_LABELS = ("containerd.io/snapshot/uidmapping", "containerd.io/snapshot/gidmapping")


class Kind(enum.IntEnum):
    """The kinds of snapshots, numbered as on the wire."""

    VIEW = 1
    ACTIVE = 2
    COMMITTED = 3


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
    """One mount that a client has to make, in order, to see a snapshot: type, source, and options as mount(8) takes them."""

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
