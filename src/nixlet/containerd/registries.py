"""Registries and their mirrors: what ``registries.yaml`` says, in k3s's format (docs.k3s.io, "Private Registry Configuration")."""

import base64
import binascii
import dataclasses
import ipaddress
import re
from collections.abc import Mapping
from urllib import parse

from nixlet.containerd.rewrites import Rewrite

#: The name that stands for every registry that has none of its own.
EVERY = "*"

_DOCKER = "docker.io"
_DOCKER_HOST = "registry-1.docker.io"

#: A host with or without a port, as it stands in references and URLs.
_HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")


@dataclasses.dataclass(frozen=True, slots=True)
class Auth:
    """What a registry wants to see.

    Attributes:
        username: Its name for us.
        password: What proves it.
        auth: Both in one, ``base64(username:password)``, as docker's configuration has it.
        identity_token: A token that is exchanged for others, in place of a password.
    """

    username: str = ""
    password: str = dataclasses.field(default="", repr=False)
    auth: str = dataclasses.field(default="", repr=False)
    identity_token: str = dataclasses.field(default="", repr=False)

    def fields(self) -> dict[str, str]:
        """The keys of containerd's ``registry.configs.HOST.auth`` that say something."""
        keys = {"username": "username", "password": "password", "auth": "auth", "identity_token": "identitytoken"}
        return {key: value for name, key in keys.items() if (value := getattr(self, name))}

    def login(self) -> tuple[str, str]:
        """User name and password, wherever they stand; both empty where only a token does."""
        if self.username or not self.auth:
            return self.username, self.password
        try:
            decoded = base64.b64decode(self.auth, validate=True).decode().rstrip("\0")
        except (binascii.Error, UnicodeDecodeError):
            return "", ""
        name, _, password = decoded.partition(":")
        return name, password


@dataclasses.dataclass(frozen=True, slots=True)
class Tls:
    """How a registry proves itself, and we to it.

    Attributes:
        ca_file: Certificates that vouch for it, beside the system's.
        cert_file: Our certificate.
        key_file: The key of it.
        skip_verify: Whether anybody's certificate is taken.
    """

    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    skip_verify: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class HostConfig:
    """What is said of one host."""

    auth: Auth | None = None
    tls: Tls | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Mirror:
    """Where the images of a registry are looked for first.

    Attributes:
        endpoints: URLs or hosts, in order.
        rewrites: How repositories are called there; the first that changes a name is taken.
    """

    endpoints: tuple[str, ...] = ()
    rewrites: tuple[Rewrite, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Registries:
    """What ``registries.yaml`` says, by host; ``*`` is every other one.

    Attributes:
        mirrors: Where the images of registries are looked for first.
        configs: What is said of hosts.
        warnings: What is passed over, and where it stands.
    """

    mirrors: Mapping[str, Mirror] = dataclasses.field(default_factory=dict)
    configs: Mapping[str, HostConfig] = dataclasses.field(default_factory=dict)
    warnings: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    def config_for(self, host: str) -> HostConfig:
        """What is said of a host; Docker Hub's two names mean the same."""
        names = (_DOCKER_HOST, _DOCKER) if host in {_DOCKER, _DOCKER_HOST} else (host,)
        return next((self.configs[name] for name in names if name in self.configs), HostConfig())

    def auths(self) -> dict[str, dict[str, str]]:
        """The credentials by the hosts that containerd asks them for.

        Without those of addresses of IPv6: containerd 1 can't read a table's name with a bracket in it, and would not start.
        """
        found: dict[str, dict[str, str]] = {}
        for host, config in self.configs.items():
            if config.auth is not None and host != EVERY and "[" not in host and (fields := config.auth.fields()):
                # containerd asks by the one name or the other, depending on its version.
                for name in (_DOCKER, _DOCKER_HOST) if host in {_DOCKER, _DOCKER_HOST} else (host,):
                    found[name] = fields
        return found


@dataclasses.dataclass(frozen=True, slots=True)
class Endpoint:
    """A place where images are looked for.

    Attributes:
        url: ``https://host/v2``; empty: wherever the registry itself is.
        host: The host that ``registries.yaml`` knows it by.
        override_path: The path is the whole of it: containerd adds no ``/v2``.
        config: What is said of the host.
        rewrites: How repositories are called there.
    """

    url: str
    host: str = ""
    override_path: bool = False
    config: HostConfig = HostConfig()
    rewrites: tuple[Rewrite, ...] = ()


class InvalidEndpointError(ValueError):
    """It is no URL that containerd could ask."""


def default_host(host: str) -> str:
    """Where a registry is: Docker Hub's is not where its name says."""
    return _DOCKER_HOST if host == _DOCKER else host


def is_host(name: str) -> bool:
    """Whether a name is a host, with or without a port."""
    return _HOST.fullmatch(name) is not None


def shown(endpoint: str) -> str:
    """An endpoint for a sentence: without what may be a password in it."""
    place, question, _ = endpoint.partition("?")
    scheme, separator, rest = place.rpartition("://")
    rest = f"...@{rest.rpartition('@')[2]}" if "@" in rest else rest
    return f"{scheme}{separator}{rest}{question and '?...'}"


def normalised(endpoint: str) -> Endpoint:
    """An endpoint as people write it, made whole: scheme and path are added where they are missing.

    Raises:
        InvalidEndpointError: It is none.
    """
    if "@" in endpoint:
        raise InvalidEndpointError("credentials can't stand in it: they are the host's auth below configs")
    try:
        url = parse.urlsplit(endpoint if "://" in endpoint else f"//{endpoint}")
        port, hostname = url.port, url.hostname or ""
    except ValueError as error:
        raise InvalidEndpointError(str(error)) from error
    if url.scheme not in {"", "http", "https"}:
        raise InvalidEndpointError(f"its scheme is {url.scheme}, not http or https")
    if not is_host(url.netloc):
        raise InvalidEndpointError("it has no host, or more than host and port before the path")
    if url.query or url.fragment or not endpoint.isprintable() or " " in endpoint:
        raise InvalidEndpointError("it must end with the path")
    scheme = url.scheme
    if not scheme:
        scheme = "http" if _is_loopback(hostname) and port not in {None, 443} else "https"
    netloc = default_host(url.netloc)
    override = url.path.rstrip("/") not in {"", "/v2"}
    path = url.path.rstrip("/") if override else "/v2"
    return Endpoint(
        url=f"{scheme}://{netloc}{path}",
        host=_DOCKER if netloc == _DOCKER_HOST else url.netloc,
        override_path=override,
    )


def _is_loopback(hostname: str) -> bool:
    if hostname == "localhost":
        return True
    try:
        return ipaddress.ip_address(hostname).is_loopback
    except ValueError:
        return False
