"""The node: what it is made of, and the order in which it starts and stops.

containerd starts first, as soon as its configuration is written and the node's socket listens; what serves there is imported and put
together beside it (``assembly``). containerd's first calls wait at the socket: a containerd that starts without its snapshotter takes
every image for "not unpacked" and does not look again. On the way down containerd goes first. Pods go on without either; their
shims hold them.
"""

import asyncio
import contextlib
import functools
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from nixlet import errors
from nixlet.containerd import cni
from nixlet.containerd import config as containerd_config
from nixlet.host import children as host_children
from nixlet.host import files, limits, mounts, network, sdnotify, signals, waits
from nixlet.node.children import containerd_child, registries, snapshotter_child, stargz
from nixlet.node.cluster.preflight import finding
from nixlet.node.ownership import claims, marker
from nixlet.node.requirements import plugins, preflight, snapshotters
from nixlet.node.serving import listeners
from nixlet.node.settings import config as node_config
from nixlet.rpc import server as rpc_server
from nixlet.store import roots
from nixlet.store.daemon import client as nix

if TYPE_CHECKING:
    from nixlet.node.cluster.roles import node as cluster_node
    from nixlet.node.lifecycle import assembly

#: Where CRI keeps containers' streams below containerd's state directory.
_STREAMS = "io.containerd.grpc.v1.cri/containers"

_log = logging.getLogger("nixlet.node")


async def run(settings: node_config.Settings) -> None:
    """Run a node until SIGTERM, SIGINT or SIGHUP, which take it down in order and leave pods and snapshots alone.

    A second signal makes it quick: containerd gets no more time to end.

    Args:
        settings: As ``rules.checked`` returns them.

    Raises:
        NixletError: It can't start, or one of its children died for good.
    """
    limits.raise_open_files()
    stop = signals.watched()
    failing = asyncio.Event()
    living = asyncio.create_task(_live(settings, stop, failing), name="node")
    stopping = asyncio.create_task(stop.requested.wait(), name="signal")
    await asyncio.wait({living, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    # One that ends for an error comes to tell it; a signal then only counts as the first of two.
    if not living.done() and not failing.is_set():
        _log.info("stopping; pods %s", "end with the node" if settings.rootless else "go on")
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


async def _live(settings: node_config.Settings, stop: signals.StopSignals, failing: asyncio.Event) -> None:
    notifier = sdnotify.Notifier(os.environ)

    def tell(summary: str) -> None:
        notifier.tell(f"STATUS={summary}")

    node = running(settings, hastened=stop.hastened, tell=tell, fails=failing.set)
    async with node as children, notifier.ready():
        _log.info("the node is ready")
        raise await children.gave_up()


@contextlib.asynccontextmanager
async def running(
    settings: node_config.Settings,
    *,
    hastened: asyncio.Event | None = None,
    tell: Callable[[str], None] = lambda _: None,
    fails: Callable[[], None] = lambda: None,
) -> AsyncIterator[host_children.Children]:
    """A node that is ready for pods, for the time of the context; gives its children.

    Args:
        settings: What it is told.
        hastened: Makes its end quick when it is set.
        tell: Learns how its children do, or what else is waited for, in a line.
        fails: Is called when it begins to end for an error, of which it, or whoever uses it, has heard.
    """
    layout = settings.layout
    preflight.check_root()
    marker.check(layout)
    found = plugins.of_node(settings, layout)
    store = _store(found)
    async with contextlib.AsyncExitStack() as stack, _told(fails):
        # Nix is another program, which takes its time.
        checking = waits.owned(stack, snapshotters.check_supported(settings, layout, store), "snapshotter")
        try:
            programs = await containerd_child.find_programs(settings, layout)
        except errors.NixletError:
            await checking
            raise
        # What needs no answer of Nix's is known before anything is made.
        await asyncio.wait({checking}, timeout=None if store is None or any(each.needs for each in found) else 0)
        if checking.done():
            checking.result()
        cluster = await _cluster(settings, tell)
        settings = settings if cluster is None else cluster.settings
        _claim(stack, settings, layout, _gc_roots(store, found))
        _make_directories(layout)
        # A pod's empty volumes are written by whoever runs in it, also programs that would make their caller root here.
        stack.enter_context(mounts.powerless(layout.pods))
        accepting = await stack.enter_async_context(rpc_server.accepting(listeners.listen(stack, layout.node_socket)))
        answered: asyncio.Future[Callable[[], Awaitable[None]]] = asyncio.get_running_loop().create_future()
        stack.callback(answered.cancel)

        async def ready() -> None:
            await (await asyncio.shield(answered))()

        # What its children need goes after them, and so does what serves them, also where the start ends in the middle.
        needed = await stack.enter_async_context(contextlib.AsyncExitStack())
        serving = await stack.enter_async_context(contextlib.AsyncExitStack())
        children = await stack.enter_async_context(host_children.kept_running(hastened=hastened, tell=tell))
        joining = await stack.enter_async_context(contextlib.AsyncExitStack())
        start = functools.partial(
            _start, needed, children, settings, layout, programs, found, _routed_mtu(cluster), ready
        )
        beginning = waits.owned(stack, _begun(cluster, joining, children), "cluster")
        # A containerd without its database knows no pod, which is no reason to take theirs away.
        knew_pods = os.path.exists(layout.containerd_database)
        # Streams of an earlier node's containers are taken up before containerd starts, which forgets those that have ended.
        late = _has_streams(layout)
        reached = None if late else await start()
        made = (await asyncio.to_thread(_assembly))(settings, layout, programs, found, store, children)
        await checking
        await made.serve(serving, accepting)
        answered.set_result(made.answered)
        if late:
            reached = await start()
        with_containerd = made.with_others() if reached is None else made.with_own(reached, knew_pods=knew_pods)
        _, containerd = await waits.both(beginning, stack.enter_async_context(with_containerd))
        if cluster is not None:
            await cluster.go_on(stack, children, await made.strategy())
            await cluster.deploy(stack, made.coredns_maker())
            made.remarks.update(cluster.remarks)
        await made.attend(stack, containerd, hastened)
        yield children


@contextlib.asynccontextmanager
async def _told(fails: Callable[[], None]) -> AsyncIterator[None]:
    try:
        yield
    except Exception:
        fails()
        raise


def _assembly() -> "type[assembly.Assembly]":
    """What serves a node; importing it takes as long as containerd's start."""
    from nixlet.node.lifecycle import assembly  # noqa: PLC0415 (see above)

    return assembly.Assembly


async def _cluster(settings: node_config.Settings, tell: Callable[[str], None]) -> "cluster_node.Node | None":
    """The cluster that a node is; None: it is alone."""
    found = finding.find(settings)
    if found is None:
        return None
    # (a node alone waits for none of this)
    if settings.kubernetes == node_config.KUBELET:
        from nixlet.node.cluster.roles import standalone  # noqa: PLC0415 (see above)

        return standalone.of(settings, found)
    if settings.server or settings.kubeconfig:
        from nixlet.node.cluster.roles import agent  # noqa: PLC0415 (see above)

        return await agent.of(settings, found, tell)
    from nixlet.node.cluster.roles import server  # noqa: PLC0415 (see above)

    return await server.of(settings, found)


def _routed_mtu(cluster: "cluster_node.Node | None") -> int:
    """The largest packet that goes to other nodes' pods, as far as it is known; 0: none goes there."""
    return 0 if cluster is None else cluster.routed_mtu


async def _begun(
    cluster: "cluster_node.Node | None", stack: contextlib.AsyncExitStack, children: host_children.Children
) -> None:
    if cluster is not None:
        await cluster.begin(stack, children)


def _has_streams(layout: node_config.Layout) -> bool:
    """Whether an earlier node's containers are there, running or not."""
    with contextlib.suppress(FileNotFoundError):
        return bool(os.listdir(os.path.join(layout.containerd_state, _STREAMS)))
    return False


async def _start(
    stack: contextlib.AsyncExitStack,
    children: host_children.Children,
    settings: node_config.Settings,
    layout: node_config.Layout,
    programs: containerd_child.Programs | None,
    found: Sequence[plugins.Plugin],
    routed_mtu: int,
    ready: Callable[[], Awaitable[None]],
) -> registries.Kept | None:
    """Start the node's own containerd, and have it reach registries as the node's file says; None: it has none."""
    if programs is None:
        return None
    containerd_child.remember(programs, layout)
    reached = await stack.enter_async_context(registries.kept(settings, layout))
    served_by = []
    for plugin in found:
        if plugin.is_ours:
            continue
        env = containerd_child.environment(programs)
        if plugin.proxy.name == containerd_config.STARGZ:
            env |= stargz.write(plugin, layout, reached.said)
            reached.followers.append(functools.partial(stargz.write_logins, plugin))
        served_by.append(snapshotter_child.program(plugin, layout, env))
    children.start(*served_by)
    configured = containerd_child.configured(
        settings,
        layout,
        programs,
        said=reached.said,
        routed_mtu=routed_mtu,
        ready=ready,
        waits_for=tuple(each.name for each in served_by),
    )
    children.start(await stack.enter_async_context(configured))
    return reached


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
    # (a cluster's node learns only later which network its pods have)
    if own and settings.pod_cidr:
        stack.enter_context(claims.pod_network(bridge, settings.pod_cidr))
    # Before there is anything else that would have to be taken away.
    known = marker.write(settings, layout, gc_roots, bridge_is_there=network.bridge_exists(bridge))
    if own:
        if settings.pod_cidr:
            claims.clear_gateway(bridge, settings.pod_cidr, ours=bridge in known.bridges)
        if bridge in known.bridges:
            stack.callback(network.remove_bridge, bridge)


def _store(found: Sequence[plugins.Plugin]) -> nix.DaemonStore | None:
    """The store behind our snapshotter; a node without it needs none."""
    if not any(each.is_ours for each in found):
        return None
    return nix.DaemonStore(nix.DaemonSettings.from_environment(os.environ))


def _gc_roots(store: nix.DaemonStore | None, found: Sequence[plugins.Plugin]) -> str:
    """The directory of the GC roots in a store; empty: there are none."""
    if store is None:
        return ""
    (root,) = (each.proxy.root for each in found if each.is_ours)
    return roots.of_snapshotter(store.settings.gcroots, root).directory


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
