"""The node: what it is made of, and the order in which it starts and stops.

The snapshotter serves before containerd starts: a containerd that starts without it takes every image for "not unpacked" and does
not look again. On the way down containerd goes first. Pods go on without either; their shims hold them.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable

import nixlet
from nixlet import errors
from nixlet.containerd import cni, cri, crictl, imagestore
from nixlet.host import files, mounts, network, sdnotify, signals, supervisor, unixsocket
from nixlet.images import archive, loader, platforms
from nixlet.kube import quantity
from nixlet.node import (
    claims,
    containerd_child,
    endpoint,
    marker,
    pause,
    preflight,
    preload,
    proxyplugin,
    registries,
    rendering,
    snapshotters,
)
from nixlet.node import config as node_config
from nixlet.node import faces as faces_module
from nixlet.pods import directories, rotation
from nixlet.rpc import channel as channels
from nixlet.services import health
from nixlet.store import interface, roots
from nixlet.store.daemon import client as nix
from nixlet.telemetry import metrics
from nixlet.varlink import server as varlink

#: The snapshotter that is ours; all others are containerd's own or another program's.
_NIX = "nix"

#: Seconds for which a store that answered is not asked again: where no Nix daemon runs, asking starts one.
_STORE_GOOD_FOR = 5.0

_log = logging.getLogger("nixlet.node")


async def run(settings: node_config.Settings) -> None:
    """Run a node until SIGTERM or SIGINT, which take it down in order and leave pods and snapshots alone.

    A second signal makes it quick: containerd gets no more time to end.

    Args:
        settings: As ``rules.checked`` returns them.

    Raises:
        NixletError: It can't start, or containerd died for good.
    """
    stop = signals.watched()
    living = asyncio.create_task(_live(settings, stop), name="node")
    stopping = asyncio.create_task(stop.requested.wait(), name="signal")
    await asyncio.wait({living, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not living.done():
        _log.info("stopping; pods go on")
        living.cancel()
    try:
        await living
    except asyncio.CancelledError:
        if not stop.requested.is_set():
            raise
    except errors.NixletError as error:
        # Who reads the log alone must find there why it ends.
        if settings.log:
            _log.error("the node ends: %s", error, extra={"hint": error.hint})
        raise


async def _live(settings: node_config.Settings, stop: signals.StopSignals) -> None:
    notifier = sdnotify.Notifier(os.environ)

    def tell(event: supervisor.Event) -> None:
        notifier.tell(f"STATUS=containerd: {event}")

    async with running(settings, hastened=stop.hastened, tell=tell) as containerd, notifier.ready():
        _log.info("the node is ready")
        raise await containerd.gave_up()


@contextlib.asynccontextmanager
async def running(
    settings: node_config.Settings,
    *,
    hastened: asyncio.Event | None = None,
    tell: Callable[[supervisor.Event], None] = lambda _: None,
) -> AsyncIterator[faces_module.Containerd]:
    """A node that is ready for pods, for the time of the context; gives its containerd.

    Args:
        settings: What it is told.
        hastened: Makes its end quick when it is set.
        tell: Learns of what happens to containerd.
    """
    layout = node_config.Layout(settings.data_dir, settings.state_dir)
    preflight.check_root()
    marker.check(layout)
    store = _store(settings)
    # Both wait for other programs.
    supported, programs = await asyncio.gather(
        snapshotters.check_supported(settings, layout, store),
        containerd_child.find_programs(settings),
        return_exceptions=True,
    )
    if isinstance(supported, BaseException):
        raise supported
    if isinstance(programs, BaseException):
        raise programs
    observed = metrics.NodeMetrics()
    observed.registry.add(*metrics.process_metrics(nixlet.__version__))
    async with contextlib.AsyncExitStack() as stack:
        _claim(stack, settings, layout, _gc_roots(store, layout))
        _make_directories(layout)
        # A pod's empty volumes are written by whoever runs in it, also programs that would make their caller root here.
        stack.enter_context(mounts.powerless(layout.pods))
        place = proxyplugin.Place(
            root=layout.snapshotter_root,
            socket=layout.node_socket,
            containerd_socket=settings.container_runtime_endpoint or layout.containerd_socket,
            snapshotter=settings.snapshotter,
            archive_dirs=node_config.archive_dirs(settings, layout),
            image_service_socket=settings.image_service_endpoint,
            strategy=settings.strategy,
            unsigned_paths="deny" if settings.unsigned_paths == "deny" else "allow",
            scratch_dir=layout.agent,
        )
        own = await stack.enter_async_context(channels.connect(layout.node_socket))
        images = cri.ImageClient(own, layout.node_socket)
        faces = faces_module.Faces(faces_module.status(settings, layout, programs), layout, images)
        if store is not None:
            gcroots = store.settings.gcroots
            served = await proxyplugin.serve(stack, place, store, gcroots, observed)
        else:
            served = await proxyplugin.serve_without_snapshotter(stack, place, observed)
        listening = unixsocket.listen(layout.control_socket)
        stack.callback(_unlink, layout.control_socket)
        await stack.enter_async_context(varlink.serve(listening, [faces.interface(served)]))
        containerd = await stack.enter_async_context(
            _own_containerd(settings, layout, programs, served, hastened=hastened, tell=tell)
            if programs is not None
            else _others_containerd(settings, layout, place, served)
        )
        if served.snapshotter is not None:
            proxyplugin.check_mount_namespace(place.containerd_socket)
        limit, kept_files = quantity.parse(settings.container_log_max_size), int(settings.container_log_max_files)
        logs = rotation.Rotator(served.runtime, layout.pods, limit=limit, files=kept_files)
        await stack.enter_async_context(rotation.kept(logs))
        # Before containerd goes: what is being given back needs it.
        stack.push_async_callback(faces.close, signals.Ending(hastened=hastened))
        _observe_containerd(observed, containerd)
        if settings.health_address != node_config.NO_HEALTH:
            checks = _checks(containerd, served, place, store, layout)
            address = settings.health_address or layout.health_socket
            remarks = {"registries": served.remarks.tell} if programs is not None else {}
            told = health.Health(checks, observed.registry, remarks)
            await stack.enter_async_context(health.serve(told, address))
        rendered = crictl.render(
            runtime_socket=place.containerd_socket, image_socket=settings.image_service_endpoint or place.socket
        )
        files.write_atomically(layout.crictl_config, rendered, mode=0o600)
        # Only a node that is ready says what its children are: that is how the command line tells.
        await faces.ready(containerd)
        yield containerd


def _claim(
    stack: contextlib.AsyncExitStack, settings: node_config.Settings, layout: node_config.Layout, gc_roots: str
) -> None:
    """Have the node's directories and network for ourselves, until ``stack`` is left."""
    for directory in (layout.data_dir, layout.state_dir):
        files.make_directory(directory, mode=0o711)
    stack.enter_context(files.exclusive_lock(layout.lock, what=f"the data directory {layout.data_dir}"))
    stack.enter_context(files.exclusive_lock(layout.state_lock, what=f"the state directory {layout.state_dir}"))
    # Once more: another node may have had them until now.
    marker.check(layout)
    bridge, own = settings.bridge, not settings.container_runtime_endpoint
    if own:
        stack.enter_context(claims.pod_network(bridge, settings.pod_cidr))
    # Before there is anything else that would have to be taken away.
    known = marker.write(settings, layout, gc_roots, bridge_is_there=network.bridge_exists(bridge))
    if own:
        claims.clear_gateway(bridge, settings.pod_cidr, ours=bridge in known.bridges)
        if bridge in known.bridges:
            stack.callback(network.remove_bridge, bridge)


def _store(settings: node_config.Settings) -> nix.DaemonStore | None:
    """The store behind our snapshotter; a node without it needs none."""
    if settings.snapshotter != _NIX:
        return None
    return nix.DaemonStore(nix.DaemonSettings.from_environment(os.environ))


def _gc_roots(store: nix.DaemonStore | None, layout: node_config.Layout) -> str:
    return (
        ""
        if store is None
        else roots.directory(store.settings.gcroots, proxyplugin.roots_owner(layout.snapshotter_root))
    )


@contextlib.asynccontextmanager
async def _own_containerd(
    settings: node_config.Settings,
    layout: node_config.Layout,
    programs: containerd_child.Programs,
    served: proxyplugin.Served,
    *,
    hastened: asyncio.Event | None,
    tell: Callable[[supervisor.Event], None],
) -> AsyncIterator[faces_module.Containerd]:
    # A containerd without its database knows no pod, which is no reason to take theirs away.
    knew_pods = os.path.exists(layout.containerd_database)
    async with (
        registries.kept(settings, layout) as reached,
        containerd_child.kept_running(
            settings,
            layout,
            programs,
            served.runtime,
            served.containerd,
            said=reached.said,
            hastened=hastened,
            tell=tell,
        ) as kept,
    ):
        served.remarks.tell = lambda: reached.problem
        reached.elsewhere = await asyncio.to_thread(rendering.registries_elsewhere, layout)
        await _check_strategy(served, layout)
        if programs.pause:
            await _load_pause_image(programs.pause, layout, served.loader)
        if knew_pods:
            await _sweep(layout, served)
        async with _preloaded(settings, layout, served):
            yield faces_module.Containerd(programs.containerd.version, kept)


@contextlib.asynccontextmanager
async def _preloaded(
    settings: node_config.Settings, layout: node_config.Layout, served: proxyplugin.Served
) -> AsyncIterator[None]:
    """What is to be there before anybody asks for it. Lists are pulled as kubelets pull: they may name ``nix:0`` images."""
    address = settings.image_service_endpoint or layout.node_socket
    also = [settings.system_default_registry] if settings.system_default_registry else []
    registries_named = [*settings.airgap_extra_registry, *also]
    async with channels.connect(address) as channel:
        pulling = cri.ImageClient(channel, address)
        loaded = preload.Preload(
            layout.images,
            served.loader,
            served.containerd,
            served.images,
            served.opener,
            pulling,
            registries_named,
        )
        async with preload.kept(loaded):
            yield


@contextlib.asynccontextmanager
async def _others_containerd(
    settings: node_config.Settings, layout: node_config.Layout, place: proxyplugin.Place, served: proxyplugin.Served
) -> AsyncIterator[faces_module.Containerd]:
    with endpoint.linked(settings, layout):
        version = await endpoint.wait_until_ready(settings, served)
        await _check_strategy(served, layout)
        if served.snapshotter is not None:
            await endpoint.check_snapshotter(settings, place, served.containerd)
        await _sweep(layout, served)
        yield faces_module.Containerd(version)


async def _sweep(layout: node_config.Layout, served: proxyplugin.Served) -> None:
    """Delete the directories of pods that another client removed while no node ran."""
    uids = {sandbox.metadata.uid for sandbox in await served.runtime.sandboxes()}
    if uids:
        await asyncio.to_thread(directories.sweep, layout.pods, await served.containerd.identity(), uids)


async def _check_strategy(served: proxyplugin.Served, layout: node_config.Layout) -> None:
    """Check that containers can see closures here; the probe ran beside containerd's start."""
    if served.snapshotter is not None:
        try:
            await served.snapshotter.strategy()
        except errors.UnsupportedError as error:
            raise snapshotters.refused(_NIX, layout.containerd_root, error) from error


def _checks(
    containerd: faces_module.Containerd,
    served: proxyplugin.Served,
    place: proxyplugin.Place,
    store: interface.Store | None,
    layout: node_config.Layout,
) -> dict[str, health.Check]:
    """What must be so for the node to be ready."""

    async def has_room() -> None:
        for directory in (layout.data_dir, layout.state_dir):
            files.check_room(directory)

    checks: dict[str, health.Check] = {
        "containerd": lambda: containerd.check(served.runtime),
        "network": served.runtime.check_network,
        "disk": has_room,
    }
    if store is None or served.snapshotter is None:
        return checks
    snapshotter = served.snapshotter

    async def serves() -> None:
        if not unixsocket.is_served(place.socket):
            raise errors.UnavailableError(f"nobody listens at {place.socket}")
        snapshotter.counts()

    async def answers() -> None:
        async with store.session() as session:
            await session.present(())

    return {**checks, "snapshotter": serves, "store": health.good_for(_STORE_GOOD_FOR, answers)}


def _observe_containerd(observed: metrics.NodeMetrics, containerd: faces_module.Containerd) -> None:
    kept = containerd.kept
    if kept is None:
        return
    label = (kept.name,)
    observed.registry.add(
        metrics.CounterOf(
            "nixlet_child_restarts_total",
            "How often a child was started again.",
            lambda: {label: kept.restarts},
            ("child",),
        ),
        metrics.Gauge(
            "nixlet_child_up",
            "Whether a child is running and ready.",
            lambda: {label: int(kept.current is not None)},
            ("child",),
        ),
    )


def _make_directories(layout: node_config.Layout) -> None:
    for directory in (layout.containerd_state, layout.runc_root, layout.cni_data_dir):
        files.make_directory(directory, mode=0o711)
    for directory in (layout.agent, layout.opt, layout.images):
        files.make_directory(directory, mode=0o711)
    for directory in (layout.containerd_root, layout.pods):
        # Volumes lie in these, of images in the first and of pods in the second: no other user may reach what a container put
        # there. Earlier nodes made them 0711.
        files.make_directory(directory, mode=0o700)
        os.chmod(directory, 0o700)
    for file in (layout.containerd_config, os.path.join(layout.cni_conf_dir, cni.FILE_NAME)):
        files.make_directory(os.path.dirname(file))


async def _load_pause_image(program: str, layout: node_config.Layout, loads: loader.Loader) -> None:
    with pause.image_archive(program, layout.images) as path, archive.open_archive(path) as source:
        image = source.image(platforms.host_platform())
        try:
            await loads.load(source, image, [pause.REFERENCE], labels=imagestore.PINNED)
        except errors.NixletError as error:
            raise errors.FailedPreconditionError(
                f"the pause image can't be loaded: {error.message}", hint=error.hint or f"see {layout.containerd_log}"
            ) from error


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
