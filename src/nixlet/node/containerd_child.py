"""The node's own containerd: its configuration written, started when our services listen, ready when CRI answers, kept running."""

import asyncio
import contextlib
import dataclasses
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping

from nixlet import errors
from nixlet.containerd import client, cni, cri, registries
from nixlet.containerd import config as containerd_config
from nixlet.host import files, supervisor, unixsocket
from nixlet.node import config as node_config
from nixlet.node import preflight, rendering

#: Seconds that containerd gets to answer; it recovers its pods before it does.
_READY_TIMEOUT = 60.0

#: Seconds for a containerd whose node was killed to be gone: the kernel ends it a moment after its node.
_GONE_TIMEOUT = 5.0

#: How often containerd is started again, by the setting's value.
_POLICIES = {
    "on-failure": supervisor.RestartPolicy(),
    "never": supervisor.RestartPolicy(tries=0),
}

_log = logging.getLogger("nixlet.node")


@dataclasses.dataclass(frozen=True, slots=True)
class Programs:
    """The programs that make up a node."""

    containerd: containerd_config.ContainerdProgram
    runc: str
    cni_bin_dir: str
    pause: str


async def find_programs(settings: node_config.Settings) -> Programs | None:
    """Look the programs up, and ask containerd what it speaks; None where somebody else's containerd is used.

    Raises:
        UnavailableError: One is missing.
    """
    if settings.container_runtime_endpoint:
        return None
    containerd = preflight.find_program(settings.containerd, package="containerd", setting="--containerd")
    preflight.find_shim(containerd)
    return Programs(
        containerd=await containerd_config.ask(containerd),
        runc=preflight.find_program(settings.runc, package="runc", setting="--runc"),
        cni_bin_dir=preflight.find_cni_plugins(settings.cni_bin_dirs),
        pause="" if settings.pause_image else _find_pause(settings),
    )


def _find_pause(settings: node_config.Settings) -> str:
    return preflight.find_program(settings.pause, package="catatonit", setting="--pause")


@contextlib.asynccontextmanager
async def kept_running(
    settings: node_config.Settings,
    layout: node_config.Layout,
    programs: Programs,
    runtime: cri.RuntimeClient,
    containerd: client.Containerd,
    *,
    said: registries.Registries,
    hastened: asyncio.Event | None = None,
    tell: Callable[[supervisor.Event], None] = lambda _: None,
) -> AsyncIterator[supervisor.KeptChild]:
    """Have containerd running and ready, and started again as the settings have it, for the time of the context.

    Args:
        settings: The node's settings.
        layout: Where things are.
        programs: What to start.
        runtime: CRI on that containerd.
        containerd: The rest of it.
        said: How registries are reached.
        hastened: Cuts the time short that containerd gets to end.
        tell: Learns of its deaths and starts.

    Raises:
        NixletError: It can't be started, or does not answer.
    """
    config = rendering.write(
        settings,
        layout,
        program=programs.containerd,
        runc=programs.runc,
        cni_bin_dir=programs.cni_bin_dir,
        said=said,
    )
    _write_network(settings, layout)
    await _wait_until_gone(layout.containerd_socket)
    argv = _command(settings, layout, programs, config)
    _log.info("starting containerd", extra={"command": argv})

    @contextlib.asynccontextmanager
    async def start() -> AsyncIterator[supervisor.SupervisedChild]:
        # A containerd that starts without its snapshotter takes every image for "not unpacked", and does not look again.
        if not unixsocket.is_served(layout.node_socket):
            raise errors.FailedPreconditionError(
                f"containerd can't start: nobody listens any more at {layout.node_socket}",
                hint="something removed the socket; restart the node",
            )
        async with supervisor.supervise(
            "containerd",
            argv,
            env=_environment(programs),
            log_path=layout.containerd_log,
            ready=lambda: cri.wait_until_served(runtime, containerd),
            ready_timeout=_READY_TIMEOUT,
            hastened=hastened,
        ) as child:
            yield child

    policy = _POLICIES[settings.containerd_restart]
    try:
        async with supervisor.kept_running("containerd", start, policy, tell=tell) as child:
            yield child
    finally:
        for socket in (layout.containerd_socket, f"{layout.containerd_socket}.ttrpc"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(socket)


def _write_network(settings: node_config.Settings, layout: node_config.Layout) -> None:
    conflist = cni.render(
        name=f"nixlet-{settings.bridge}",
        bridge=settings.bridge,
        pod_cidr=settings.pod_cidr,
        data_dir=layout.cni_data_dir,
    )
    files.write_atomically(os.path.join(layout.cni_conf_dir, cni.FILE_NAME), conflist)


async def _wait_until_gone(socket: str) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_GONE_TIMEOUT):
            while unixsocket.is_served(socket):
                await asyncio.sleep(0.05)
            return
    raise errors.FailedPreconditionError(
        f"another process serves the socket {socket}", hint="stop that containerd, or choose another --state-dir"
    )


def _command(settings: node_config.Settings, layout: node_config.Layout, programs: Programs, config: str) -> list[str]:
    # On the command line as well: a mistake in the file must not lead to the system's containerd.
    argv = [
        programs.containerd.path,
        f"--config={config}",
        f"--address={layout.containerd_socket}",
        f"--root={layout.containerd_root}",
        f"--state={layout.containerd_state}",
    ]
    level = os.environ.get("CONTAINERD_LOG_LEVEL") or ("debug" if settings.debug else "")
    return [*argv, f"--log-level={level}"] if level else argv


def environment_of(node: Mapping[str, str]) -> dict[str, str]:
    """containerd's environment in that of a node: CONTAINERD_HTTP_PROXY and the like are for containerd alone, as in k3s."""
    environment = {name: value for name, value in node.items() if not name.startswith("CONTAINERD_")}
    for name in node.keys() - environment.keys() - _NOT_HANDED_ON:
        environment[name.removeprefix("CONTAINERD_")] = node[name]
    return environment


def _environment(programs: Programs) -> dict[str, str]:
    environment = environment_of(os.environ)
    # Ours: systemd waits for the node's word, not for containerd's.
    for name in ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"):
        environment.pop(name, None)
    # The shim of the same build lies beside containerd; runc and the CNI plugins look for iptables on the path.
    directories = [os.path.dirname(programs.containerd.path), environment.get("PATH", os.defpath), "/usr/sbin", "/sbin"]
    environment["PATH"] = os.pathsep.join(directories)
    return environment


#: What these variables say is said otherwise, or is meant for containerd's clients.
_NOT_HANDED_ON = frozenset(
    {"CONTAINERD_LOG_LEVEL", "CONTAINERD_ADDRESS", "CONTAINERD_NAMESPACE", "CONTAINERD_SNAPSHOTTER"}
)
