"""All that a node needs of its host, as a list of checks: start-up warns by it, and ``nixlet doctor`` prints it whole.

What start-up refuses to go on without is checked by the very functions that refuse, so that both say the same.
"""

import asyncio
import contextlib
import inspect
import logging
import os
import re
import socket

from nixlet import errors
from nixlet.containerd import config as containerd_config
from nixlet.containerd import cri, imagestore
from nixlet.host import files, process
from nixlet.node import config as node_config
from nixlet.node import hostchecks, preflight, snapshotters, stand
from nixlet.node.findings import Check, Finding, Found, Line, Subject
from nixlet.rpc import channel as channels
from nixlet.rpc import server as rpc_server
from nixlet.rpc.gen import node_grpc, node_pb2
from nixlet.snapshots import probe
from nixlet.store.daemon import client as nix

#: The versions of containerd that the tests run with, or lie between those.
_SUPPORTED = ((1, 6), (1, 7), (2, 0), (2, 1), (2, 2), (2, 3), (2, 4))

#: From these on a proxy plugin's exports are read, by the first number.
_EXPORTS = {(1, 6): (1, 6, 38), (1, 7): (1, 7, 20)}

#: Seconds that a node or a containerd gets to say what it is.
_ANSWER_TIMEOUT = 5.0

_NOT_ROOT = "only root can look at this"
_AS_ROOT = "run it as root: sudo nixlet doctor"

_log = logging.getLogger("nixlet.node")


async def examine(settings: node_config.Settings, layout: node_config.Layout) -> list[Line]:
    """Look at everything that a node of these settings needs; it may be running."""
    subject = Subject(settings, layout, await running_node(layout))
    found: list[Line] = []
    for check in CHECKS:
        found.extend(await _lines(check, subject))
    return found


async def warn(settings: node_config.Settings, layout: node_config.Layout) -> None:
    """Log what isn't as it should be, as far as that is quickly seen; for a node that starts."""
    subject = Subject(settings, layout)
    for check in CHECKS:
        for line in await _lines(check, subject) if check.at_start else ():
            if line.status != "ok":
                _log.warning("%s: %s", line.name, line.evidence, extra={"hint": line.remedy})


async def running_node(layout: node_config.Layout) -> node_pb2.StatusResponse | None:
    """What the node at these places says of itself; None: none runs there, or it is another's."""
    if not rpc_server.is_served(layout.node_socket):
        return None
    with contextlib.suppress(errors.NixletError):
        async with channels.connect(layout.node_socket) as channel:
            with channels.translated(f"the node at {layout.node_socket}"):
                request = node_pb2.StatusRequest()
                answer = await node_grpc.NodeStub(channel).Status(request, timeout=_ANSWER_TIMEOUT)
        return answer if answer.data_dir == layout.data_dir else None
    return None


async def _lines(check: Check, subject: Subject) -> list[Line]:
    found = await _look(check, subject)
    several = [found] if isinstance(found, Finding) else list(found or ())
    return [Line(check.group, each.name or check.name, each.status, each.evidence, each.remedy) for each in several]


async def _look(check: Check, subject: Subject) -> Found:
    is_root = os.geteuid() == 0
    if check.needs_root and not is_root:
        return Finding("unknown", _NOT_ROOT, _AS_ROOT)
    try:
        found = check.look(subject)
        return await found if inspect.isawaitable(found) else found
    except errors.PermissionDeniedError as error:
        return Finding("missing" if is_root else "unknown", error.message, error.hint)
    except errors.NixletError as error:
        return Finding("missing", error.message, error.hint)
    except PermissionError as error:
        what = f"{error.filename or check.name} can't be looked at: {error.strerror}"
        return Finding("missing" if is_root else "unknown", what, "" if is_root else _AS_ROOT)


# Programs.


def _root_rights(_: Subject) -> Finding:
    preflight.check_root()
    return Finding("ok", "we may mount (CAP_SYS_ADMIN)")


def _containerd_program(subject: Subject) -> str:
    return preflight.find_program(subject.settings.containerd, package="containerd", setting="--containerd")


def _containerd(subject: Subject) -> Finding | None:
    return Finding("ok", _containerd_program(subject)) if subject.has_own_containerd else None


def _shim(subject: Subject) -> Finding | None:
    if not subject.has_own_containerd:
        return None
    return Finding("ok", preflight.find_shim(_containerd_program(subject)))


async def _runc(subject: Subject) -> Finding | None:
    if not subject.has_own_containerd:
        return None
    program = preflight.find_program(subject.settings.runc, package="runc", setting="--runc")
    printed = (
        (await process.run([program, "--version"], timeout=_ANSWER_TIMEOUT)).check().stdout.decode(errors="replace")
    )
    return Finding("ok", f"{program} ({printed.partition(chr(10))[0]})")


def _pause(subject: Subject) -> Finding | None:
    if not subject.has_own_containerd or subject.settings.pause_image:
        return None
    program = preflight.find_program(subject.settings.pause, package="catatonit", setting="--pause")
    preflight.check_static(program)
    return Finding("ok", f"{program}, static")


def _cni_plugins(subject: Subject) -> Finding | None:
    if not subject.has_own_containerd:
        return None
    return Finding("ok", preflight.find_cni_plugins(subject.settings.cni_bin_dirs))


def _setpriv(_: Subject) -> Finding:
    return Finding("ok", preflight.find_program("setpriv", package="util-linux", setting="PATH"))


# Nix.


def _store(subject: Subject) -> nix.DaemonStore | None:
    if subject.settings.snapshotter != snapshotters.NIX:
        return None
    return nix.DaemonStore(nix.DaemonSettings.from_environment(os.environ))


def _nix_store(subject: Subject) -> Finding | None:
    if subject.settings.snapshotter != snapshotters.NIX:
        return None
    return Finding("ok", snapshotters.find_nix_store())


async def _store_answers(subject: Subject) -> Finding | None:
    store = _store(subject)
    if store is None:
        return None
    preflight.check_nix(store.settings.stdio[0], store.settings.socket)
    version = await snapshotters.check_store(store)
    who = "the daemon at " + store.settings.socket
    if not rpc_server.is_served(store.settings.socket):
        who = (
            f"{' '.join(store.settings.stdio)}, started for the purpose since no daemon serves {store.settings.socket},"
        )
    return Finding("ok", f"{who} answers for {store.store_dir}" + (f" (Nix {version})" if version else ""))


def _gc_roots(subject: Subject) -> Finding | None:
    store = _store(subject)
    if store is None:
        return None
    at = preflight.existing(store.settings.gcroots)
    if not os.access(at, os.W_OK):
        raise errors.PermissionDeniedError(
            f"GC roots can't be made: {at} can't be written",
            hint="mount Nix's state directory writable, or set NIX_STATE_DIR",
        )
    return Finding("ok", store.settings.gcroots)


# containerd.


async def _containerd_version(subject: Subject) -> list[Finding]:
    address = subject.settings.container_runtime_endpoint
    if address:
        version, evidence = await _others_containerd(address)
    else:
        program = await containerd_config.ask(_containerd_program(subject))
        version = program.version
        evidence = f"containerd {version} with configuration version {program.config_version}"
    numbers = tuple(map(int, re.findall(r"\d+", version)[:3]))
    found = Finding("ok", evidence)
    if numbers[:2] not in _SUPPORTED:
        known = ", ".join(f"{major}.{minor}" for major, minor in _SUPPORTED)
        found = Finding("warning", f"{evidence}: nixlet is tested with {known}", "use one of these")
    return [found, *(_troubles(numbers, subject) if subject.settings.snapshotter == snapshotters.NIX else ())]


async def _others_containerd(address: str) -> tuple[str, str]:
    pid = rpc_server.peer_of(address)
    async with channels.connect(address) as channel:
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT):
                await cri.RuntimeClient(channel, address).version()
                version = (await imagestore.ImageStore(channel, address).version()).removeprefix("v")
        except TimeoutError as error:
            raise errors.UnavailableError(
                f"the containerd at {address} does not answer within {_ANSWER_TIMEOUT:g} s", hint="restart it"
            ) from error
    stand.check_mount_namespace(address)
    return version, f"containerd {version} serves {address} (process {pid})"


def _troubles(version: tuple[int, ...], subject: Subject) -> list[Finding]:
    """What is known to be awkward about a version of containerd, with what that means here."""
    found = []
    if version < _EXPORTS.get(version[:2], (1, 7)):
        found.append(
            Finding(
                "warning",
                "this containerd passes over what a proxy plugin exports: CRI names a directory that doesn't exist as the"
                " images' file system, so that a kubelet's image collection and eviction fail",
                "use containerd 1.7.20 or later",
                "image file system",
            )
        )
    if version < (1, 7):
        found += [
            Finding(
                "missing" if subject.settings.strategy == "bind" else "warning",
                "containerd 1.6 drops the targets of mounts: containers are refused under the strategy bind",
                "use containerd 1.7 or later, or the strategy view",
                "bind mounts",
            ),
            Finding(
                "warning",
                "containerd 1.6 passes over remap-ids: for a pod in a user namespace it would change the owner of, and so"
                " copy, every file of the closure",
                "use containerd 1.7 or later for pods in user namespaces",
                "user namespaces",
            ),
        ]
    else:
        own = subject.has_own_containerd
        found.append(
            Finding(
                "ok",
                f"{'the' if own else 'give it a'} proxy plugin with the capability remap-ids, without which a pod in a user"
                " namespace has every file of its closure copied to change the owner",
                name="user namespaces",
            )
        )
    if (2, 1) <= version[:2] <= (2, 3):
        found.append(
            Finding(
                "ok",
                "CreateContainer takes an image that it can't resolve for a checkpoint; nixlet gives images names that it resolves",
                name="image names",
            )
        )
    if version >= (2, 3):
        found.append(
            Finding(
                "ok",
                "bind mounts need targets of their sources' kind; nixlet binds directories only, and onto directories",
                name="bind mounts",
            )
        )
    return found


# Sockets, and the lock.


def _lock(subject: Subject) -> Finding:
    layout = subject.layout
    holder = preflight.lock_holder(layout.lock)
    if subject.running is not None:
        return Finding("ok", f"the node holds {layout.lock} (process {subject.running.pid})")
    if holder is not None:
        # It says who; and should that one be gone by now, nothing is wrong.
        with files.exclusive_lock(layout.lock, what=f"the data directory {layout.data_dir}"):
            pass
    return Finding("ok", f"nobody uses {layout.data_dir}")


def _node_socket(subject: Subject) -> Finding:
    path, running = subject.layout.node_socket, subject.running
    if running is not None:
        return Finding("ok", f"the node serves {path} (process {running.pid}, nixlet {running.version})")
    preflight.check_free_socket(path)
    return Finding("ok", f"nobody serves {path}")


def _containerd_socket(subject: Subject) -> Finding | None:
    path = subject.layout.containerd_socket
    if not subject.has_own_containerd:
        return None
    if subject.running is None:
        preflight.check_free_socket(path)
        return Finding("ok", f"nobody serves {path}")
    for child in subject.running.children:
        if child.name == "containerd":
            return Finding("ok", f"the node's containerd {child.version} serves {path} (process {child.pid})")
    return Finding("warning", "the node runs, and its containerd does not yet", f"see {subject.layout.containerd_log}")


def _health_address(subject: Subject) -> Finding | None:
    address = subject.settings.health_address or subject.layout.health_socket
    if address == node_config.NO_HEALTH:
        return None
    if subject.running is not None:
        return Finding("ok", f"the node serves {address}")
    if address.startswith("/"):
        preflight.check_free_socket(address)
        return Finding("ok", f"nobody serves {address}")
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, int(port)))
        except OSError as error:
            raise errors.FailedPreconditionError(
                f"can't listen on {address}: {error.strerror}", hint="choose another address: --health-address"
            ) from error
    return Finding("ok", f"nobody serves {address}")


# Mounts.


async def _snapshotter(subject: Subject) -> Finding:
    settings, layout = subject.settings, subject.layout
    await snapshotters.check_supported(settings, layout, _store(subject))
    name = f"snapshotter {settings.snapshotter}"
    if settings.snapshotter in {snapshotters.NIX, "overlayfs"} and (
        subject.has_own_containerd or settings.snapshotter == snapshotters.NIX
    ):
        at = preflight.file_system(preflight.existing(layout.containerd_root))
        return Finding("ok", f"{name}: an overlay was mounted below {layout.containerd_root} ({at})")
    return Finding("ok", f"{name}: containerd's own")


async def _strategy(subject: Subject) -> Finding | None:
    store = _store(subject)
    if store is None:
        return None
    if not os.path.isdir(store.real_dir):
        return Finding("warning", f"not tried: there is no {store.real_dir} yet", "have Nix make a store path first")
    root = subject.layout.snapshotter_root
    fresh = not os.path.isdir(root)
    with preflight.present(root):
        try:
            chosen = await probe.choose(subject.settings.strategy, root, store.real_dir)
            found = await probe.findings(root, store.real_dir)
        finally:
            # The probe keeps its findings in the directory, which is not to stay.
            for name in os.listdir(root) if fresh else ():
                os.unlink(os.path.join(root, name))
    others = [f"{name}: {reason or 'would work, too'}" for name, reason in found.items() if name != chosen.value]
    return Finding("ok", "; ".join([f"{chosen.value} works", *others]))


#: The checks in the order in which they are printed.
CHECKS = (
    Check("binaries", "root rights", _root_rights),
    Check("binaries", "containerd", _containerd),
    Check("binaries", "containerd-shim-runc-v2", _shim, at_start=True),
    Check("binaries", "runc", _runc),
    Check("binaries", "pause", _pause, at_start=True),
    Check("binaries", "CNI plugins", _cni_plugins),
    Check("binaries", "setpriv", _setpriv),
    Check("kernel", "overlay", hostchecks.overlay),
    Check("kernel", "namespaces", hostchecks.namespaces, at_start=True),
    Check("kernel", "seccomp", hostchecks.seccomp),
    Check("cgroups", "version", hostchecks.cgroup_layout),
    Check("cgroups", "controllers", hostchecks.cgroup_controllers, at_start=True),
    Check("limits", "open files", hostchecks.open_files, at_start=True),
    Check("limits", "keys", hostchecks.keys, at_start=True),
    Check("limits", "processes", hostchecks.pids, at_start=True),
    Check("limits", "inotify", hostchecks.inotify, at_start=True),
    Check("limits", "OOM scores", hostchecks.oom_scores),
    Check("network", "interfaces", hostchecks.interfaces, needs_root=True),
    Check("network", "iptables", hostchecks.iptables, needs_root=True),
    Check("network", "connections", hostchecks.connections, at_start=True),
    Check("network", "forwarding", hostchecks.forwarding, at_start=True),
    Check("network", "routes", hostchecks.routes, at_start=True),
    Check("Nix", "nix-store", _nix_store),
    Check("Nix", "store", _store_answers, needs_root=True),
    Check("Nix", "GC roots", _gc_roots, needs_root=True),
    Check("containerd", "version", _containerd_version),
    Check("sockets", "data directory", _lock, needs_root=True),
    Check("sockets", "node", _node_socket, needs_root=True),
    Check("sockets", "containerd", _containerd_socket, needs_root=True),
    Check("sockets", "health", _health_address, needs_root=True),
    Check("disk", "data directory", hostchecks.data_space, at_start=True),
    Check("disk", "Nix store", hostchecks.store_space, at_start=True),
    Check("mount strategy", "snapshotter", _snapshotter, needs_root=True),
    Check("mount strategy", "strategy", _strategy, needs_root=True),
)
