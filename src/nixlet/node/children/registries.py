"""The file that says how registries are reached (``registries.yaml``): read, put before containerd, and again when it changes.

containerd reads ``hosts.toml`` at each pull, so mirrors and certificates change without a restart. Credentials stand in its
configuration, which it reads once: where they have changed since, and where repositories are called otherwise, a relay asks the
registry in containerd's place.
"""

import asyncio
import contextlib
import itertools
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping
from typing import TYPE_CHECKING

from nixlet import errors
from nixlet.containerd import hosts
from nixlet.containerd.registries import Endpoint, Registries
from nixlet.host import files
from nixlet.node.children import containerd_child
from nixlet.node.settings import config as node_config

if TYPE_CHECKING:
    from nixlet.services import registry_relay

#: Seconds between looks at the file.
_INTERVAL = 1.0

_HOSTS_FILE = "hosts.toml"

_log = logging.getLogger("nixlet.registries")


class Kept:
    """What the node's file says, as containerd is told it."""

    def __init__(self, settings: node_config.Settings, certs_dir: str, stack: contextlib.AsyncExitStack) -> None:
        self._path = settings.private_registry
        self._default_endpoint = not settings.disable_default_registry_endpoint
        self._certs_dir = certs_dir
        self._stack = stack
        self._relay: registry_relay.RegistryRelay | None = None
        #: What the file was when it was taken up last; None: not yet.
        self._seen: tuple[int, ...] | None = None
        #: What containerd is told.
        self.said = Registries()
        #: The credentials that containerd was started with, by host.
        self.auths: hosts.Told = {}
        #: Where the user's files have containerd look instead; None: where we write.
        self.elsewhere: str | None = None
        #: Are told what the file says whenever it has been taken up (blocking).
        self.followers: list[Callable[[Registries], None]] = []
        #: Why the file as it is now can't be used, while what it said before holds; empty when it can.
        self.problem = ""

    async def take_up(self) -> None:
        """Tell containerd what the file says now.

        Raises:
            NixletError, OSError: It can't be used, or written; containerd is told what it was told before.
        """
        # Before it is read: what changes meanwhile is read again.
        state = self._state()
        said = await asyncio.to_thread(_read, self._path)
        if self.elsewhere is not None and (said.mirrors or said.configs):
            has = f"registry.config_path = {self.elsewhere!r}" if self.elsewhere else "no registry.config_path"
            raise errors.UsageError(
                f"{self._path} is not obeyed while containerd's configuration has {has}",
                hint="change the template or drop-in that says how registries are reached, and restart the node",
            )
        if self._seen is None:
            self.auths = said.auths()
        warnings: list[str] = []
        found = hosts.hosts(said, default_endpoint=self._default_endpoint, warn=warnings.append, told=self.auths)
        endpoints = {endpoint for host in found.values() for endpoint in host.all}
        if self._relay is None and any(map(self._needs_relay, endpoints)):
            # Imported late: most nodes have no use for it, and it takes a third of a second.
            from nixlet.host import proxies  # noqa: PLC0415 (see above)
            from nixlet.services import registry_relay  # noqa: PLC0415 (see above)

            # The way that containerd's own requests take.
            ways = proxies.from_environment(containerd_child.environment_of(os.environ))
            self._relay = await self._stack.enter_async_context(registry_relay.serve(self._path, ways))
        texts = {name: hosts.render(host, self._relayed) for name, host in found.items()}
        await asyncio.to_thread(_write, self._certs_dir, texts)
        # Once containerd can read of the new ways: before, the others are all that it has.
        if self._relay is not None:
            self._relay.forget_others(endpoints)
        for follow in self.followers:
            await asyncio.to_thread(follow, said)
        self.said, self._seen, self.problem = said, state, ""
        for warning in (*said.warnings, *(f"{self._path}: {each}" for each in warnings)):
            _log.warning("%s", warning)
        if state:
            _log.info("registries are reached as %s says", self._path)

    async def watch(self) -> None:
        """Take changes of the file up, for ever; what can't be used is said, and what was there before holds."""
        while True:
            await asyncio.sleep(_INTERVAL)
            if self.problem or self._state() != self._seen:
                await self.try_again()

    async def try_again(self) -> None:
        """Take the file up; why that can't be is said once, however often it is tried: a full disk has room again one day."""
        try:
            await self.take_up()
        except Exception as error:  # noqa: BLE001 (it is logged, and the next try may go well)
            known = isinstance(error, (errors.NixletError, OSError))
            problem = f"registries are reached as before: {error if known else type(error).__name__}"
            if problem != self.problem:
                hint = error.hint if isinstance(error, errors.NixletError) else ""
                _log.error("%s", problem, extra={"hint": hint}, exc_info=None if known else error)
            self.problem = problem

    def _state(self) -> tuple[int, ...]:
        """What tells one state of the file from another."""
        try:
            status = os.stat(self._path)
        except OSError:
            return ()
        return status.st_ino, status.st_size, status.st_mtime_ns, status.st_mode, status.st_uid

    def _needs_relay(self, endpoint: Endpoint) -> bool:
        return hosts.needs_relay(endpoint, self.auths)

    def _relayed(self, endpoint: Endpoint) -> hosts.Way | None:
        if self._relay is None or not self._needs_relay(endpoint):
            return None
        return self._relay.way_to(endpoint)


def _read(path: str) -> Registries:
    """What the file says; a missing one says nothing, and most are."""
    if not os.path.lexists(path):
        return Registries()
    from nixlet.node.settings import registries_file  # noqa: PLC0415 (YAML's reader takes long to import)

    return registries_file.read(path)


def _write(certs_dir: str, texts: Mapping[str, str]) -> None:
    """Have exactly these files, beside those that somebody else put there."""
    files.make_directory(certs_dir)
    for name, text in texts.items():
        path = os.path.join(certs_dir, name, _HOSTS_FILE)
        files.make_directory(os.path.dirname(path), mode=0o700)
        if not os.path.lexists(path) or _is_ours(path):
            files.write_atomically(path, text, mode=0o600)
            continue
        kept = _free_name(f"{path}.saved")
        os.link(path, kept, follow_symlinks=False)
        try:
            files.write_atomically(path, text, mode=0o600)
        except BaseException:
            os.unlink(kept)
            raise
        _log.warning("%s gives way to what registries.yaml says of %s; it is kept as %s", path, name, kept)
    # Last: a disk that is full takes nothing away.
    for name in set(os.listdir(certs_dir)) - set(texts):
        path = os.path.join(certs_dir, name, _HOSTS_FILE)
        if _is_ours(path):
            os.unlink(path)
            with contextlib.suppress(OSError):
                os.rmdir(os.path.dirname(path))


def _free_name(path: str) -> str:
    """A name that nothing has yet: what was kept before is somebody's work as well."""
    names = itertools.chain([path], (f"{path}.{number}" for number in itertools.count(2)))
    return next(name for name in names if not os.path.lexists(name))


def made_in(certs_dir: str) -> list[str]:
    """The files in ``certs_dir`` that a node made."""
    try:
        places = [os.path.join(certs_dir, name, _HOSTS_FILE) for name in os.listdir(certs_dir)]
    except FileNotFoundError:
        return []
    return [place for place in places if _is_ours(place)]


def _is_ours(path: str) -> bool:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.readline() == hosts.HEADER
    except OSError:
        return False


@contextlib.asynccontextmanager
async def kept(settings: node_config.Settings, layout: node_config.Layout) -> AsyncIterator[Kept]:
    """Have containerd reach registries as the node's file says, for the time of the context.

    Raises:
        NixletError: The file can't be used.
    """
    async with contextlib.AsyncExitStack() as stack:
        kept = Kept(settings, layout.certs_dir, stack)
        await kept.take_up()
        watching = asyncio.create_task(kept.watch(), name="registries")
        try:
            yield kept
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
