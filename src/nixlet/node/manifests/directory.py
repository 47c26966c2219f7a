"""Which files of a directory are manifests to apply, and how each is known: by k3s's rules.

Manifests end in .yaml, .yml or .json and may lie in subdirectories. ``NAME.yaml.skip`` has ``NAME.yaml`` left alone, wherever the
two are. Disabled is what is called so without its ending, and all that is in a directory of that name.
"""

import hashlib
import os
import re
import stat
from collections.abc import Collection, Iterator
from typing import NamedTuple

_ENDINGS = (".yaml", ".yml", ".json")
_SKIP = ".skip"

#: A label's value can be this long, and is made of these (Kubernetes, "Labels and Selectors"); it becomes part of an object's name, too.
_MAX_LABEL = 63
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
_FOREIGN = re.compile(r"[^a-z0-9]+")

#: How many characters tell names apart that can't be labels as they are.
_HASH = 10


class State(NamedTuple):
    """What tells one state of a file from another.

    All files in a Nix store are as old as each other, and a link to one may come to lead to another: then the inode differs.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


class Scan(NamedTuple):
    """What is in a directory.

    Attributes:
        wanted: The manifests to apply, by their names: their paths below the directory.
        disabled: Those that are disabled.
        skipped: Those that are to be left alone.
    """

    wanted: dict[str, State]
    disabled: frozenset[str]
    skipped: frozenset[str]


def scan(directory: str, disabled: Collection[str]) -> Scan:
    """Look what is there; a directory that isn't there has nothing.

    Args:
        directory: The directory.
        disabled: The names that are disabled.

    Raises:
        OSError: It can't be looked at.
    """
    found = dict(_walk(directory, "", through_links=True))
    skips = {os.path.basename(name).removesuffix(_SKIP) for name in found if name.endswith(_SKIP)}
    manifests = sorted(name for name in found if _is_manifest(os.path.basename(name)))
    off = frozenset(name for name in manifests if is_disabled(name, disabled))
    skipped = frozenset(name for name in manifests if os.path.basename(name) in skips) - off
    return Scan({name: found[name] for name in manifests if name not in off | skipped}, off, skipped)


def state_of(status: os.stat_result) -> State:
    """A file's state, as the system tells it."""
    return State(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def is_disabled(name: str, disabled: Collection[str]) -> bool:
    """Whether a manifest is disabled: it by itself, or a directory that it is in."""
    parts = name.split("/")
    above = {"/".join(parts[:depth]) for depth in range(1, len(parts))}
    return os.path.splitext(parts[-1])[0] in disabled or not above.isdisjoint(disabled)


def label(name: str) -> str:
    """What objects are labelled with that a manifest made: its name as far as that can be a label, and no other one's."""
    if len(name) <= _MAX_LABEL and _LABEL.fullmatch(name):
        return name
    told = _FOREIGN.sub("-", name.lower()).strip("-")[: _MAX_LABEL - _HASH - 1].rstrip("-")
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:_HASH]
    return f"{told}-{digest}" if told else digest


def _is_manifest(base_name: str) -> bool:
    return base_name.lower().endswith(_ENDINGS) and not base_name.startswith(".")


def _walk(directory: str, below: str, *, through_links: bool) -> Iterator[tuple[str, State]]:
    """Files and what they are, by their paths below the directory; of directories that are links the outermost are followed."""
    try:
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except FileNotFoundError:
        return
    for entry in entries:
        name = f"{below}{entry.name}"
        try:
            status = os.stat(entry.path)
        except OSError:
            # Gone meanwhile, or a link that leads nowhere.
            continue
        if stat.S_ISDIR(status.st_mode):
            if not entry.is_symlink():
                yield from _walk(entry.path, f"{name}/", through_links=through_links)
            elif through_links:
                yield from _walk(entry.path, f"{name}/", through_links=False)
        else:
            yield name, state_of(status)
