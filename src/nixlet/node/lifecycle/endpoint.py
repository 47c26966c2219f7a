"""Somebody else's containerd, used in place of one of our own: found ready, and known to use our snapshotter."""

import asyncio
import contextlib
import os
import stat
from collections.abc import Iterator

from nixlet import errors
from nixlet.containerd import cri, imagestore
from nixlet.host import unixsocket
from nixlet.node.serving import proxyplugin
from nixlet.node.settings import config as node_config

#: Seconds for it to answer: at boot it may still be starting.
_READY_TIMEOUT = 60.0

#: How to give a containerd our snapshotter.
_HINT = 'give it [proxy_plugins.{name}] type = "snapshot", address = "{socket}" and restart it while this node runs'


@contextlib.contextmanager
def linked(settings: node_config.Settings, layout: node_config.Layout) -> Iterator[None]:
    """Let the place of our own containerd's socket lead to that one, for all who look for a node's containerd there.

    Raises:
        FailedPreconditionError: A containerd serves there, or something else has the name.
    """
    place, target = layout.containerd_socket, settings.container_runtime_endpoint
    if os.path.realpath(target) == os.path.realpath(os.path.dirname(place)) + f"/{os.path.basename(place)}":
        yield
        return
    with contextlib.suppress(FileNotFoundError):
        mode = os.lstat(place).st_mode
        if stat.S_ISLNK(mode) or (stat.S_ISSOCK(mode) and not unixsocket.is_served(place)):
            os.unlink(place)
        elif not stat.S_ISSOCK(mode):
            raise errors.FailedPreconditionError(
                f"{place} exists and is no socket", hint="remove it, or choose another --state-dir"
            )
    try:
        os.symlink(target, place)
    except FileExistsError as error:
        raise errors.FailedPreconditionError(
            f"another process serves the socket {place}", hint="stop that containerd, or choose another --state-dir"
        ) from error
    try:
        yield
    finally:
        if os.path.islink(place):
            os.unlink(place)


async def wait_until_ready(settings: node_config.Settings, made: proxyplugin.Served) -> str:
    """Wait until it answers; its version.

    Raises:
        UnavailableError: It doesn't.
    """
    address = settings.container_runtime_endpoint
    try:
        async with asyncio.timeout(_READY_TIMEOUT):
            await cri.wait_until_served(made.runtime, made.containerd)
    except TimeoutError as error:
        raise errors.UnavailableError(
            f"the containerd at {address} does not answer within {_READY_TIMEOUT:g} s",
            hint="start it, or let nixlet start one: leave --container-runtime-endpoint away",
        ) from error
    return (await made.containerd.version()).removeprefix("v")


async def check_snapshotter(
    settings: node_config.Settings, place: proxyplugin.Place, containerd: imagestore.ImageStore
) -> None:
    """Check that its snapshotter of that name is ours: an empty snapshot made through it must lie below our root.

    Raises:
        FailedPreconditionError: It has none of that name, or another one.
    """
    name, address = settings.snapshotter, settings.container_runtime_endpoint
    hint = _HINT.format(name=name, socket=place.socket)
    key = f"nixlet-check-{os.urandom(8).hex()}"
    try:
        async with containerd.leased() as leased:
            mounts = await leased.prepare_snapshot(name, key, "", {})
            await leased.remove_snapshot(name, key)
    except errors.NixletError as error:
        raise errors.FailedPreconditionError(
            f"the containerd at {address} can't use the snapshotter {name}: {error.message}", hint=hint
        ) from error
    if not all(mount.source.startswith(f"{place.root}/") for mount in mounts):
        raise errors.FailedPreconditionError(
            f"the containerd at {address} has another snapshotter under the name {name}:"
            f" its snapshots lie at {mounts[0].source}",
            hint=hint,
        )
