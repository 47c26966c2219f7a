"""The file that says how registries are reached (``registries.yaml``): read, put before containerd, and again when it changes.

containerd reads ``hosts.toml`` at each pull, so mirrors and certificates change without a restart. Credentials stand in its
configuration, which it reads once: where they have changed since, and where repositories are called otherwise, a relay asks the
registry in containerd's place.
"""

import asyncio
import contextlib
import logging
import os
import re
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING

from nixlet import errors
from nixlet.containerd import registries
from nixlet.encoding import yamlread
from nixlet.host import files
from nixlet.node import config as node_config
from nixlet.node import trusted

if TYPE_CHECKING:
    from nixlet.services import registry_relay

#: Seconds between looks at the file.
_INTERVAL = 1.0

_HOSTS_FILE = "hosts.toml"

#: What Go's regular expressions have and Python's don't (RE2's syntax): classes of POSIX and Unicode, the end of the text.
_GO_ALONE = re.compile(r"\[\[:|\\[pPzQEC]")

_log = logging.getLogger("nixlet.registries")


def read(path: str) -> registries.Registries:
    """What a file says; a missing one says nothing.

    Raises:
        UsageError: It can't be read, or says something wrong; the sentence names the line.
        PermissionDeniedError: Somebody else can write it.
    """
    if not os.path.lexists(path):
        return registries.Registries()
    return parse(trusted.read(path, yamlread.MAX_BYTES), path)


def parse(text: bytes, source: str) -> registries.Registries:
    """What a text in the file's format says.

    Args:
        text: The text.
        source: What errors call it.

    Raises:
        UsageError: It says something wrong; the sentence names the line.
    """
    mirrors: dict[str, registries.Mirror] = {}
    configs: dict[str, registries.HostConfig] = {}
    for number, document in enumerate(yamlread.documents(text, source)):
        if number:
            raise errors.UsageError(f"{source} has more than one document")
        if every := document.mapping("mirrors"):
            for host in every.left():
                mirrors[host] = _mirror(every.mapping(host))
        if every := document.mapping("configs"):
            for host in every.left():
                configs[host] = _host_config(every.mapping(host))
        document.end()
    return registries.Registries(mirrors, configs)


def _mirror(said: yamlread.Mapping | None) -> registries.Mirror:
    if said is None:
        return registries.Mirror()
    endpoints = said.texts("endpoint") or []
    rewrites = []
    if inner := said.mapping("rewrite"):
        for pattern in inner.left():
            if _GO_ALONE.search(pattern):
                raise inner.error(pattern, "has a class that is not supported: write it out, as in [a-z]")
            try:
                rewrites.append(registries.Rewrite(re.compile(pattern, re.ASCII), inner.text(pattern)))
            except re.error as error:
                raise inner.error(pattern, f"is no regular expression: {error}") from error
    said.end()
    return registries.Mirror(tuple(endpoints), tuple(rewrites))


def _host_config(said: yamlread.Mapping | None) -> registries.HostConfig:
    if said is None:
        return registries.HostConfig()
    auth = tls = None
    if inner := said.mapping("auth"):
        # k3s's file has one spelling, docker's and containerd's configuration the other.
        token = inner.text("identity_token") or inner.text("identitytoken")
        auth = registries.Auth(inner.text("username"), inner.text("password"), inner.text("auth"), token)
        inner.end()
    if inner := said.mapping("tls"):
        tls = registries.Tls(
            inner.text("ca_file"),
            inner.text("cert_file"),
            inner.text("key_file"),
            skip_verify=bool(inner.boolean("insecure_skip_verify")),
        )
        inner.end()
    said.end()
    return registries.HostConfig(auth, tls)


class Registries:
    """What the node's file says, as containerd is told it."""

    def __init__(self, settings: node_config.Settings, certs_dir: str, stack: contextlib.AsyncExitStack) -> None:
        self._path = settings.private_registry
        self._default_endpoint = not settings.disable_default_registry_endpoint
        self._certs_dir = certs_dir
        self._stack = stack
        self._relay: registry_relay.RegistryRelay | None = None
        self._seen = self._state()
        self._said = read(self._path)
        #: The credentials that containerd was started with, by host.
        self.auths = self._said.auths()

    async def take_up(self) -> None:
        """Tell containerd what the file said when it was read last."""
        hosts = registries.hosts(self._said, default_endpoint=self._default_endpoint, warn=self._warn)
        relayed = {endpoint for host in hosts.values() for endpoint in _endpoints(host) if self._needs_relay(endpoint)}
        if relayed and self._relay is None:
            # Imported late: most nodes have no use for it, and it takes a third of a second.
            from nixlet.services import registry_relay  # noqa: PLC0415 (see above)

            self._relay = await self._stack.enter_async_context(registry_relay.serve())
        if self._relay is not None:
            self._relay.forget_others(relayed)
        texts = {name: registries.render(host, self._relayed) for name, host in hosts.items()}
        await asyncio.to_thread(_write, self._certs_dir, texts)
        if self._seen:
            _log.info("registries are reached as %s says", self._path)

    async def watch(self) -> None:
        """Take changes of the file up, for ever; what can't be used is said, and what was there before holds."""
        while True:
            await asyncio.sleep(_INTERVAL)
            state = self._state()
            if state == self._seen:
                continue
            self._seen = state
            try:
                self._said = await asyncio.to_thread(read, self._path)
                await self.take_up()
            except (errors.NixletError, OSError) as error:
                hint = error.hint if isinstance(error, errors.NixletError) else ""
                _log.error("registries are reached as before: %s", error, extra={"hint": hint})

    def _warn(self, text: str) -> None:
        _log.warning("%s: %s", self._path, text)

    def _state(self) -> tuple[int, ...]:
        """What tells one state of the file from another."""
        try:
            status = os.stat(self._path)
        except OSError:
            return ()
        return status.st_ino, status.st_size, status.st_mtime_ns, status.st_mode, status.st_uid

    def _needs_relay(self, endpoint: registries.Endpoint) -> bool:
        if not endpoint.url:
            return False
        config = endpoint.config
        wanted = config.auth.fields() if config.auth is not None else {}
        return bool(endpoint.rewrites) or wanted != self.auths.get(registries.default_host(endpoint.host), {})

    def _relayed(self, endpoint: registries.Endpoint) -> str | None:
        if self._relay is None or not self._needs_relay(endpoint):
            return None
        return self._relay.url_for(endpoint)


def _endpoints(host: registries.Host) -> tuple[registries.Endpoint, ...]:
    return host.endpoints if host.default is None else (*host.endpoints, host.default)


def _write(certs_dir: str, texts: Mapping[str, str]) -> None:
    """Have exactly these files, beside those that somebody else put there."""
    files.make_directory(certs_dir)
    for name in set(os.listdir(certs_dir)) - set(texts):
        path = os.path.join(certs_dir, name, _HOSTS_FILE)
        if _is_ours(path):
            os.unlink(path)
            with contextlib.suppress(OSError):
                os.rmdir(os.path.dirname(path))
    for name, text in texts.items():
        path = os.path.join(certs_dir, name, _HOSTS_FILE)
        files.make_directory(os.path.dirname(path), mode=0o700)
        if os.path.lexists(path) and not _is_ours(path):
            _log.warning(
                "%s gives way to what %s says; it is kept beside it", path, name, extra={"kept": f"{path}.saved"}
            )
            os.replace(path, f"{path}.saved")
        files.write_atomically(path, text, mode=0o600)


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
            return file.readline() == registries.HEADER
    except OSError:
        return False


@contextlib.asynccontextmanager
async def kept(settings: node_config.Settings, layout: node_config.Layout) -> AsyncIterator[Registries]:
    """Have containerd reach registries as the node's file says, for the time of the context.

    Raises:
        NixletError: The file can't be used.
    """
    async with contextlib.AsyncExitStack() as stack:
        kept = Registries(settings, layout.certs_dir, stack)
        await kept.take_up()
        watching = asyncio.create_task(kept.watch(), name="registries")
        try:
            yield kept
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
