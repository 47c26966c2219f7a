"""What a node needs of its machine, as a list of checks for ``nixlet doctor``.

A check is a function that says in a few words what it saw, or raises the error that start-up would raise: most of them are what
start-up itself calls. What only makes things worse, without keeping a node from running, is a ``Warning``.
"""

import asyncio
import contextlib
import dataclasses
import functools
import inspect
import os
import re
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Literal

from nixlet import errors
from nixlet.containerd import config as containerd_config
from nixlet.containerd import cri, imagestore, runtimes
from nixlet.host import files, mounts, process, unixsocket
from nixlet.node.children import rendering
from nixlet.node.doctor import kubernetes, machine, netprobe, running
from nixlet.node.images import pause
from nixlet.node.ownership import marker
from nixlet.node.requirements import plugins, preflight, snapshotters
from nixlet.node.serving import proxyplugin
from nixlet.node.settings import config as node_config
from nixlet.node.settings import registries_file
from nixlet.rpc import channel as channels
from nixlet.services import health
from nixlet.snapshots import model, probe
from nixlet.store.daemon import client as nix

#: Seconds for one check: the versions of a cluster's programs take longest.
_PATIENCE = 120.0

#: Seconds that somebody else's containerd gets to say what it is.
_ANSWER_TIMEOUT = 5.0

Status = Literal["ok", "warning", "missing", "unknown"]


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """What a check found.

    Attributes:
        group: What it is about: "binaries", "kernel".
        name: What was looked at.
        status: "ok"; "warning": a node runs, but; "missing": it doesn't; "unknown": we could not look.
        evidence: What was seen.
        remedy: What to do about it; empty where nothing is to be done.
    """

    group: str
    name: str
    status: Status
    evidence: str
    remedy: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """A check.

    Attributes:
        group: What it is about.
        name: What it looks at.
        look: Says what it saw; raises ``NixletError`` where something is missing, ``machine.Worse`` where something could be better.
    """

    group: str
    name: str
    look: Callable[[], "str | Awaitable[str]"]

    async def find(self) -> Finding:
        """Look."""
        try:
            seen = self.look()
            if inspect.isawaitable(seen):
                async with asyncio.timeout(_PATIENCE):
                    seen = await seen
        except machine.Worse as worse:
            return Finding(self.group, self.name, "warning", worse.evidence, worse.remedy)
        except errors.NixletError as error:
            denied = os.geteuid() != 0 and isinstance(
                error.__cause__ or error, errors.PermissionDeniedError | PermissionError
            )
            return Finding(self.group, self.name, "unknown" if denied else "missing", error.message, error.hint or "")
        except PermissionError as error:
            return Finding(self.group, self.name, "unknown", str(error), "run it as root: sudo nixlet doctor")
        except TimeoutError:
            return Finding(self.group, self.name, "unknown", f"no answer within {_PATIENCE:g} s", "look again")
        except OSError as error:
            told = files.refused(f"{error.filename or 'something of it'} can't be used", error)
            return Finding(self.group, self.name, "unknown", told.message, told.hint or "")
        return Finding(self.group, self.name, "ok", seen)


def exit_status(findings: Sequence[Finding]) -> int:
    """0: a node can run. 1: something is missing. 3: that could not be told."""
    seen = {finding.status for finding in findings}
    return 1 if "missing" in seen else 3 if "unknown" in seen else 0


class Doctor:
    """Checks for a node with certain settings."""

    def __init__(self, settings: node_config.Settings) -> None:
        self._layout = settings.layout
        self._settings = kubernetes.with_pods(settings)
        self._store: nix.DaemonStore | None = None
        self._plugin = plugins.of(settings, self._layout)
        self._ours = self._plugin is not None and self._plugin.is_ours
        self._findings: probe.Findings | None = None

    def checks(self) -> Iterator[Check]:
        """All of them, in the order in which they are shown."""
        settings = self._settings
        yield Check("rights", "root", _root)
        yield from self._binaries()
        yield from (Check("kernel", name, look) for name, look in machine.KERNEL.items())
        yield from (Check("cgroups", name, look) for name, look in machine.CGROUPS.items())
        yield from (Check("limits", name, look) for name, look in machine.LIMITS.items())
        yield Check("network", "pod addresses", lambda: machine.addresses_free(settings.pod_cidr, settings.bridge))
        yield from (Check("network", name, look) for name, look in machine.NETWORK.items())
        if not settings.container_runtime_endpoint:
            yield Check("network", "interfaces", netprobe.interfaces)
            yield Check("network", "bridge", lambda: machine.bridge_ports(settings.bridge))
            yield Check("network", "gateway", lambda: netprobe.gateway(settings))
            yield Check("network", "masquerading", lambda: netprobe.masquerading(settings))
            yield Check("network", "firewall", lambda: netprobe.forwarded(settings))
        if self._ours:
            yield Check("Nix", "store", self._nix)
            yield Check("Nix", "GC roots", self._gc_roots)
            yield Check("Nix", "space", lambda: machine.space(self._daemon_store().real_dir))
        if not settings.container_runtime_endpoint:
            yield Check("containerd", "version", self._version)
            yield Check("containerd", "configuration", self._configuration)
            yield Check("containerd", "registries", self._registries)
        yield Check("containerd", "snapshotter", self._snapshotter)
        yield Check("containerd", "pods' network", self._network)
        looks = kubernetes.looks(settings)
        yield from (Check("Kubernetes", name, look) for name, look in looks.items())
        yield from self._sockets()
        yield Check("disk", "data directory", self._data_directory)
        yield Check("disk", "space", lambda: machine.space(existing(self._layout.data_dir)))
        if self._ours:
            yield from (self._strategy(strategy) for strategy in model.Strategy)

    def _binaries(self) -> Iterator[Check]:
        settings = self._settings
        yield Check("binaries", "setpriv", process.find_setpriv)
        if settings.container_runtime_endpoint:
            return
        yield Check("binaries", "containerd", self._containerd)
        yield Check("binaries", "containerd-shim-runc-v2", self._shim)
        yield Check("binaries", "runc", lambda: machine.runc(settings.runc))
        yield Check("binaries", "CNI plugins", lambda: preflight.find_cni_plugins(settings.cni_bin_dirs))
        yield Check("binaries", "iptables", machine.iptables)
        if not settings.pause_image:
            yield Check("binaries", "pause", self._pause)
        yield Check("binaries", "other runtimes", _runtimes)

    async def examine(self) -> list[Finding]:
        """The findings of all checks, in their order; last how the children do of a node that runs here."""
        children = await asyncio.to_thread(running.looks, self._layout)
        more = [Check("children", name, look) for name, look in children.items()]
        return [await check.find() for check in (*self.checks(), *more)]

    async def _network(self) -> str:
        """Whether the containerd that runs has a network for pods, by its own word."""
        path = self._settings.container_runtime_endpoint or self._layout.containerd_socket
        if not unixsocket.is_served(path):
            return "no containerd runs yet"
        async with channels.connect(path) as channel:
            await cri.RuntimeClient(channel, path).check_network()
        return f"the containerd at {path} has one"

    def _daemon_store(self) -> nix.DaemonStore:
        if self._store is None:
            self._store = nix.DaemonStore(nix.DaemonSettings.from_environment(os.environ))
        return self._store

    async def _ask_containerd(self) -> containerd_config.ContainerdProgram:
        path = preflight.find_program(self._settings.containerd, package="containerd", setting="--containerd")
        return await containerd_config.ask(path)

    async def _containerd(self) -> str:
        found = await self._ask_containerd()
        return f"{found.path}, version {found.version}, configuration version {found.config_version}"

    def _shim(self) -> str:
        containerd = preflight.find_program(self._settings.containerd, package="containerd", setting="--containerd")
        return preflight.find_shim(containerd)

    def _pause(self) -> str:
        path = preflight.find_program(self._settings.pause, package="catatonit", setting="--pause")
        pause.read_static(path)
        return f"{path}, static"

    async def _version(self) -> str:
        found = await self._ask_containerd()
        return known_trouble(found.version)

    async def _configuration(self) -> str:
        found = await self._ask_containerd()
        version = rendering.choose_version(self._layout, found.config_version)
        rendered = rendering.render(
            self._settings,
            self._layout,
            version=version,
            runc=process.find_program(self._settings.runc) or self._settings.runc,
            cni_bin_dir=self._settings.cni_bin_dirs[0],
        )
        return ", ".join((f"version {version}", *(f"with {source}" for source in rendered.sources)))

    def _registries(self) -> str:
        path = self._settings.private_registry
        said = registries_file.read(path)
        if not os.path.lexists(path):
            return f"{path} is not there: registries are reached as they are named"
        if said.warnings:
            raise machine.Worse("; ".join(said.warnings), "correct the file; a running node reads it again by itself")
        return f"{path}: {len(said.mirrors)} with mirrors, {len(said.configs)} with credentials or certificates"

    async def _snapshotter(self) -> str:
        # Nothing is made where no node has been yet.
        root = existing(self._layout.containerd_root)
        if root == self._layout.containerd_root:
            await snapshotters.check_supported(
                self._settings, self._layout, self._daemon_store() if self._ours else None
            )
        else:
            with tempfile.TemporaryDirectory(prefix=".nixlet-doctor-", dir=root) as base:
                layout = node_config.Layout(base, self._layout.state_dir)
                await snapshotters.check_supported(self._settings, layout, self._daemon_store() if self._ours else None)
        first = self._settings.snapshotter if self._plugin is None else self._plugin.told()
        told = {each.proxy.name: each.told() for each in plugins.further(self._settings, self._layout)}
        return "; ".join([first, *(told.get(name, name) for name in self._settings.also_snapshotter)])

    async def _nix(self) -> str:
        store = self._daemon_store()
        if os.geteuid() != 0 and not os.path.exists(store.settings.socket):
            raise errors.PermissionDeniedError(
                f"no daemon serves {store.settings.socket}, and root alone may read the store's database",
                hint="run it as root: sudo nixlet doctor",
            )
        await snapshotters.check_store(store)
        how = store.settings.socket if os.path.exists(store.settings.socket) else " ".join(store.settings.stdio)
        return f"{store.real_dir} answers, through {how}"

    def _gc_roots(self) -> str:
        directory = existing(self._daemon_store().settings.gcroots)
        if not os.access(directory, os.W_OK):
            raise errors.PermissionDeniedError(f"GC roots can't be made in {directory}", hint="run it as root")
        return self._daemon_store().settings.gcroots

    def _sockets(self) -> Iterator[Check]:
        layout = self._layout
        sockets = {"node": layout.node_socket, "containerd": layout.containerd_socket}
        if not self._settings.health_address:
            sockets["health"] = layout.health_socket
        elif self._settings.health_address != node_config.NO_HEALTH:
            yield Check("sockets", "health", self._health_address)
        if self._settings.container_runtime_endpoint:
            endpoint = self._settings.container_runtime_endpoint
            yield Check("sockets", "containerd", lambda: _served(endpoint, by_our_snapshotter=self._ours))
            del sockets["containerd"]
        for name, path in sockets.items():
            yield Check("sockets", name, functools.partial(self._free, path))

    def _holder(self) -> int:
        """The node that runs; 0: there is none."""
        return files.holder(self._layout.lock)

    def _free(self, path: str) -> str:
        """A socket that is ours already, or nobody's."""
        if not os.path.exists(path):
            return f"{path} is free"
        if not unixsocket.is_served(path):
            return f"{path} is left from an earlier run, and will be replaced"
        pid, holder = unixsocket.peer_of(path), self._holder()
        if holder and pid in {holder, *_children(holder)}:
            return f"{path} is served by the node that runs (process {holder})"
        raise errors.FailedPreconditionError(
            f"{path} is served by another process ({pid})", hint="stop that process, or choose another --state-dir"
        )

    def _health_address(self) -> str:
        address, holder = self._settings.health_address, self._holder()
        if holder:
            return f"{address} is up to the node that runs (process {holder})"
        health.listen_tcp(address).close()
        return f"{address} is free"

    def _data_directory(self) -> str:
        directory = self._layout.data_dir
        where = existing(directory)
        if not os.path.isdir(where):
            raise errors.FailedPreconditionError(f"{where} is no directory", hint="choose another --data-dir")
        holder = self._holder()
        if not os.access(where, os.W_OK | os.X_OK):
            raise errors.PermissionDeniedError(
                f"{where} can't be written", hint="run it as root, or choose another --data-dir"
            )
        marker.check(self._layout)
        kind = mounts.covering(where).fstype
        state = f"in use by process {holder}" if holder else "free" if where == directory else "not there yet"
        return f"{directory} on {kind}, {state}"

    def _strategy(self, strategy: model.Strategy) -> Check:
        async def look() -> str:
            reason = (await self._probed())[strategy.value]
            if not reason:
                return "containers see closures through it"
            wanted = self._settings.strategy
            if wanted == strategy.value or (wanted == "auto" and all((await self._probed()).values())):
                raise errors.UnsupportedError(
                    reason,
                    hint="use a data directory on ext4, xfs, btrfs or tmpfs that is no overlay itself, such as a volume",
                )
            raise machine.Worse(reason, f"none is needed while the strategy is {wanted} and another one works")

        return Check("mount strategy", strategy.value, look)

    async def _probed(self) -> probe.Findings:
        if self._findings is None:
            self._findings = await self._probe()
        return self._findings

    async def _probe(self) -> probe.Findings:
        preflight.check_root()
        store = self._daemon_store().real_dir
        if not os.path.isdir(store):
            raise errors.UnavailableError(f"there is no Nix store at {store} yet", hint="build something with Nix")
        assert self._plugin is not None
        root, overlay = self._plugin.proxy.root, self._plugin.overlay
        if os.path.isdir(root):
            return await probe.findings(root, store, overlay)
        with tempfile.TemporaryDirectory(prefix=".nixlet-doctor-", dir=existing(root)) as base:
            return await probe.findings(base, store, overlay)


def existing(path: str) -> str:
    """A path, or the nearest directory above it that is there."""
    while not os.path.lexists(path) and path != "/":
        path = os.path.dirname(path)
    return path


def known_trouble(version: str) -> str:
    """What a version of containerd is known for.

    Raises:
        Worse: Something that a person should know.
    """
    numbers = re.match(r"(\d+)\.(\d+)", version)
    release = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    if not (1, 6) <= release <= (2, 4):
        raise machine.Worse(f"{version} was never tried with nixlet", "use containerd 1.6 to 2.4")
    if release == (1, 6):
        raise machine.Worse(
            f"{version} drops the targets of mounts, so that store paths can't be bound (strategy bind), closes a container's "
            "output as soon as it ends, and takes no drop-ins for NRI or the Transfer service",
            "use containerd 1.7 or later where views don't work",
        )
    if (2, 1) <= release <= (2, 3):
        return f"{version}; it takes images that it can't resolve for checkpoints, so nixlet gives every image a name that it can"
    return version


def _root() -> str:
    preflight.check_root()
    return "we may mount"


def _runtimes() -> str:
    found = runtimes.discover(os.environ.get("PATH", os.defpath))
    return ", ".join(sorted(found)) or "none found; runc is there"


async def _served(path: str, *, by_our_snapshotter: bool) -> str:
    """Somebody else's containerd: that it answers, what it is known for, and that it sees our mounts."""
    pid = unixsocket.peer_of(path)
    async with channels.connect(path) as channel:
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT):
                await cri.RuntimeClient(channel, path).version()
                version = (await imagestore.ImageStore(channel, path).version()).removeprefix("v")
        except TimeoutError as error:
            raise errors.UnavailableError(
                f"the containerd at {path} does not answer within {_ANSWER_TIMEOUT:g} s", hint="restart it"
            ) from error
    if by_our_snapshotter:
        proxyplugin.check_mount_namespace(path)
    return f"{path} is served by process {pid}, containerd {known_trouble(version)}"


def _children(pid: int) -> set[int]:
    found: set[int] = set()
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as file:
                found.update(map(int, file.read().split()))
    return found
