"""What a node writes down about itself when it starts: whoever takes it away acts by that, and not by what somebody says.

``DATA_DIR/nixlet.json`` and ``STATE_DIR/nixlet.json`` mark the two directories as a node's own. Each names the other, so that neither
k3s's directories nor a copy of a node's can be taken for a node, and says all that a node of this data directory ever used.
"""

import contextlib
import dataclasses
import os
from typing import Any, Literal

import msgspec

from nixlet import errors
from nixlet.encoding import unreadable
from nixlet.host import files
from nixlet.node.settings import config as node_config

_FILE = "nixlet.json"

#: How the directories begin that containerd's plugins make, in its data as in its running state.
_PLUGIN = "io.containerd."

_ELSEWHERE = "choose another directory: {flag}"


class Marker(msgspec.Struct, frozen=True, kw_only=True):
    """A node, or a snapshotter that stands alone, by what it has on the machine.

    Attributes:
        data_dir: Its data directory, or the snapshotter's root.
        kind: Which of the two.
        state_dirs: The state directories that it had, the last one last; likewise the next ones.
        bridges: The bridges that its pods were attached to.
        logs: The files that its log went to.
        gc_roots: The directories of its GC roots.
        sockets: Where a snapshotter served that stands alone.
        settings: Those of its last start.
    """

    data_dir: str
    kind: Literal["node", "snapshotter"] = "node"
    state_dirs: tuple[str, ...] = ()
    bridges: tuple[str, ...] = ()
    logs: tuple[str, ...] = ()
    gc_roots: tuple[str, ...] = ()
    sockets: tuple[str, ...] = ()
    settings: dict[str, Any] = msgspec.field(default_factory=dict)

    def last_settings(self) -> node_config.Settings:
        """The settings of its last start."""
        return msgspec.convert(self.settings, node_config.Settings)


def path(directory: str) -> str:
    """Where a node's directory is marked."""
    return os.path.join(directory, _FILE)


def read(directory: str) -> Marker | None:
    """What marks a directory, or None where nothing does.

    Raises:
        FailedPreconditionError: It can't be read.
    """
    try:
        with open(path(directory), "rb") as file:
            return msgspec.json.decode(file.read(), type=Marker)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise files.refused(f"{path(directory)} can't be read", error) from error
    except unreadable.JSON as error:
        raise errors.FailedPreconditionError(
            f"{path(directory)} doesn't say what node this is: {error}",
            hint="start the node once more: it writes the file anew",
        ) from error


def check(layout: node_config.Layout) -> None:
    """Check, before a node makes anything, that its directories are nobody else's.

    Raises:
        FailedPreconditionError: Another containerd's files are in one of them, or it is another node's.
    """
    # A node of an earlier version had only its lock.
    known = _read_leniently(layout.data_dir) or (Marker(data_dir="") if os.path.exists(layout.lock) else None)
    if known is None and _has_plugins(layout.containerd_root):
        raise errors.FailedPreconditionError(
            f"{layout.containerd_root} holds the data of a containerd that is not a node's of nixlet",
            hint=_ELSEWHERE.format(flag="--data-dir"),
        )
    if known is not None and known.kind != "node":
        raise errors.FailedPreconditionError(
            f"{layout.data_dir} is the root of a snapshotter that stands alone",
            hint=_ELSEWHERE.format(flag="--data-dir"),
        )
    state = _read_leniently(layout.state_dir)
    ours = state is not None and _same(state.data_dir, layout.data_dir)
    if state is not None and not ours and not _same(state.data_dir, layout.state_dir) and _is_there(state.data_dir):
        raise errors.FailedPreconditionError(
            f"{layout.state_dir} is the state directory of the node at {state.data_dir}",
            hint=_ELSEWHERE.format(flag="--state-dir"),
        )
    # Of an earlier version, or moved together with its data.
    ours |= known is not None and (not known.state_dirs or layout.state_dir in known.state_dirs)
    if not ours and _has_plugins(layout.containerd_state):
        raise errors.FailedPreconditionError(
            f"{layout.containerd_state} holds the running state of another containerd",
            hint=_ELSEWHERE.format(flag="--state-dir"),
        )


def write(
    settings: node_config.Settings, layout: node_config.Layout, gc_roots: str = "", *, bridge_is_there: bool = False
) -> Marker:
    """Mark both directories; they are there, locked, and ours. Gives what is written.

    Args:
        settings: The node's.
        layout: Where it is.
        gc_roots: The directory of its GC roots; empty: it has none.
        bridge_is_there: Whether there is a bridge of the name already: it is ours only if we have known it before.

    Raises:
        FailedPreconditionError: The files can't be written.
    """
    before = _inherited(layout.data_dir)
    # Somebody else's containerd has its own network.
    foreign = settings.container_runtime_endpoint or (bridge_is_there and settings.bridge not in before.bridges)
    marker = Marker(
        data_dir=layout.data_dir,
        state_dirs=_with(before.state_dirs, layout.state_dir),
        bridges=_with(before.bridges, "" if foreign else settings.bridge),
        logs=_with(before.logs, settings.log and os.path.abspath(settings.log)),
        gc_roots=_with(before.gc_roots, gc_roots),
        # Secrets have files of their own.
        settings={**dataclasses.asdict(settings), **dict.fromkeys(node_config.SECRET, "")},
    )
    for directory in (layout.data_dir, layout.state_dir):
        _write(directory, marker)
    return marker


def check_snapshotter(root: str) -> None:
    """Check, before a snapshotter makes anything that stands alone, that its root is nobody else's.

    Raises:
        FailedPreconditionError: It is a node's, or something else is in it.
    """
    above = root
    while above != os.path.dirname(above):
        known = _read_leniently(above)
        if known is not None and known.kind == "node":
            raise errors.FailedPreconditionError(
                f"{root} lies in the directory {above} of a node", hint=_ELSEWHERE.format(flag="--root")
            )
        above = os.path.dirname(above)
    # One of an earlier version had only its lock.
    if _read_leniently(root) is not None or os.path.exists(os.path.join(root, "lock")):
        return
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        others = sorted(set(os.listdir(root)) - {"lost+found"})
        if others:
            raise errors.FailedPreconditionError(
                f"{root} is no snapshotter's directory: {others[0]} is in it",
                hint="choose a directory that is empty or not there yet: --root",
            )


def write_snapshotter(root: str, socket: str, gc_roots: str) -> None:
    """Mark the root of a snapshotter that stands alone.

    Raises:
        FailedPreconditionError: The file can't be written.
    """
    before = _inherited(root)
    _write(
        root,
        Marker(
            data_dir=root,
            kind="snapshotter",
            gc_roots=_with(before.gc_roots, gc_roots),
            sockets=_with(before.sockets, socket),
        ),
    )


def _write(directory: str, marker: Marker) -> None:
    text = msgspec.json.format(msgspec.json.encode(marker)) + b"\n"
    # A disk that is full is no trouble where nothing is new.
    with contextlib.suppress(OSError), open(path(directory), "rb") as file:
        if file.read() == text:
            return
    files.write_atomically(path(directory), text, mode=0o600)


def _read_leniently(directory: str) -> Marker | None:
    # A start writes it anew: one that is damaged is still a node's.
    try:
        return read(directory)
    except errors.FailedPreconditionError:
        return Marker(data_dir=directory)


def _inherited(directory: str) -> Marker:
    """What is known of a directory from before. What a copy says of the original's is not its own."""
    before = _read_leniently(directory)
    if before is None or (not _same(before.data_dir, directory) and _is_there(before.data_dir)):
        return Marker(data_dir=directory)
    return before


def _is_there(data_dir: str) -> bool:
    """Whether a directory is what it was when its marker was written, neither moved nor taken away since then."""
    known = _read_leniently(data_dir) if data_dir else None
    return known is not None and _same(known.data_dir, data_dir)


def is_of(directory: str, data_dir: str) -> bool:
    """Whether a directory is marked as one of the node with that data directory."""
    marker = read(directory)
    return marker is not None and _same(marker.data_dir, data_dir)


def _same(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _with(known: tuple[str, ...], one: str) -> tuple[str, ...]:
    return (*(each for each in known if each != one), one) if one else known


def _has_plugins(directory: str) -> bool:
    try:
        return any(name.startswith(_PLUGIN) for name in os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return False
