"""The node: what it is made of, and the order in which it starts and stops.

The snapshotter serves before containerd starts: a containerd that starts without it takes every image for "not unpacked" and does
not look again. On the way down containerd goes first. Pods go on without either; their shims hold them.
"""

import asyncio
import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import AsyncIterator

from nixlet import errors
from nixlet.containerd import cni, cri, imagestore
from nixlet.containerd import config as containerd_config
from nixlet.host import files, network, sdnotify, signals, supervisor
from nixlet.images import archive, loader, platforms
from nixlet.kube import player
from nixlet.node import config as node_config
from nixlet.node import pause, preflight, stand
from nixlet.rpc import channel as channels
from nixlet.rpc import server as rpc_server
from nixlet.services import node as node_service
from nixlet.store.daemon import client as nix

#: Seconds that containerd gets to answer; it recovers its pods before it does.
_READY_TIMEOUT = 60.0

_log = logging.getLogger("nixlet.node")


@dataclasses.dataclass(frozen=True, slots=True)
class _Programs:
    containerd: containerd_config.ContainerdProgram
    runc: str
    cni_bin_dir: str
    pause: str


async def run(settings: node_config.Settings) -> None:
    """Run a node until SIGTERM or SIGINT, which take it down in order and leave pods and snapshots alone.

    Raises:
        NixletError: It can't start, or containerd died.
    """
    stop = signals.stop_requested()
    async with running(settings.checked()) as containerd, sdnotify.Notifier(os.environ).ready():
        _log.info("the node is ready")
        dying = asyncio.create_task(containerd.died(), name="containerd died")
        stopping = asyncio.create_task(stop.wait(), name="signal")
        await asyncio.wait({dying, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if dying.done():
            raise dying.result()
        dying.cancel()
        _log.info("stopping; pods go on")


@contextlib.asynccontextmanager
async def running(settings: node_config.Settings) -> AsyncIterator[supervisor.SupervisedChild]:
    """A node that is ready for pods, for the time of the context; gives its containerd."""
    layout = node_config.Layout(settings.data_dir, settings.state_dir)
    nix_settings = nix.DaemonSettings.from_environment(os.environ)
    preflight.check_root()
    programs = await _find_programs(settings, nix_settings)
    async with contextlib.AsyncExitStack() as stack:
        _make_directories(layout)
        stack.enter_context(files.exclusive_lock(layout.lock, what=f"the data directory {layout.data_dir}"))
        stack.callback(network.remove_bridge, settings.bridge)
        children: list[node_service.ChildStatus] = []
        status = node_service.NodeStatus(
            snapshotter=settings.snapshotter,
            data_dir=layout.data_dir,
            state_dir=layout.state_dir,
            containerd_address=layout.containerd_socket,
            containerd_config_version=programs.containerd.config_version,
            pod_log_dir=layout.pods,
        )
        own_services: list[node_service.NodeService] = []

        def own_service(stood: stand.Stand) -> list[node_service.NodeService]:
            release = functools.partial(player.stop_sandbox, stood.runtime)
            own_services.append(
                node_service.NodeService(status, lambda: children, stood.board, stood.snapshotter, release)
            )
            return own_services

        place = stand.Place(
            root=layout.snapshotter_root,
            socket=layout.node_socket,
            containerd_socket=layout.containerd_socket,
            snapshotter=settings.snapshotter,
            archive_dirs=node_config.archive_dirs(settings, layout),
        )
        store = nix.DaemonStore(nix_settings)
        stood = await stand.stand(stack, place, store, nix_settings.gcroots, own_service)
        child = await stack.enter_async_context(_containerd(settings, layout, programs, stood.runtime))
        # The probe ran beside containerd's start.
        await stood.snapshotter.strategy()
        stand.check_mount_namespace(layout.containerd_socket)
        # Before containerd goes: what is being given back needs it.
        stack.push_async_callback(own_services[0].close)
        await _load_pause_image(programs.pause, layout, stood.containerd, settings.snapshotter)
        sandboxes = await stood.runtime.sandboxes()
        await asyncio.to_thread(
            player.sweep_pod_directories, layout.pods, {sandbox.metadata.uid for sandbox in sandboxes}
        )
        # Only a node that is ready says what its children are: that is how the command line tells.
        children.append(node_service.ChildStatus("containerd", child.pid, programs.containerd.version))
        yield child


async def _find_programs(settings: node_config.Settings, nix_settings: nix.DaemonSettings) -> _Programs:
    preflight.check_nix(nix_settings.stdio[0], nix_settings.socket)
    containerd = preflight.find_program(settings.containerd, package="containerd", setting="--containerd")
    return _Programs(
        containerd=await containerd_config.ask(containerd),
        runc=preflight.find_program(settings.runc, package="runc", setting="--runc"),
        cni_bin_dir=preflight.find_cni_plugins(settings.cni_bin_dirs),
        pause=preflight.find_program(settings.pause, package="catatonit", setting="--pause"),
    )


def _make_directories(layout: node_config.Layout) -> None:
    for directory in (layout.state_dir, layout.containerd_state, layout.runc_root, layout.cni_data_dir):
        files.make_directory(directory, mode=0o711)
    for directory in (layout.data_dir, layout.agent, layout.containerd_root, layout.opt, layout.images, layout.pods):
        files.make_directory(directory, mode=0o711)
    for file in (layout.containerd_config, os.path.join(layout.cni_conf_dir, cni.FILE_NAME)):
        files.make_directory(os.path.dirname(file))


@contextlib.asynccontextmanager
async def _containerd(
    settings: node_config.Settings, layout: node_config.Layout, programs: _Programs, runtime: cri.RuntimeClient
) -> AsyncIterator[supervisor.SupervisedChild]:
    rendered = containerd_config.render(
        containerd_config.ContainerdSettings(
            version=programs.containerd.config_version,
            root=layout.containerd_root,
            state=layout.containerd_state,
            address=layout.containerd_socket,
            opt_dir=layout.opt,
            snapshotter=settings.snapshotter,
            snapshotter_address=layout.node_socket,
            snapshotter_root=layout.snapshotter_root,
            sandbox_image=pause.REFERENCE,
            cni_bin_dir=programs.cni_bin_dir,
            cni_conf_dir=layout.cni_conf_dir,
            runc=programs.runc,
            runc_root=layout.runc_root,
            nri_socket=layout.nri_socket,
            restrict_oom_score_adj=preflight.lacks_sys_resource(),
            architecture=platforms.host_platform().architecture,
        )
    )
    files.write_atomically(layout.containerd_config, rendered)
    conflist = cni.render(
        name=f"nixlet-{settings.bridge}",
        bridge=settings.bridge,
        pod_cidr=settings.pod_cidr,
        data_dir=layout.cni_data_dir,
    )
    files.write_atomically(os.path.join(layout.cni_conf_dir, cni.FILE_NAME), conflist)
    if rpc_server.is_served(layout.containerd_socket):
        raise errors.FailedPreconditionError(
            f"another process serves the socket {layout.containerd_socket}",
            hint="stop that containerd, or choose another --state-dir",
        )
    # On the command line as well: a mistake in the file must not lead to the system's containerd.
    argv = [
        programs.containerd.path,
        f"--config={layout.containerd_config}",
        f"--address={layout.containerd_socket}",
        f"--root={layout.containerd_root}",
        f"--state={layout.containerd_state}",
    ]
    if settings.debug:
        argv.append("--log-level=debug")
    environment = dict(os.environ)
    # Ours: systemd waits for the node's word, not for containerd's.
    environment.pop("NOTIFY_SOCKET", None)
    # The shim of the same build lies beside containerd; runc and the CNI plugins look for iptables on the path.
    directories = [os.path.dirname(programs.containerd.path), environment.get("PATH", os.defpath), "/usr/sbin", "/sbin"]
    environment["PATH"] = os.pathsep.join(directories)
    async with supervisor.supervise(
        "containerd",
        argv,
        env=environment,
        log_path=layout.containerd_log,
        ready=lambda: channels.wait_until_answered(runtime.version),
        ready_timeout=_READY_TIMEOUT,
    ) as child:
        yield child
    for socket in (layout.containerd_socket, f"{layout.containerd_socket}.ttrpc"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(socket)


async def _load_pause_image(
    program: str, layout: node_config.Layout, containerd: imagestore.ImageStore, snapshotter: str
) -> None:
    with pause.image_archive(program, layout.images) as path, archive.open_archive(path) as source:
        image = source.image(platforms.host_platform())
        await loader.Loader(containerd, snapshotter).load(source, image, pause.REFERENCE, labels=loader.PINNED)
