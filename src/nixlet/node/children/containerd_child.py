"""The node's own containerd: its configuration written, and how it is started, found ready and kept running."""

import asyncio
import contextlib
import dataclasses
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

import msgspec

from nixlet import errors
from nixlet.containerd import cni, registries
from nixlet.containerd import config as containerd_config
from nixlet.encoding import unreadable
from nixlet.host import files, supervisor, unixsocket, userns
from nixlet.node.children import rendering
from nixlet.node.requirements import preflight, snapshotters
from nixlet.node.settings import config as node_config

#: What it is called among the node's children.
NAME = "containerd"

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


class _Asked(msgspec.Struct, frozen=True):
    """What a containerd said of itself, and what tells its program from others (and from itself after an update)."""

    program: tuple[str, int, int, int, int, int]
    version: str
    config_version: int


async def find_programs(settings: node_config.Settings, layout: node_config.Layout) -> Programs | None:
    """Look the programs up, and ask containerd what it speaks; None where somebody else's containerd is used.

    It is not asked again in one boot of the machine (``remember``): to start so large a program takes a twentieth of a second.

    Raises:
        UnavailableError: One is missing.
        UnsupportedError: containerd can't do what an ordinary user's node needs.
    """
    if settings.container_runtime_endpoint:
        return None
    containerd = preflight.find_program(settings.containerd, package="containerd", setting="--containerd")
    preflight.find_shim(containerd)
    asked = _remembered(containerd, layout) or await containerd_config.ask(containerd)
    if settings.snapshotter == containerd_config.NIX and userns.is_inside():
        snapshotters.check_binds(asked.version)
    return Programs(
        containerd=asked,
        runc=preflight.find_program(settings.runc, package="runc", setting="--runc"),
        cni_bin_dir=preflight.find_cni_plugins(settings.cni_bin_dirs),
        pause="" if settings.pause_image else _find_pause(settings),
    )


def remember(programs: Programs, layout: node_config.Layout) -> None:
    """Keep what containerd said of itself, for the next start; where that can't be, it is asked again."""
    asked = programs.containerd
    with contextlib.suppress(OSError, errors.NixletError):
        known = _Asked(_mark(asked.path), asked.version, asked.config_version)
        if _read(layout) != known:
            files.write_atomically(layout.containerd_answers, msgspec.json.encode(known), mode=0o600)


def _remembered(program: str, layout: node_config.Layout) -> containerd_config.ContainerdProgram | None:
    known = _read(layout)
    if known is None or known.program != _mark(program):
        return None
    return containerd_config.ContainerdProgram(program, known.version, known.config_version)


def _read(layout: node_config.Layout) -> _Asked | None:
    try:
        with open(layout.containerd_answers, "rb") as file:
            return msgspec.json.decode(file.read(), type=_Asked)
    except (OSError, *unreadable.JSON):
        return None


def _mark(program: str) -> tuple[str, int, int, int, int, int]:
    path = os.path.realpath(program)
    status = os.stat(path)
    return path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _find_pause(settings: node_config.Settings) -> str:
    return preflight.find_program(settings.pause, package="catatonit", setting="--pause")


@contextlib.asynccontextmanager
async def configured(
    settings: node_config.Settings,
    layout: node_config.Layout,
    programs: Programs,
    *,
    said: registries.Registries,
    routed_mtu: int,
    ready: Callable[[], Awaitable[object]],
    waits_for: tuple[str, ...] = (),
) -> AsyncIterator[supervisor.Program]:
    """Have all that containerd needs before it starts, until it has ended: the node's child, which is to run inside the context.

    Args:
        settings: The node's settings.
        layout: Where things are.
        programs: What to start.
        said: How registries are reached.
        routed_mtu: As for ``write_network``.
        ready: Returns when it answers.
        waits_for: The children that have to be ready before it starts.

    Raises:
        NixletError: It can't be configured.
    """
    config = rendering.write(
        settings,
        layout,
        program=programs.containerd,
        runc=programs.runc,
        cni_bin_dir=programs.cni_bin_dir,
        said=said,
    )
    write_network(settings, layout, routed_mtu)
    await _wait_until_gone(layout.containerd_socket)
    argv = _command(settings, layout, programs, config)
    _log.info("starting containerd", extra={"command": argv})

    def may_start() -> None:
        # A containerd that starts without its snapshotter takes every image for "not unpacked", and does not look again. At a
        # socket that listens its calls wait until they are served.
        if not unixsocket.is_served(layout.node_socket):
            raise errors.FailedPreconditionError(
                f"containerd can't start: nobody listens any more at {layout.node_socket}",
                hint="something removed the socket; restart the node",
            )

    try:
        yield supervisor.Program(
            name=NAME,
            argv=argv,
            env=environment(programs),
            log_path=layout.containerd_log,
            ready=ready,
            ready_timeout=_READY_TIMEOUT,
            waits_for=waits_for,
            may_start=may_start,
            restart=_POLICIES[settings.containerd_restart],
        )
    finally:
        for socket in (layout.containerd_socket, f"{layout.containerd_socket}.ttrpc"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(socket)


def network_name(settings: node_config.Settings) -> str:
    """What the network of pods is called by the plugins, and in their rules."""
    return f"nixlet-{settings.bridge}"


def write_network(settings: node_config.Settings, layout: node_config.Layout, routed_mtu: int) -> None:
    """Write the network of pods, of which containerd takes notice by itself; without one that is known pods wait.

    Args:
        settings: The node's.
        layout: Where things are.
        routed_mtu: As for ``cni.render``.
    """
    path = os.path.join(layout.cni_conf_dir, cni.FILE_NAME)
    if not settings.pod_cidr:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        return
    conflist = cni.render(
        name=network_name(settings),
        bridge=settings.bridge,
        pod_cidr=settings.pod_cidr,
        data_dir=layout.cni_data_dir,
        routed_mtu=routed_mtu,
    )
    files.write_atomically(path, conflist)


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


def environment(programs: Programs) -> dict[str, str]:
    """The environment of the node's containerd, and of a program that serves it snapshots."""
    found = environment_of(os.environ)
    # Ours: systemd waits for the node's word, not for containerd's.
    for name in ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"):
        found.pop(name, None)
    # The shim of the same build lies beside containerd; runc and the CNI plugins look for iptables on the path.
    directories = [os.path.dirname(programs.containerd.path), found.get("PATH", os.defpath), "/usr/sbin", "/sbin"]
    found["PATH"] = os.pathsep.join(directories)
    return found


#: What these variables say is said otherwise, or is meant for containerd's clients.
_NOT_HANDED_ON = frozenset(
    {"CONTAINERD_LOG_LEVEL", "CONTAINERD_ADDRESS", "CONTAINERD_NAMESPACE", "CONTAINERD_SNAPSHOTTER"}
)
