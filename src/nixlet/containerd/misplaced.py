"""Keys of containerd's configuration that have another name in another version of it.

containerd passes over what it doesn't know, tables without a word, so that a key in the wrong place only seems to be set. The names
are from containerd's docs/cri/config.md, and from comparing what ``config default`` prints in each version.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from nixlet import errors
from nixlet.containerd import tomlread

Path = tuple[str, ...]

_CRI = "io.containerd.grpc.v1.cri"
_IMAGES = "io.containerd.cri.v1.images"
_RUNTIME = "io.containerd.cri.v1.runtime"
_SERVER = "io.containerd.server.v1."

#: What is left of version 2's CRI plugin from version 3 on.
_STREAMING = frozenset(
    {
        "disable_tcp_service",
        "enable_tls_streaming",
        "stream_idle_timeout",
        "stream_server_address",
        "stream_server_port",
        "x509_key_pair_streaming",
    }
)

#: What went elsewhere than into the runtime plugin under its old name.
_MOVED: Mapping[Path, Path] = MappingProxyType(
    {
        ("cni", "bin_dir"): (_RUNTIME, "cni", "bin_dirs"),
        ("containerd", "disable_snapshot_annotations"): (_IMAGES, "disable_snapshot_annotations"),
        ("containerd", "discard_unpacked_layers"): (_IMAGES, "discard_unpacked_layers"),
        ("containerd", "snapshotter"): (_IMAGES, "snapshotter"),
        ("image_decryption",): (_IMAGES, "image_decryption"),
        ("image_pull_progress_timeout",): (_IMAGES, "image_pull_progress_timeout"),
        ("image_pull_with_sync_fs",): (_IMAGES, "image_pull_with_sync_fs"),
        ("max_concurrent_downloads",): (_IMAGES, "max_concurrent_downloads"),
        ("registry",): (_IMAGES, "registry"),
        ("sandbox_image",): (_IMAGES, "pinned_images", "sandbox"),
        ("stats_collect_period",): (_IMAGES, "stats_collect_period"),
    }
)

#: Plugins that were renamed in version 3.
_RENAMED: Mapping[str, str] = MappingProxyType(
    {
        "io.containerd.internal.v1.restart": "io.containerd.monitor.container.v1.restart",
        "io.containerd.monitor.v1.cgroups": "io.containerd.monitor.task.v1.cgroups",
    }
)

#: The tables that became plugins in version 4; [debug] has lost these keys alone.
_SERVERS = ("grpc", "ttrpc", "metrics", "debug")
_DEBUG_SERVER = frozenset({"address", "gid", "uid"})
_HISTOGRAM = ("plugins", "io.containerd.metrics.v1.grpc-prometheus", "grpc_histogram")


def check(table: Mapping[str, Any], version: int, where: str) -> None:
    """Check that all keys have the names of a version.

    Args:
        table: What somebody wrote.
        version: The version of containerd's configuration that it becomes part of.
        where: The file.

    Raises:
        UsageError: One has the name of another version; the sentence has the right one.
    """
    for written, right in _found(table, version):
        raise errors.UsageError(
            f"{where}: {tomlread.name(written)} has no place in version {version} of containerd's configuration",
            hint=f"it is {tomlread.name(right)} there",
        )


def _found(table: Mapping[str, Any], version: int) -> Iterator[tuple[Path, Path]]:
    """What is misplaced, and where it belongs."""
    plugins = _table(table, "plugins")
    yield from _renamed_plugins(plugins, version)
    if version == 2:
        for key in (_IMAGES, _RUNTIME):
            if key in plugins:
                yield ("plugins", key), ("plugins", _CRI)
    else:
        yield from _cri_keys(plugins)
    if version >= 4:
        yield from _server_tables(table)
    else:
        for name in _SERVERS:
            if f"{_SERVER}{name}" in plugins:
                yield ("plugins", f"{_SERVER}{name}"), (name,)


def _renamed_plugins(plugins: Mapping[str, Any], version: int) -> Iterator[tuple[Path, Path]]:
    for old, new in _RENAMED.items():
        wrong, right = (new, old) if version == 2 else (old, new)
        if wrong in plugins:
            yield ("plugins", wrong), ("plugins", right)


def _cri_keys(plugins: Mapping[str, Any]) -> Iterator[tuple[Path, Path]]:
    cri = _table(plugins, _CRI)
    for written, right in _MOVED.items():
        if tomlread.at(cri, written) is not None:
            yield ("plugins", _CRI, *written), ("plugins", *right)
    for key in cri:
        if key not in _STREAMING:
            yield ("plugins", _CRI, key), ("plugins", _RUNTIME, key)
    if tomlread.at(plugins, (_RUNTIME, "cni", "bin_dir")) is not None:
        yield ("plugins", _RUNTIME, "cni", "bin_dir"), ("plugins", _RUNTIME, "cni", "bin_dirs")


def _server_tables(table: Mapping[str, Any]) -> Iterator[tuple[Path, Path]]:
    for name in _SERVERS:
        for key in _table(table, name):
            if name == "grpc" and key.startswith("tcp_"):
                yield (name, key), ("plugins", f"{_SERVER}grpc-tcp", key.removeprefix("tcp_"))
            elif name == "metrics" and key == "grpc_histogram":
                yield (name, key), _HISTOGRAM
            elif name != "debug" or key in _DEBUG_SERVER:
                yield (name, key), ("plugins", f"{_SERVER}{name}", key)


def _table(table: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = table.get(key)
    return found if isinstance(found, dict) else {}
