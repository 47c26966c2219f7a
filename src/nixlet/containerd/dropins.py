"""Drop-ins: the user's TOML files, merged into containerd's configuration.

k3s lets containerd read them (``imports``), whose merging differs from version to version, and which takes whatever they say. Here
they are merged before containerd sees them: tables key by key, all else is replaced. What would make a node that can't work or that
meets the system's containerd is refused, whether a drop-in says it or a template.
"""

import copy
import dataclasses
import datetime
from collections.abc import Iterator, Sequence

from nixlet import errors
from nixlet.containerd import misplaced, tomlread
from nixlet.containerd.config import Table

Path = tuple[str, ...]

_KINDS: Sequence[tuple[type | tuple[type, ...], str]] = (
    (dict, "a table"),
    (list, "a list"),
    (str, "a string"),
    (bool, "true or false"),
    ((int, float), "a number"),
    ((datetime.date, datetime.time), "a time"),
)


#: The plugins that have places in the file system, or sockets: without them containerd would be at the system's.
_PLACES = ("io.containerd.internal.v1.opt", "io.containerd.nri.v1.nri", "io.containerd.server.v1.")


@dataclasses.dataclass(frozen=True, slots=True)
class DropIn:
    """A drop-in, or what a template makes: where it stands, and its tables."""

    path: str
    table: Table


def merged(base: Table, files: Sequence[DropIn]) -> Table:
    """The base with drop-ins merged into it.

    Args:
        base: What they are merged into; it stays as it is.
        files: The drop-ins in their order. None may undo what another one says.

    Raises:
        UsageError: Two of them contradict each other, or one can't be merged; the sentence names file and key.
    """
    result, owners = copy.deepcopy(base), dict[Path, str]()
    for file in files:
        _check(file.table, base, file.path)
        _merge(file, file.table, result, (), owners)
    return result


def merged_template(base: Table, template: DropIn, *, has_base: bool, own_import: str = "") -> Table:
    """What a template makes of the base, with what it has left out of that which is the node's.

    Args:
        base: What the node has rendered by itself.
        template: The template's result, without the base.
        has_base: Whether the base stands in it: then what is around it is merged into the base.
        own_import: The pattern of our own drop-ins, which k3s's templates import; they are merged anyway.

    Raises:
        UsageError: It takes from the node what is the node's.
    """
    table = {key: value for key, value in template.table.items() if (key, value) != ("imports", [own_import])}
    if has_base:
        return merged(base, [DropIn(template.path, table)])
    if "version" not in table:
        raise errors.UsageError(
            f"{template.path}: it makes no version = {base['version']}",
            hint='write it at the top, above all tables; or write {{ template "base" . }} there, which has it',
        )
    _check(table, base, template.path)
    return merged(_places(base), [DropIn(template.path, table)])


def _places(base: Table) -> Table:
    """What a node needs of its own configuration to be at its own places."""
    names = ("version", "root", "state", "grpc", "ttrpc", "proxy_plugins")
    kept: Table = copy.deepcopy({key: base[key] for key in names if key in base})
    plugins = copy.deepcopy({key: value for key, value in base["plugins"].items() if key.startswith(_PLACES)})
    runtime = "io.containerd.cri.v1.runtime"
    cri: Path = ("plugins", runtime if runtime in base["plugins"] else "io.containerd.grpc.v1.cri")
    # runc's state and the network namespaces would be where the system's containerd has its own.
    runc = [(*cri, "netns_mounts_under_state_dir"), (*cri, "containerd", "runtimes", "runc")]
    for path in (*(path for path, _ in _pinned(base) if path[0] == "plugins"), *runc):
        value = tomlread.at(base, path)
        if value is not None:
            plugin = plugins.setdefault(path[1], {})
            for key in path[2:-1]:
                plugin = plugin.setdefault(key, {})
            plugin[path[-1]] = copy.deepcopy(value)
    return {**kept, "plugins": plugins}


def _check(table: Table, base: Table, where: str) -> None:
    """Check that what stands in a file leaves the node what is the node's."""
    version = base["version"]
    if table.get("version", version) != version:
        raise errors.UsageError(
            f"{where}: it says version {table['version']}, but is part of a configuration of version {version}",
            hint="the names say the version: config-v4.toml.d, config-v3.toml.d, and config.toml.d for version 2",
        )
    misplaced.check(table, version, where)
    for path, hint in _pinned(base):
        said = tomlread.at(table, path)
        if said is not None and said != tomlread.at(base, path):
            raise errors.UsageError(f"{where}: {tomlread.name(path)} can't be set: the node sets it", hint=hint)
    if table.get("imports"):
        raise errors.UsageError(
            f"{where}: imports can't be set: containerd would take up files that nixlet has not seen",
            hint="put the files into the directory of drop-ins",
        )


def _pinned(base: Table) -> Iterator[tuple[Path, str]]:
    """What the node decides by itself, and how it is told to decide otherwise."""
    yield ("root",), "--data-dir says where a node keeps things"
    yield ("state",), "--state-dir says where a node's sockets and running state are"
    plugins = base["plugins"]
    sockets = "--state-dir says where a node's sockets are; at the system's paths is the system's containerd"
    for name in ("grpc", "ttrpc"):
        path: Path = (name,) if name in base else ("plugins", f"io.containerd.server.v1.{name}")
        if tomlread.at(base, path) is not None:
            yield (*path, "address"), sockets
    images = "io.containerd.cri.v1.images"
    at: Path = (images,) if images in plugins else ("io.containerd.grpc.v1.cri", "containerd")
    yield ("plugins", *at, "snapshotter"), "--snapshotter says which snapshotter a node has"
    for name in base.get("proxy_plugins", {}):
        for key in ("type", "address"):
            yield ("proxy_plugins", name, key), sockets


def _merge(file: DropIn, table: Table, into: Table, above: Path, owners: dict[Path, str]) -> None:
    for key, value in table.items():
        path = (*above, key)
        before, owner = into.get(key), owners.get(path)
        if before is not None and _kind(before) != _kind(value):
            whose = f" in {owner}" if owner else ""
            raise errors.UsageError(
                f"{file.path}: {tomlread.name(path)} is {_kind(value)} here, and {_kind(before)}{whose or ' otherwise'}"
            )
        if isinstance(value, dict):
            owners.setdefault(path, file.path)
            _merge(file, value, into.setdefault(key, {}), path, owners)
            continue
        if owner is not None and before != value:
            raise errors.UsageError(
                f"{owner} and {file.path} say different things of {tomlread.name(path)}",
                hint="leave it to one of the two: drop-ins don't override each other",
            )
        into[key], owners[path] = copy.deepcopy(value), file.path


def _kind(value: object) -> str:
    return next(name for types, name in _KINDS if isinstance(value, types))
