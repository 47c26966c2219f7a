"""What a node serves and looks after, put together. It is imported while containerd starts, which takes as long."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

import nixlet
from nixlet import errors
from nixlet.containerd import cri, crictl, imagestore
from nixlet.host import children as host_children
from nixlet.host import files, keptchild, network, rootlesskit, signals, unixsocket
from nixlet.images import archive, loader, platforms
from nixlet.kube import quantity
from nixlet.node.children import containerd_child, registries, rendering
from nixlet.node.cluster.controlplane import datastore
from nixlet.node.images import coredns, pause, preload
from nixlet.node.lifecycle import endpoint
from nixlet.node.requirements import plugins, snapshotters
from nixlet.node.serving import faces as faces_module
from nixlet.node.serving import proxyplugin
from nixlet.node.settings import config as node_config
from nixlet.pods import directories, rotation
from nixlet.rpc import channel as channels
from nixlet.rpc import server as rpc_server
from nixlet.services import health
from nixlet.snapshots import model
from nixlet.store import interface, roots
from nixlet.store.daemon import client as nix
from nixlet.telemetry import metrics
from nixlet.varlink import server as varlink

#: Seconds for which a store that answered is not asked again: where no Nix daemon runs, asking starts one.
_STORE_GOOD_FOR = 5.0


class Assembly:
    """What serves of a node, before its containerd has to be there.

    Args:
        settings: The node's settings.
        layout: Where things are.
        programs: Its programs; None where somebody else's containerd is used.
        found: Its snapshotters that are proxy plugins.
        store: The store behind its snapshotter, if that is ours.
        children: Its children, among which its own containerd is or will be.
    """

    def __init__(
        self,
        settings: node_config.Settings,
        layout: node_config.Layout,
        programs: containerd_child.Programs | None,
        found: Sequence[plugins.Plugin],
        store: nix.DaemonStore | None,
        children: host_children.Children,
    ) -> None:
        self._settings = settings
        self._children = children
        self._layout = layout
        self._programs = programs
        self._store = store
        #: Tell what is not as somebody wants it although the node is well, by what it is about; empty where all is.
        self.remarks: dict[str, Callable[[], str]] = {}
        self._observed = metrics.NodeMetrics()
        self._observed.registry.add(*metrics.process_metrics(nixlet.__version__))
        self._place = proxyplugin.Place(
            root=layout.snapshotter_root(settings.snapshotter),
            socket=layout.node_socket,
            containerd_socket=settings.container_runtime_endpoint or layout.containerd_socket,
            snapshotter=settings.snapshotter,
            archive_dirs=node_config.archive_dirs(settings, layout),
            image_service_socket=settings.image_service_endpoint,
            pulls_through=next((each.images for each in found if each.images), ""),
            strategy=settings.strategy,
            overlay=next((each.overlay for each in found if each.is_ours), model.Overlay.KERNEL),
            unsigned_paths="deny" if settings.unsigned_paths == "deny" else "allow",
            scratch_dir=layout.agent,
            rootlesskit_api=os.path.join(layout.rootlesskit_state, rootlesskit.SOCKET) if settings.rootless else "",
        )

    async def serve(self, stack: contextlib.AsyncExitStack, accepting: rpc_server.Server) -> None:
        """Serve, until ``stack`` is left; what asks containerd fails until it is there.

        Args:
            stack: Owns all that is made here.
            accepting: The server at the node's socket, at which containerd may be waiting already.

        Raises:
            NixletError: As ``proxyplugin.serve``.
        """
        layout, store = self._layout, self._store
        own = await stack.enter_async_context(channels.connect(layout.node_socket))
        images = cri.ImageClient(own, layout.node_socket)
        status = faces_module.status(self._settings, layout, self._programs)
        self._faces = faces_module.Faces(status, layout, images, self._children, self.remarks)
        observed = self._observed
        if store is not None:
            gc_roots = roots.of_snapshotter(store.settings.gcroots, self._place.root)
            served = await proxyplugin.serve(stack, self._place, store, gc_roots, observed, accepting)
        else:
            served = await proxyplugin.serve_without_snapshotter(stack, self._place, observed, accepting)
        self._served = served
        control = unixsocket.listen(layout.control_socket)
        stack.callback(unixsocket.remove, layout.control_socket)
        await stack.enter_async_context(varlink.serve(control, [self._faces.interface(served)]))

    def coredns_maker(self) -> coredns.Maker | None:
        """What makes an image of the machine's CoreDNS; None: the snapshotter is none of ours."""
        store, served = self._store, self._served
        if store is None:
            return None
        return coredns.Maker(store, served.loader, served.containerd, served.images, self._layout.agent)

    async def strategy(self) -> str:
        """How containers get to see closures; empty: they don't.

        Raises:
            NixletError: As ``Snapshotter.strategy``.
        """
        served = self._served.snapshotter
        return "" if served is None else (await served.strategy()).value

    async def answered(self) -> None:
        """Wait until containerd serves the CRI; the caller limits the time.

        Raises:
            FailedPreconditionError: It never will.
        """
        await cri.wait_until_served(self._served.runtime, self._served.containerd)

    @contextlib.asynccontextmanager
    async def with_own(self, reached: registries.Kept, *, knew_pods: bool) -> AsyncIterator[faces_module.Containerd]:
        """The node's own containerd when it is ready, with what is to be there before anybody asks for it.

        Args:
            reached: How it reaches registries.
            knew_pods: Whether it had its database: one without knows no pod, which is no reason to take theirs away.

        Raises:
            NixletError: It can't be started, or does not answer; or containers can't see closures here.
        """
        programs, served, layout = self._programs, self._served, self._layout
        assert programs is not None
        await self._children.ready(containerd_child.NAME)
        await served.front_answers()
        self.remarks["registries"] = served.remarks.tell = lambda: reached.problem
        reached.elsewhere = await asyncio.to_thread(rendering.registries_elsewhere, layout)
        await _check_strategy(served, layout)
        if programs.pause:
            await _load_pause_image(programs.pause, layout, served.loader)
        if knew_pods:
            await _sweep(layout, served)
        async with _preloaded(self._settings, layout, served):
            yield faces_module.Containerd(programs.containerd.version, self._children[containerd_child.NAME])

    @contextlib.asynccontextmanager
    async def with_others(self) -> AsyncIterator[faces_module.Containerd]:
        """Somebody else's containerd, when it is ready.

        Raises:
            NixletError: It does not answer, or has another snapshotter.
        """
        settings, served, layout = self._settings, self._served, self._layout
        with endpoint.linked(settings, layout):
            version = await endpoint.wait_until_ready(settings, served)
            await _check_strategy(served, layout)
            if served.snapshotter is not None:
                await endpoint.check_snapshotter(settings, self._place, served.containerd)
            await _sweep(layout, served)
            yield faces_module.Containerd(version)

    async def attend(
        self, stack: contextlib.AsyncExitStack, containerd: faces_module.Containerd, hastened: asyncio.Event | None
    ) -> None:
        """Look after pods and logs, and be ready, until ``stack`` is left, before containerd goes.

        Args:
            stack: Owns all that is made here.
            containerd: The containerd, which is ready.
            hastened: Makes the end quick when it is set.
        """
        settings, served, layout, observed = self._settings, self._served, self._layout, self._observed
        if served.snapshotter is not None:
            proxyplugin.check_mount_namespace(self._place.containerd_socket)
        limit, kept_files = quantity.parse(settings.container_log_max_size), int(settings.container_log_max_files)
        logs = rotation.Rotator(served.runtime, layout.pods, self._faces.writes_log, limit=limit, files=kept_files)
        await stack.enter_async_context(rotation.kept(logs))
        # Before containerd goes: what is being given back needs it.
        stack.push_async_callback(self._faces.close, signals.Ending(hastened=hastened))
        observed.registry.add(*_child_metrics(self._children))
        if settings.health_address != node_config.NO_HEALTH:
            checks = _checks(containerd, served, self._place, self._store, layout)
            address = settings.health_address or layout.health_socket
            further = _further(self._children, containerd.child)
            told = health.Health(checks, observed.registry, self.remarks, further)
            await stack.enter_async_context(health.serve(told, address))
        image_socket = settings.image_service_endpoint or self._place.socket
        rendered = crictl.render(runtime_socket=self._place.containerd_socket, image_socket=image_socket)
        files.write_atomically(layout.crictl_config, rendered, mode=0o600)
        # Only a node that is ready says what its children are: that is how the command line tells.
        await self._faces.ready(containerd)


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
            raise snapshotters.refused(served.loader.snapshotter, layout.containerd_root, error) from error


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
        datastore.check_room(layout)

    checks: dict[str, health.Check] = {
        "containerd": lambda: containerd.check(served.runtime),
        "network": served.runtime.check_network,
        "disk": has_room,
    }
    if place.rootlesskit_api:
        checks["slirp4netns"] = _way_out
    if store is None or served.snapshotter is None:
        return checks
    snapshotter = served.snapshotter

    async def serves() -> None:
        if not unixsocket.is_served(place.socket):
            raise errors.UnavailableError(f"nobody listens at {place.socket}")
        snapshotter.check()

    async def answers() -> None:
        async with store.session() as session:
            await session.present(())

    return {**checks, "snapshotter": serves, "store": health.good_for(_STORE_GOOD_FOR, answers)}


async def _way_out() -> None:
    """Check that somebody is at the other end of the interface of an ordinary user's node: nobody starts slirp4netns again."""
    if not network.has_carrier("tap0"):
        raise errors.UnavailableError(
            "slirp4netns has ended, and with it the way to the network", hint="restart the node"
        )


def _further(
    children: Iterable[keptchild.Child], containerd: keptchild.Child | None
) -> Callable[[], dict[str, health.Check]]:
    """Checks for the children that are there when they are asked for; the node's containerd has one of its own."""
    return lambda: {f"child/{child.name}": _runs(child) for child in children if child is not containerd}


def _runs(child: keptchild.Child) -> health.Check:
    """A check that a child is there."""

    async def runs() -> None:
        child.check()

    return runs


def _child_metrics(children: host_children.Children) -> tuple[metrics.CounterOf, metrics.Gauge]:
    return (
        metrics.CounterOf(
            "nixlet_child_restarts_total",
            "How often a child was started again.",
            lambda: {(child.name,): child.restarts for child in children},
            ("child",),
        ),
        metrics.Gauge(
            "nixlet_child_up",
            "Whether a child is running and ready.",
            lambda: {(child.name,): int(child.current is not None) for child in children},
            ("child",),
        ),
    )


async def _load_pause_image(program: str, layout: node_config.Layout, loads: loader.Loader) -> None:
    with (
        pause.image_archive(program, layout.images) as file,
        archive.open_archive(file, label=pause.REFERENCE) as source,
    ):
        image = source.image(platforms.host_platform())
        try:
            await loads.load(source, image, [pause.REFERENCE], labels=imagestore.PINNED)
        except errors.NixletError as error:
            raise errors.FailedPreconditionError(
                f"the pause image can't be loaded: {error.message}", hint=error.hint or f"see {layout.containerd_log}"
            ) from error
