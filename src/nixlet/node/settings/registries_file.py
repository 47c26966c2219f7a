"""The file that says how registries are reached (``registries.yaml``), read as k3s reads it.

A value counts as it is written, in quotes or not: a password of digits is that password. What k3s passes over without a word is
passed over with a warning: unknown keys, and rewrites that are no regular expressions.
"""

import os
from collections.abc import Callable

from nixlet import errors
from nixlet.containerd import registries, rewrites
from nixlet.encoding import yamlread
from nixlet.node.settings import trusted

#: What YAML 1.1 takes for truth values.
_TRUE, _FALSE = frozenset({"y", "yes", "true", "on"}), frozenset({"n", "no", "false", "off", ""})

_Warn = Callable[[str], object]


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
    warnings: list[str] = []
    warn = warnings.append
    for number, document in enumerate(yamlread.documents(text, source)):
        if number:
            raise errors.UsageError(f"{source} has more than one document")
        if every := document.mapping("mirrors"):
            for host in _hosts(every, source, warn):
                mirrors[host] = _mirror(every.mapping(host), warn)
        if every := document.mapping("configs"):
            for host in _hosts(every, source, warn):
                configs[host] = _host_config(every.mapping(host), warn)
        if document.kind("auths") != "nothing":
            warn(document.error("auths", "is passed over: credentials are the auth of a host below configs").message)
            document.skip("auths")
        _end(document, warn)
    return registries.Registries(mirrors, configs, tuple(warnings))


def _hosts(said: yamlread.Mapping, source: str, warn: _Warn) -> list[str]:
    """The keys that may be hosts. Those that have a password in them are not handed on: every error would repeat it."""
    for key in said.left():
        if "@" in key:
            place = f"{source}, line {said.line(key)}: {registries.shown(key)}"
            warn(f"{place} is passed over: a registry is named by its host, and credentials are its auth below configs")
            said.skip(key)
    return said.left()


def _mirror(said: yamlread.Mapping | None, warn: _Warn) -> registries.Mirror:
    if said is None:
        return registries.Mirror()
    endpoints = said.literals("endpoint") or []
    found = []
    if inner := said.mapping("rewrite"):
        for pattern in inner.left():
            try:
                found.append(rewrites.Rewrite(rewrites.compiled(pattern), inner.literal(pattern)))
            except ValueError as error:
                warn(inner.error(pattern, f"is passed over, as it is no regular expression of Go's: {error}").message)
    _end(said, warn)
    return registries.Mirror(tuple(endpoints), tuple(found))


def _host_config(said: yamlread.Mapping | None, warn: _Warn) -> registries.HostConfig:
    if said is None:
        return registries.HostConfig()
    auth = tls = None
    if inner := said.mapping("auth"):
        # k3s's file has one spelling, docker's and containerd's configuration the other.
        token = inner.literal("identity_token") or inner.literal("identitytoken")
        auth = registries.Auth(inner.literal("username"), inner.literal("password"), inner.literal("auth"), token)
        _end(inner, warn)
    if inner := said.mapping("tls"):
        tls = registries.Tls(
            inner.literal("ca_file"),
            inner.literal("cert_file"),
            inner.literal("key_file"),
            skip_verify=_boolean(inner, "insecure_skip_verify"),
        )
        _end(inner, warn)
    _end(said, warn)
    return registries.HostConfig(auth, tls)


def _boolean(said: yamlread.Mapping, key: str) -> bool:
    written = said.literal(key).lower()
    if written not in _TRUE | _FALSE:
        raise said.error(key, "must be true or false")
    return written in _TRUE


def _end(said: yamlread.Mapping, warn: _Warn) -> None:
    """Warn of what has not been read: nobody should believe in its effect."""
    for error in said.unknown():
        warn(f"{error.message.removesuffix(' is not supported')} is passed over: it is not a known key{_meant(error)}")


def _meant(error: errors.NixletError) -> str:
    return f" ({error.hint})" if error.hint else ""
