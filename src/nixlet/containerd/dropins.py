"""Drop-ins: the user's TOML files, merged into containerd's configuration.

k3s lets containerd read them (``imports``), whose merging differs from version to version, and which takes whatever they say. Here
they are merged before containerd sees them: tables key by key, all else is replaced. What would make a node that can't work or that
meets the system's containerd is refused, whether a drop-in says it or a template.
"""

import copy
import dataclasses
import datetime
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from nixlet import errors
from nixlet.containerd import criplugins, misplaced, tomlread
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


#: Keys of containerd's that the base has not, by the end of the table's name.
_FURTHER: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        "": ("debug", "grpc", "imports", "metrics", "proxy_plugins", "ttrpc"),
        "registry": ("auths", "config_path", "configs", "headers", "mirrors"),
    }
)

#: Tables whose keys are names that people choose.
_OF_NAMES = frozenset({"auths", "configs", "exports", "headers", "mirrors", "proxy_plugins", "runtimes"})

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
    return _merged(base, base, files)


def _merged(base: Table, into: Table, files: Sequence[DropIn]) -> Table:
    result, owners = copy.deepcopy(into), dict[Path, str]()
    for file in files:
        _check(file.table, base, file.path)
        _merge(file, file.table, result, (), owners)
    for file in files:
        _check_registries(file, result)
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
    return _merged(base, _places(base, table), [DropIn(template.path, table)])


def registry_plugin(table: Table) -> Path:
    """The plugin with what is said of registries, in a configuration's version."""
    return criplugins.place(table["version"], "images")


def _places(base: Table, template: Table) -> Table:
    """What a node needs of its own configuration to be at its own places, and able to start containers."""
    names = ("version", "root", "state", "grpc", "ttrpc", "proxy_plugins")
    kept: Table = copy.deepcopy({key: base[key] for key in names if key in base})
    plugins = copy.deepcopy({key: value for key, value in base["plugins"].items() if key.startswith(_PLACES)})
    runtime = "io.containerd.cri.v1.runtime"
    cri: Path = ("plugins", runtime if runtime in base["plugins"] else "io.containerd.grpc.v1.cri")
    # runc's state and the network namespaces would be where the system's containerd has its own.
    runc = [(*cri, "netns_mounts_under_state_dir"), (*cri, "containerd", "runtimes", "runc")]
    others = [(*cri, "restrict_oom_score_adj")] if tomlread.at(base, (*cri, "restrict_oom_score_adj")) else []
    registry: Path = (*registry_plugin(base), "registry")
    if not any(_of_old(tomlread.at(template, registry), registry)):
        others.append((*registry, "config_path"))
    for path in (*(path for path, _ in _pinned(base) if path[0] == "plugins"), *runc, *others):
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
    _check_letters(table, base, where)
    misplaced.check(table, version, where)
    _check_runtimes(table, version, where)
    for path, hint in _pinned(base):
        said = tomlread.at(table, path)
        if said is not None and said != tomlread.at(base, path):
            raise errors.UsageError(f"{where}: {tomlread.name(path)} can't be set: the node sets it", hint=hint)
    if table.get("imports"):
        raise errors.UsageError(
            f"{where}: imports can't be set: containerd would take up files that nixlet has not seen",
            hint="put the files into the directory of drop-ins",
        )


def _check_letters(table: Table, base: Table, where: str, above: Path = ()) -> None:
    """Check that no key differs from one of the base by capital letters alone: containerd takes the one for the other."""
    end = above[-1] if above else ""
    names = {} if end in _OF_NAMES else {name.casefold(): name for name in (*base, *_FURTHER.get(end, ()))}
    for key, value in table.items():
        right = names.get(key.casefold(), key)
        if right != key:
            raise errors.UsageError(
                f"{where}: {tomlread.name((*above, key))} is written with other letters than containerd's own key",
                hint=f"it is {tomlread.name((*above, right))}",
            )
        if isinstance(value, dict):
            before = base.get(key)
            _check_letters(value, before if isinstance(before, dict) else {}, where, (*above, key))


def _check_runtimes(table: Table, version: int, where: str) -> None:
    """Check that runtimes that the base hasn't are tables, and their options."""
    path: Path = criplugins.place(version, "runtime", "containerd", "runtimes")
    there = tomlread.at(table, path)
    for name, said in there.items() if isinstance(there, dict) else ():
        for key, value in ((name,), said), ((name, "options"), said.get("options") if isinstance(said, dict) else None):
            if value is not None and not isinstance(value, dict):
                raise errors.UsageError(
                    f"{where}: {tomlread.name((*path, *key))} is {_kind(value)}, and has to be a table"
                )


def _check_registries(file: DropIn, result: Table) -> None:
    """Check that registries are said in one way: containerd doesn't start with both."""
    registry: Path = (*registry_plugin(result), "registry")
    if not tomlread.at(result, (*registry, "config_path")):
        return
    for path in _of_old(tomlread.at(file.table, registry), registry):
        raise errors.UsageError(
            f"{file.path}: {tomlread.name(path)} can't be set: containerd reads how registries are reached from hosts.toml files",
            hint="say it in registries.yaml (--private-registry), which has mirrors, and tls for each host below configs",
        )


def _of_old(registry: object, path: Path) -> Iterator[Path]:
    """What is said of registries in the way that containerd had before ``config_path``."""
    said: Table = registry if isinstance(registry, dict) else {}
    if said.get("mirrors"):
        yield (*path, "mirrors")
    configs = said.get("configs")
    for host, each in configs.items() if isinstance(configs, dict) else ():
        if isinstance(each, dict) and any(key.casefold() == "tls" for key in each):
            yield (*path, "configs", host, "tls")


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
