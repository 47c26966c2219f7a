"""The snapshotter alone, as a proxy plugin of somebody else's containerd: what nix-snapshotter is, with its configuration."""

import asyncio
import contextlib
import dataclasses
import logging
import os
import tomllib
from collections.abc import Mapping
from typing import Literal

import msgspec

from nixlet import errors
from nixlet.host import sdnotify, signals
from nixlet.node.ownership import marker
from nixlet.node.requirements import preflight
from nixlet.node.serving import proxyplugin
from nixlet.node.settings import config as node_config
from nixlet.store import external, policy, roots
from nixlet.store.daemon import client as nix

#: Where nix-snapshotter looks for its configuration, and what it takes where that says nothing.
DEFAULT_CONFIG = "/etc/nix-snapshotter/config.toml"
_DEFAULT_ADDRESS = "/run/nix-snapshotter/nix-snapshotter.sock"
_DEFAULT_ROOT = "/var/lib/containerd/io.containerd.snapshotter.v1.nix"
_DEFAULT_CONTAINERD = "/run/containerd/containerd.sock"

#: Seconds between two looks for a containerd that isn't there yet.
_LOOK_AGAIN = 1.0

_log = logging.getLogger("nixlet.node")


class ImageServiceSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[image_service]``: the CRI image service on the same socket, in front of a containerd."""

    enable: bool = True
    containerd_address: str = _DEFAULT_CONTAINERD


class StandaloneSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The keys of nix-snapshotter's config.toml.

    Attributes:
        address: The socket to serve on.
        root: The snapshotter's directory.
        external_builder: A program that brings missing paths, called with OUT_LINK and STORE_PATH.
        image_service: The CRI image service.
        strategy: How containers get to see closures; nixlet's own, as the next.
        unsigned_paths: Whether images may name store paths that nobody vouches for.
    """

    address: str = _DEFAULT_ADDRESS
    root: str = _DEFAULT_ROOT
    external_builder: str = ""
    image_service: ImageServiceSettings = msgspec.field(default_factory=ImageServiceSettings)
    strategy: Literal["auto", "view", "bind"] = "auto"
    unsigned_paths: policy.UnsignedPaths = "allow"


def read_settings(path: str | None, overrides: Mapping[str, str | None]) -> StandaloneSettings:
    """The settings of a configuration file, with what the command line says over them.

    Args:
        path: The file; None: the default one, which may be missing.
        overrides: Keys to values; None leaves a key to the file.

    Raises:
        UsageError: The file can't be read, is no TOML, or has a key that is not known.
    """
    try:
        with open(path or DEFAULT_CONFIG, "rb") as file:
            table = tomllib.load(file)
    except FileNotFoundError as error:
        if path is not None:
            raise errors.UsageError(f"the configuration file {path} does not exist") from error
        table = {}
    except OSError as error:
        raise errors.UsageError(f"the configuration file {path} can't be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise errors.UsageError(f"{path or DEFAULT_CONFIG} is no TOML: {error}") from error
    table |= {key: value for key, value in overrides.items() if value is not None}
    try:
        settings = msgspec.convert(table, StandaloneSettings)
    except msgspec.ValidationError as error:
        known = (
            "address, root, external_builder, image_service.enable, image_service.containerd_address,"
            " strategy, unsigned_paths"
        )
        raise errors.UsageError(f"{path or DEFAULT_CONFIG}: {error}", hint=f"the keys are {known}") from error
    image_service = settings.image_service
    for key, value in (
        ("root", settings.root),
        ("address", settings.address),
        ("image_service.containerd_address", image_service.containerd_address),
    ):
        if not value:
            raise errors.UsageError(
                f"{path or DEFAULT_CONFIG}: {key} is empty", hint="leave it away to have the default"
            )
    return msgspec.structs.replace(
        settings, root=os.path.abspath(settings.root), address=os.path.abspath(settings.address)
    )


async def run(settings: StandaloneSettings) -> None:
    """Serve until SIGTERM, SIGINT or SIGHUP; none removes a snapshot.

    Raises:
        NixletError: It can't start.
    """
    stop = signals.stop_requested()
    preflight.check_root()
    nix_settings = nix.DaemonSettings.from_environment(os.environ)
    preflight.check_nix(nix_settings.stdio[0], nix_settings.socket)
    daemon = nix.DaemonStore(nix_settings)
    store = external.ExternalBuilderStore(daemon, settings.external_builder) if settings.external_builder else daemon
    place = proxyplugin.Place(
        root=settings.root,
        socket=settings.address,
        containerd_socket=settings.image_service.containerd_address,
        snapshotter="nix",
        archive_dirs=node_config.DEFAULT_ARCHIVE_DIRS,
        serve_images=settings.image_service.enable,
        strategy=settings.strategy,
        unsigned_paths=settings.unsigned_paths,
    )
    proxyplugin.check_owner(settings.root)
    marker.check_snapshotter(settings.root)
    async with contextlib.AsyncExitStack() as stack:
        gc_roots = roots.of_snapshotter(nix_settings.gcroots, place.root)
        served = await proxyplugin.serve(stack, place, store, gc_roots)
        marker.write_snapshotter(place.root, place.socket, gc_roots.directory)
        assert served.snapshotter is not None
        strategy = await served.snapshotter.strategy()
        _log.info(
            "serving",
            extra=dataclasses.asdict(place) | {"archive_dirs": list(place.archive_dirs), "strategy": strategy.value},
        )
        looking = asyncio.create_task(_look_for_containerd(place.containerd_socket), name="look for containerd")
        stack.callback(looking.cancel)
        async with sdnotify.Notifier(os.environ).ready():
            await stop.wait()
        _log.info("stopping; snapshots stay")


async def _look_for_containerd(address: str) -> None:
    """Say so when containerd can't see our mounts; it may come later than we."""
    while True:
        try:
            proxyplugin.check_mount_namespace(address)
        except errors.UnavailableError:
            await asyncio.sleep(_LOOK_AGAIN)
        except errors.FailedPreconditionError as error:
            _log.error("%s; %s", error, error.hint)
            return
        else:
            return
