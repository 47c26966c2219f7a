"""What containerd calls a proxy plugin: the snapshotter, and the CRI image service, on a socket beside any containerd."""

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import Mapping, Sequence

from nixlet import errors
from nixlet.containerd import cri, forwarding, handlers, imagestore
from nixlet.host import files, mounts, unixsocket
from nixlet.images import closurecheck, loader, opening, pulllog, pulls, readiness, recorded, registrypulls
from nixlet.node.serving import listeners
from nixlet.rpc import channel as channels
from nixlet.rpc import server as rpc_server
from nixlet.services import images as images_service
from nixlet.services import relay
from nixlet.services import snapshots as snapshots_service
from nixlet.snapshots import faults, model
from nixlet.snapshots import snapshotter as snapshotter_module
from nixlet.store import interface, policy, realiser, roots
from nixlet.telemetry import metrics

#: Seconds for an image service in front of containerd's to answer.
_FRONT_TIMEOUT = 60.0

#: The file by which a root of the Go nix-snapshotter is recognised: containerd's metastore in bbolt.
_GO_DATABASE = "metadata.db"


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a node's socket and its snapshotter are, and whose they are.

    Attributes:
        root: Its directory.
        socket: Where it serves.
        containerd_socket: The containerd that it serves; it need not be there yet.
        snapshotter: What that containerd calls it.
        archive_dirs: Where ``nix:0`` references may name archives outside the store.
        serve_images: Whether the CRI image service is served, too.
        strategy: How containers get to see closures: "auto", "view" or "bind".
        overlay: Who makes containers' roots.
        unsigned_paths: Whether images may name store paths that nobody vouches for: "allow" or "deny".
        image_service_socket: Another CRI image service, which gets all calls that don't concern ``nix:0`` references;
            empty: containerd's.
        pulls_through: A CRI image service in front of containerd's own, by which it is asked for images; empty: none.
        scratch_dir: Where compressed archives are expanded; empty: in ``root``.
        rootlesskit_api: The socket of rootlesskit's API, which leads the machine's ports to pods; empty: they are in its network.
    """

    root: str
    socket: str
    containerd_socket: str
    snapshotter: str
    archive_dirs: Sequence[str]
    serve_images: bool = True
    strategy: str = "auto"
    overlay: model.Overlay = model.Overlay.KERNEL
    unsigned_paths: policy.UnsignedPaths = "allow"
    image_service_socket: str = ""
    pulls_through: str = ""
    scratch_dir: str = ""
    rootlesskit_api: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Served:
    """What is served, and the ways to containerd.

    Attributes:
        snapshotter: Ours; None where containerd's own is used.
        others: Gets the calls of the image service that are not ours.
        front: The image service in front of containerd's by which it is asked; None: it is asked itself.
        listing: Tells which images there are.
    """

    snapshotter: snapshotter_module.Snapshotter | None
    channel: channels.Channel
    containerd: imagestore.ImageStore
    loader: loader.Loader
    runtime: cri.RuntimeClient
    images: cri.ImageClient
    opener: opening.Opener
    exchange: pulls.Exchange
    remarks: images_service.Remarks
    others: relay.Relay
    listing: images_service.Listing
    front: cri.ImageClient | None = None

    async def front_answers(self) -> None:
        """Wait until what is in front of containerd's image service has found it, where there is such a one.

        Raises:
            UnavailableError: It doesn't.
        """
        if self.front is None:
            return
        try:
            async with asyncio.timeout(_FRONT_TIMEOUT):
                await channels.wait_until_answered(self.front.images)
        except TimeoutError as error:
            raise errors.UnavailableError(
                f"the snapshotter's image service does not answer within {_FRONT_TIMEOUT:g} s, although containerd does",
                hint="see the snapshotter's log, beside containerd's",
            ) from error


async def serve(
    stack: contextlib.AsyncExitStack,
    place: Place,
    store: interface.Store,
    gc_roots: roots.Roots,
    observed: metrics.NodeMetrics | None = None,
    accepting: rpc_server.Server | None = None,
) -> Served:
    """Start the snapshotter, which puts its state in order, and serve it, until ``stack`` is left.

    Args:
        stack: Owns all that is made here.
        place: Where.
        store: The store behind it.
        gc_roots: Keeps what it needs in the store.
        observed: Counts what happens.
        accepting: The server, where it takes connections already; None: it does when all is in order.

    Raises:
        FailedPreconditionError: The root belongs to another process or program, or the socket is served already.
    """
    observed = observed or metrics.NodeMetrics()
    check_owner(place.root)
    files.make_directory(place.root, mode=0o700)
    stack.enter_context(
        files.exclusive_lock(os.path.join(place.root, "lock"), what=f"the snapshotter's root {place.root}")
    )
    await asyncio.to_thread(_ensure_store, store)
    await stack.enter_async_context(store.keeping())
    bringer = realiser.Realiser(
        store,
        policy.Policy(place.unsigned_paths),
        observe=lambda took: observed.realised(took.fetched_paths, took.fetched_bytes),
    )
    made = await _connected(stack, place, bringer)
    snapshotter = snapshotter_module.Snapshotter(
        place.root,
        store_dir=store.store_dir,
        real_store_dir=store.real_dir,
        realise=bringer,
        gc_roots=gc_roots,
        strategy=place.strategy,
        overlay=place.overlay,
        check_targets=made.containerd.check_mount_targets,
        faults=faults.Faults(os.environ.get("NIXLET_FAULT_POINT", "")),
    )
    # Views are mounted again when a container needs them, and running containers hold their own: none stays mounted
    # for nothing when the snapshotter goes.
    stack.callback(snapshotter.unmount_views)
    stack.push_async_callback(snapshotter.close)
    # Before the socket is served: nobody may ask a snapshotter that has not yet put its house in order.
    await snapshotter.start()
    _observe_snapshots(observed, snapshotter)
    made = dataclasses.replace(made, snapshotter=snapshotter)
    puller = pulls.Puller(
        store,
        bringer,
        made.containerd,
        made.loader,
        made.images,
        made.opener,
        archive_dirs=place.archive_dirs,
        exchange=made.exchange,
    )
    services = [snapshots_service.SnapshotsService(snapshotter)]
    check = closurecheck.ClosureCheck(place.snapshotter, bringer)
    for_paths = images_service.ForPaths(
        registrypulls.RegistryPulls(made.containerd, check),
        readiness.Readiness(made.containerd, place.snapshotter, check, made.loader, store.store_dir),
        handlers.Handlers(made.runtime, place.snapshotter),
    )
    records = recorded.Recorded(made.containerd, store.store_dir)
    stack.enter_context(made.exchange.subscribed(pulllog.PullLog().take))
    await _listen(stack, place, made, services, puller, records, observed, accepting, for_paths)
    return made


async def serve_without_snapshotter(
    stack: contextlib.AsyncExitStack,
    place: Place,
    observed: metrics.NodeMetrics,
    accepting: rpc_server.Server,
) -> Served:
    """Serve what a node with a snapshotter of containerd's own has: no snapshots, and images as containerd gives them.

    Raises:
        FailedPreconditionError: The socket is served already.
    """
    made = await _connected(stack, place)
    puller, records = images_service.NoNix(place.snapshotter), recorded.Recorded(made.containerd)
    await _listen(stack, place, made, [], puller, records, observed, accepting)
    return made


async def _connected(
    stack: contextlib.AsyncExitStack, place: Place, bringer: realiser.Realiser | None = None
) -> Served:
    """The ways to containerd, which needs not be there yet."""
    channel = await stack.enter_async_context(channels.connect(place.containerd_socket))
    address, api = place.containerd_socket, place.rootlesskit_api
    runtime = forwarding.Runtime(channel, address, api) if api else cri.RuntimeClient(channel, address)
    containerd, images = imagestore.ImageStore(channel, address), cri.ImageClient(channel, address)
    others, front = relay.Relay(channel, f"containerd at {address}"), None
    listing = images_service.Listing(images, containerd.untold_pins)
    if other := place.image_service_socket or place.pulls_through:
        to_other = await stack.enter_async_context(channels.connect(other))
        others = relay.Relay(to_other, f"the image service at {other}")
        if place.image_service_socket:
            listing = images_service.Listing(cri.ImageClient(to_other, other))
        else:
            front = cri.ImageClient(to_other, other)
    return Served(
        None,
        channel,
        containerd,
        loader.Loader(containerd, place.snapshotter, bringer),
        runtime,
        images,
        opening.Opener(place.scratch_dir or place.root),
        pulls.Exchange(),
        images_service.Remarks(),
        others,
        listing,
        front,
    )


async def _listen(
    stack: contextlib.AsyncExitStack,
    place: Place,
    made: Served,
    services: Sequence[rpc_server.Servable],
    puller: images_service.NixPuller,
    records: recorded.Recorded,
    observed: metrics.NodeMetrics,
    accepting: rpc_server.Server | None,
    for_paths: images_service.ForPaths | None = None,
) -> None:
    fallback = None
    if place.serve_images:
        fallback = images_service.ImageService(
            made.others, puller, records, made.images, observed, made.listing, made.remarks, for_paths
        ).answer
    if accepting is None:
        sock = listeners.listen(stack, place.socket)
        accepting = await stack.enter_async_context(rpc_server.accepting(sock))
    await stack.enter_async_context(accepting.answering(services, fallback=fallback, observe=observed.rpc.observe))


def _observe_snapshots(observed: metrics.NodeMetrics, snapshotter: snapshotter_module.Snapshotter) -> None:
    def snapshots() -> Mapping[metrics.Labels, float]:
        return {(kind.name.lower(),): count for kind, count in snapshotter.counts().items()}

    def roots_made() -> Mapping[metrics.Labels, float]:
        return {(strategy,): count for strategy, count in snapshotter.roots_made.items()}

    observed.registry.add(
        metrics.Gauge("nixlet_snapshots", "Snapshots that there are.", snapshots, ("kind",)),
        metrics.CounterOf(
            "nixlet_snapshot_mounts_total", "Answers to Prepare, View and Mounts.", roots_made, ("strategy",)
        ),
    )


def check_mount_namespace(containerd_socket: str) -> None:
    """Check that containerd sees the mounts that we make.

    Raises:
        UnavailableError: containerd isn't there.
        FailedPreconditionError: It is in another mount namespace, where views would be missing.
    """
    pid = unixsocket.peer_of(containerd_socket)
    with contextlib.suppress(OSError):
        if not mounts.shares_namespace(pid):
            raise errors.FailedPreconditionError(
                f"containerd (process {pid}) is in another mount namespace than nixlet and won't see its views",
                hint="remove options such as PrivateMounts=, PrivateTmp= and ProtectSystem= from both services",
            )


def check_owner(root: str) -> None:
    """Check that a snapshotter's root is not the Go program's.

    Raises:
        FailedPreconditionError: It is.
    """
    if os.path.exists(os.path.join(root, _GO_DATABASE)):
        raise errors.FailedPreconditionError(
            f"{root} belongs to the Go nix-snapshotter (it has a {_GO_DATABASE})",
            hint="remove that snapshotter's images and containers and then the directory, or choose another root",
        )


def _ensure_store(store: interface.Store) -> None:
    """The store's directory, which Nix makes with its first path, is the lower layer of every view."""
    try:
        files.new_directories(store.real_dir, mode=0o1775)
    except OSError as error:
        raise errors.UnavailableError(
            f"there is no Nix store at {store.real_dir}, and it can't be made: {error.strerror}"
        ) from error
