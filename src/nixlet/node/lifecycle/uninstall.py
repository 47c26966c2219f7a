"""Taking a node away: its pods, mounts, network, state, data and GC roots; never the store, nor what others put there.

What the node wrote down about itself (``node/ownership/marker.py``) says what there is to take away. First in order, as a node that runs would do it
(so that containerd, runc and the CNI plugins give back what they took), then what is left by hand. No tree is deleted while the
mount table of any process shows something beneath it or bound from it.
"""

import asyncio
import contextlib
import dataclasses
import logging
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from nixlet import errors
from nixlet.containerd import cni, cri
from nixlet.containers import endings
from nixlet.host import files, iptables, logfiles, mounts, network
from nixlet.node.children import registries
from nixlet.node.cluster import traces
from nixlet.node.cluster.children import preparing
from nixlet.node.cluster.controlplane import deploying
from nixlet.node.cluster.network import podnetwork
from nixlet.node.cluster.preflight import kernel
from nixlet.node.images import preload
from nixlet.node.lifecycle import remains, server
from nixlet.node.ownership import marker, podtraces
from nixlet.node.requirements import plugins, preflight
from nixlet.node.settings import config as node_config
from nixlet.node.settings import names
from nixlet.rpc import channel as channels
from nixlet.store.daemon import client as nix

#: The settings by which a node is known; what it was started with holds.
_KNOWN_BY = ("state_dir", "bridge")

#: Seconds for the kernel to take away the interfaces of network namespaces that nobody has any more: it does so when it has time.
_INTERFACES_TIMEOUT = 5.0

_log = logging.getLogger("nixlet.uninstall")


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What would go, and what stays.

    Attributes:
        settings: The node's; None where it is a snapshotter alone.
        layouts: Its directories: one for each state directory that it had.
        trees: Directories and files that are deleted.
        emptied: Directories that are removed when nothing else is in them.
        bridges: The pods' bridges.
        kept: What stays, in words.
    """

    settings: node_config.Settings | None
    layouts: tuple[node_config.Layout, ...]
    trees: tuple[str, ...]
    emptied: tuple[str, ...]
    bridges: tuple[str, ...]
    kept: tuple[str, ...]


def plan(data_dir: str, said: dict[str, Any]) -> Plan:
    """What taking away the node of a data directory means.

    Args:
        data_dir: Its data directory.
        said: Settings that the person gave for this, by name.

    Raises:
        NotFoundError: There is none.
        FailedPreconditionError: It is another one than was said, or the store lies in what would be deleted.
    """
    known = _known(data_dir, "node", "--data-dir and --state-dir", os.path.join(data_dir, "nixlet.lock"))
    last = known.last_settings()
    for name in _KNOWN_BY:
        if name in said and said[name] != getattr(last, name):
            raise errors.FailedPreconditionError(
                f"the node at {data_dir} was started with {names.flag(name)} {getattr(last, name)}, not {said[name]}",
                hint="leave that flag out: the node knows what it made, and nothing else is taken away",
            )
    settings = dataclasses.replace(last, **said)
    layouts, kept = [], []
    for state_dir in known.state_dirs:
        if marker.is_of(state_dir, data_dir):
            layouts.append(node_config.Layout(data_dir, state_dir))
        elif os.path.isdir(state_dir) and os.listdir(state_dir):
            kept.append(f"{state_dir}, which is another program's by now")
    layout = node_config.Layout(data_dir, last.state_dir)
    # The log may have been sent to a terminal or to /dev/null.
    logs = [log + ending for log in known.logs for ending in ("", *(f".{n}" for n in range(1, logfiles.BACKUPS + 1)))]
    trees = [
        *(path for each in layouts for path in (each.containerd_state, each.runc_root, each.cni_data_dir)),
        *(
            path
            for each in layouts
            for path in (
                *(each.control_socket, each.health_socket, each.containerd_answers, each.rootlesskit_state),
                *(marker.path(each.state_dir), each.state_lock),
            )
        ),
        *(layout.containerd_root, layout.pods, layout.containerd_config, layout.crictl_config),
        os.path.join(layout.cni_conf_dir, cni.FILE_NAME),
        *registries.made_in(layout.certs_dir),
        *traces.trees(last, layouts),
        preload.cache_file(layout.images),
        *known.gc_roots,
        *filter(_is_plain_file, logs),
        marker.path(data_dir),
        layout.lock,
    ]
    present = tuple(tree for tree in trees if os.path.lexists(tree))
    _check_store(present)
    kept += (f"{path}, which is not the node's" for path in _others(layout, present))
    if traces.pods(last):
        kept.append("logs of pods that were removed less than a minute before, in /var/log/pods")
    if last.container_runtime_endpoint:
        kept.append(f"the pods and images of the containerd at {last.container_runtime_endpoint}")
    if switched_on := kernel.switched_on():
        kept.append(f"the kernel's {', '.join(switched_on)}, which others may rely on by now")
    # Parents behind what is in them.
    inside = sorted((path for path, _, _ in os.walk(layout.agent)), key=len, reverse=True)
    emptied = (
        *inside,
        preparing.kubelet_dir(settings),
        deploying.directory(layout),
        layout.server,
        *(each.state_dir for each in layouts),
        data_dir,
        *map(os.path.dirname, known.gc_roots),
    )
    return Plan(settings, tuple(layouts), present, emptied, known.bridges, (*kept, *_KEPT))


#: What is there in any case afterwards.
_KEPT = (
    "the store paths (nix-collect-garbage deletes what nothing else needs)",
    f"the configuration in {os.path.dirname(names.defaults(os.environ)['file'])}",
    "the programs: nixlet, containerd, runc, the CNI plugins, Nix",
)


#: What a snapshotter makes in its root.
_SNAPSHOTTERS = re.compile(r"lock|nixlet\.json|nixlet\.db.*|probe\.json|\.probe-.*|snapshots|spare|views|gcroots")


def plan_snapshotter(root: str) -> Plan:
    """What taking away a snapshotter means that stands alone.

    Raises:
        NotFoundError: There is none.
        FailedPreconditionError: The store lies in what would be deleted.
    """
    known = _known(root, "snapshotter", "--snapshotter-root", os.path.join(root, "lock"))
    made = [os.path.join(root, name) for name in sorted(os.listdir(root)) if _SNAPSHOTTERS.fullmatch(name)]
    present = tuple(path for path in (*made, *known.gc_roots, *known.sockets) if os.path.lexists(path))
    _check_store(present)
    records = "what its containerd knows of images and containers (ctr images rm, ctr containers rm)"
    others = (os.path.join(root, name) for name in sorted(os.listdir(root)) if not _SNAPSHOTTERS.fullmatch(name))
    kept = (*(f"{path}, which is not the snapshotter's" for path in others), records, *_KEPT)
    return Plan(None, (), present, (root, *map(os.path.dirname, known.gc_roots)), (), kept)


def _known(directory: str, kind: str, flags: str, lock: str) -> marker.Marker:
    known = marker.read(directory)
    if known is not None and known.kind == kind and os.path.realpath(known.data_dir) == os.path.realpath(directory):
        return known
    if known is not None and known.kind == kind:
        raise errors.FailedPreconditionError(
            f"{directory} was made at {known.data_dir} and copied or moved since then",
            hint="start it there once, so that it knows what is its own; a copy can be deleted as any directory",
        )
    if known is None and os.path.exists(lock):
        raise errors.FailedPreconditionError(
            f"the {kind} at {directory} is of a version that didn't write down what it made",
            hint="start it once more as it was started before, stop it, and try again",
        )
    raise errors.NotFoundError(f"there is no {kind} at {directory}", hint=f"say where it is: {flags}")


def _check_store(trees: Sequence[str]) -> None:
    nix_settings = nix.DaemonSettings.from_environment(os.environ)
    store = os.path.realpath(nix_settings.real_dir or nix_settings.store_dir)
    for tree in trees:
        if f"{store}/".startswith(f"{os.path.realpath(tree)}/"):
            raise errors.FailedPreconditionError(f"the Nix store {store} lies in {tree}, which would be deleted")


def _others(layout: node_config.Layout, trees: Sequence[str]) -> list[str]:
    """Files below the node's directory that it didn't make: archives, templates, drop-ins, installed programs."""
    found = []
    for path, directories, others in os.walk(layout.agent):
        directories[:] = [name for name in directories if os.path.join(path, name) not in trees]
        inside = (os.path.join(path, name) for name in sorted(others))
        # A link to a directory is what somebody put there, too.
        links = (os.path.join(path, name) for name in directories if os.path.islink(os.path.join(path, name)))
        found += [each for each in (*inside, *links) if each not in trees]
    return found


def _is_plain_file(path: str) -> bool:
    return os.path.isfile(path) and not os.path.islink(path)


async def uninstall(data_dir: str, said: dict[str, Any]) -> Plan:
    """Take the node of a data directory away; what went, and what stays.

    Args:
        data_dir: Its data directory.
        said: Settings that the person gave for this, by name.

    Raises:
        FailedPreconditionError: It is running, or something is mounted that is not ours; what was not taken away yet stays.
    """
    preflight.check_root()
    doomed, pods, uids = await _ended_in_order(data_dir, said, removed=True)
    with _locked(doomed):
        await _end_by_hand(doomed, pods, uids)
        remains.check_free(doomed.trees)
        await asyncio.to_thread(remains.remove, doomed.trees)
    _remove_emptied(doomed)
    return doomed


async def end_pods(data_dir: str, said: dict[str, Any]) -> None:
    """End all pods of the node of a data directory; its images, its data and what it knows of them stay, as after a power cut.

    Args:
        data_dir: Its data directory.
        said: Settings that the person gave for this, by name.

    Raises:
        FailedPreconditionError: It is running.
    """
    preflight.check_root()
    doomed, pods, uids = await _ended_in_order(data_dir, said, removed=False)
    with _locked(doomed):
        await _end_by_hand(doomed, pods, uids)


async def _ended_in_order(
    data_dir: str, said: dict[str, Any], *, removed: bool
) -> tuple[Plan, frozenset[str], frozenset[str]]:
    """End a node's pods as it would itself, as far as that works.

    Returns:
        What there is to take away; the pods that it had, by their sandboxes; those of its kubelet, by their UIDs.
    """
    doomed = plan(data_dir, said)
    settings = doomed.settings
    assert settings is not None
    layout = settings.layout
    # Before the pods' end: after it nothing knows them.
    pods, uids = podtraces.of_node(doomed.layouts), traces.pods(settings)
    try:
        with files.exclusive_lock(layout.lock, what=f"the data directory {layout.data_dir}"):
            pass
    except errors.FailedPreconditionError as error:
        raise errors.FailedPreconditionError(
            f"the node is running: {error.message}", hint="stop it first, as in: systemctl disable --now nixlet"
        ) from error
    if not settings.container_runtime_endpoint:
        await _in_order(settings, removed=removed)
    doomed = plan(data_dir, said)
    return doomed, pods | podtraces.of_node(doomed.layouts), uids


@contextlib.contextmanager
def _locked(doomed: Plan) -> Iterator[None]:
    """No node with these directories can start, for the time of the context."""
    with contextlib.ExitStack() as stack:
        assert doomed.settings is not None
        layout = doomed.settings.layout
        stack.enter_context(files.exclusive_lock(layout.lock, what=f"the data directory {layout.data_dir}"))
        for each in doomed.layouts:
            lock = files.exclusive_lock(each.state_lock, what=f"the state directory {each.state_dir}")
            stack.enter_context(lock)
        yield


async def _end_by_hand(doomed: Plan, pods: frozenset[str], uids: frozenset[str]) -> None:
    """End what is left of a node's pods: processes, mounts, rules, addresses, bridges."""
    settings = doomed.settings
    assert settings is not None
    layout = settings.layout
    for each in doomed.layouts:
        sockets = podtraces.shim_sockets(each)
        await remains.delete_containers(settings, each)
        await remains.end_shims(each)
        remains.remove(sockets)
        await remains.unmount(each.containerd_state)
        # Before what it shows is unmounted.
        for served in plugins.going_on(each):
            await remains.end_plugin(served)
    # (a directory of a plugin's may be a disk of somebody's, too)
    for plugin in podtraces.directories(layout.containerd_root):
        await remains.unmount(plugin)
    # A node that was killed leaves its own mount of this directory; what else is mounted there is somebody's.
    await remains.unmount(layout.pods, itself=True)
    # Volumes that its kubelet made, and its own mount of that directory.
    for path in traces.of_kubelet(settings):
        await remains.unmount(path)
    mounts.unbind(preparing.kubelet_dir(settings))
    await traces.remove_cgroups(settings, uids)
    await traces.remove_rules(settings)
    traces.put_settings_back(settings)
    remains.remove(traces.shared(uids))
    for pod in pods:
        await iptables.remove_rules(container=pod)
    remains.remove(podtraces.cni_results(pods))
    for bridge in doomed.bridges:
        await _remove_bridge(bridge)


async def _remove_bridge(name: str) -> None:
    """Remove a bridge as soon as the interfaces of pods that have ended are gone from it; one that somebody else uses stays."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _INTERFACES_TIMEOUT
    while not network.remove_bridge(name) and network.bridge_exists(name) and loop.time() < deadline:
        await asyncio.sleep(0.05)


async def uninstall_snapshotter(root: str) -> Plan:
    """Take a snapshotter away that stands alone; what went, and what stays.

    Raises:
        FailedPreconditionError: It is running, or containers that it made still are; what was not taken away yet stays.
    """
    preflight.check_root()
    doomed = plan_snapshotter(root)
    with files.exclusive_lock(os.path.join(root, "lock"), what=f"the snapshotter's root {root}"):
        # (roots of containers in user namespaces are mounted over what else is mounted here)
        for name in ("snapshots", "views"):
            await remains.unmount(os.path.join(root, name))
        remains.check_free(doomed.trees)
        await asyncio.to_thread(remains.remove, doomed.trees)
    _remove_emptied(doomed)
    return doomed


def _remove_emptied(doomed: Plan) -> None:
    for directory in doomed.emptied:
        with contextlib.suppress(OSError):
            os.rmdir(directory)


async def _in_order(settings: node_config.Settings, *, removed: bool) -> None:
    """Start the node once more, and let it end its pods, or remove them and its images."""
    layout = settings.layout
    quiet = dataclasses.replace(
        settings,
        health_address=node_config.NO_HEALTH,
        kubernetes="no",
        pod_cidr=podnetwork.remembered(layout) or settings.pod_cidr,
    )
    try:
        async with server.running(quiet), channels.connect(layout.containerd_socket) as channel:
            runtime = cri.RuntimeClient(channel, layout.containerd_socket)
            images = cri.ImageClient(channel, layout.containerd_socket)
            for sandbox in await runtime.sandboxes():
                with contextlib.suppress(errors.NixletError):
                    await endings.stop_sandbox(runtime, sandbox.id)
                    if removed:
                        await runtime.remove_sandbox(sandbox.id)
            for image in await images.images() if removed else ():
                with contextlib.suppress(errors.NixletError):
                    await images.remove(image.id)
    except errors.NixletError as error:
        _log.warning("the node can't be started once more; its pods are ended by hand: %s", error)
