"""What an ordinary user's node needs of its machine, as checks for ``nixlet doctor --rootless`` and ``nixlet rootless check``."""

import json
import os
import pwd
import tempfile
from collections.abc import Iterator

from nixlet import errors
from nixlet.host import cgroups, process, unixsocket
from nixlet.node.doctor import checks, machine
from nixlet.node.requirements import rootless, snapshotters
from nixlet.node.settings import config as node_config
from nixlet.snapshots import model, probe
from nixlet.store import roots

#: Where systemd notes whose services outlive their sessions (loginctl(1): enable-linger), and by which it is known that it runs.
_LINGER, _SYSTEMD = "/var/lib/systemd/linger", "/run/systemd/system"

#: Seconds for namespaces, and a few mounts in them.
_TIMEOUT = 60.0


class Doctor(checks.Doctor):
    """Checks for an ordinary user's node, by that user."""

    def checks(self) -> Iterator[checks.Check]:
        """All of them, in the order in which they are shown."""
        looks = rootless.looks(self._layout.state_dir)
        yield from (checks.Check("rootless", name, look) for name, look in looks.items())
        yield checks.Check("rootless", "cgroups", delegation)
        yield checks.Check("rootless", "linger", linger)
        if self._ours:
            yield checks.Check("rootless", "bind mounts", self._binds)
        yield from self._binaries()
        yield from (checks.Check("kernel", name, machine.KERNEL[name]) for name in ("namespaces", "seccomp"))
        yield from (checks.Check("limits", name, look) for name, look in machine.LIMITS.items())
        if self._ours:
            yield checks.Check("Nix", "store", self._nix)
            yield checks.Check("Nix", "GC roots", self._gc_roots)
            yield checks.Check("Nix", "space", lambda: machine.space(self._daemon_store().real_dir))
        yield checks.Check("containerd", "version", self._version)
        yield checks.Check("containerd", "configuration", self._configuration)
        yield checks.Check("containerd", "registries", self._registries)
        yield from self._sockets()
        yield checks.Check("disk", "data directory", self._data_directory)
        yield checks.Check("disk", "space", lambda: machine.space(checks.existing(self._layout.data_dir)))

    def _holder(self) -> int:
        # The lock has its number in its own namespace.
        return unixsocket.peer_of(self._layout.control_socket) if super()._holder() else 0

    async def _version(self) -> str:
        found = await self._ask_containerd()
        if self._ours:
            snapshotters.check_binds(found.version)
        return checks.known_trouble(found.version)

    async def _nix(self) -> str:
        store = self._daemon_store()
        try:
            snapshotters.check_ours(store)
        except errors.PermissionDeniedError as error:
            # There is nothing that root would see and we don't.
            raise errors.UnavailableError(error.message, hint=error.hint) from None
        await snapshotters.check_store(store)
        how = "a daemon" if os.path.exists(store.settings.socket) else "ourselves, who own it"
        return f"{store.real_dir} answers, through {how}"

    def _gc_roots(self) -> str:
        made = roots.of_snapshotter(
            self._daemon_store().settings.gcroots, self._layout.snapshotter_root(self._settings.snapshotter)
        )
        return f"{made.directory}{', of which Nix is told' if made.indirect else ''}"

    async def _binds(self) -> str:
        """Whether containers can get their root file systems in a namespace, by trying it in one."""
        store = self._daemon_store().real_dir
        if not os.path.isdir(store):
            raise errors.UnavailableError(f"there is no Nix store at {store} yet", hint="build something with Nix")
        environment = {**os.environ, "PATH": rootless.path_with_helpers()}
        with tempfile.TemporaryDirectory(prefix=".nixlet-doctor-", dir=checks.existing(self._layout.data_dir)) as base:
            inside = probe.command(base, store)
            argv = [rootless.find_rootlesskit(), "--net=host", f"--state-dir={base}/rootlesskit", *inside]
            done = (await process.run(argv, env=environment, timeout=_TIMEOUT)).check()
        answer = json.loads(done.stdout)
        if answer["passing"]:
            raise errors.UnavailableError(f"it can't be tried at the moment: {os.strerror(answer['passing'][0])}")
        if reason := answer["findings"][model.Strategy.BIND.value]:
            raise errors.UnsupportedError(
                reason, hint="use a kernel from 5.11 on, and a data directory on ext4, xfs, btrfs or tmpfs: --data-dir"
            )
        return "containers see closures through them"


def delegation() -> str:
    """Whether limits of containers would hold, for a node that is started from here."""
    if cgroups.is_delegated() or cgroups.delegated():
        return "ours are delegated to us"
    raise machine.Worse(
        "none are delegated to us: limits of containers don't hold, and containerd 2 runs no containers",
        "have it as a service of systemd's: nixlet rootless setup",
    )


def linger() -> str:
    """Whether a node outlives its user's sessions."""
    name = pwd.getpwuid(os.getuid()).pw_name
    if not os.path.isdir(_SYSTEMD):
        return "nothing ends with a session: systemd doesn't run"
    if os.path.exists(os.path.join(_LINGER, name)):
        return f"services of {name} outlive sessions"
    raise machine.Worse(f"a service of {name} ends with the last session", f"sudo loginctl enable-linger {name}")


async def examine(settings: node_config.Settings) -> list[checks.Finding]:
    """What a node with these settings would find here."""
    return await (Doctor if settings.rootless else checks.Doctor)(settings).examine()
