"""Where a server is, by what it is recognised, and who we are to it."""

import dataclasses
import ipaddress
import re
import urllib.parse
from typing import Self

from nixlet import errors
from nixlet.cluster import kubeconfigs
from nixlet.cluster.kubeconfigs import Credentials

_PORTS = {"http": 80, "https": 443}

#: Labels with dots between them, perhaps one at the end.
_NAME = re.compile(r"[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*\.?", re.IGNORECASE)
_MAX_NAME = 253


@dataclasses.dataclass(frozen=True, slots=True)
class Endpoint:
    """A server. Use ``of`` or ``of_kubeconfig``.

    Attributes:
        scheme: ``https``; or ``http``, for this machine only.
        host: Its name or address.
        port: Its port.
        path: What the paths of requests begin with; empty, or a path without a slash at its end.
        what: What a person knows it as.
        authority: The path of the certificates of its authority.
        authority_data: These themselves, in place of a path. With neither, the machine's own authorities are believed.
        credentials: Who we are.
        verified: Its certificate is looked at.
    """

    scheme: str
    host: str
    port: int
    path: str = ""
    what: str = "the API server"
    authority: str = ""
    authority_data: bytes = b""
    credentials: Credentials = dataclasses.field(default_factory=Credentials)
    verified: bool = True

    @classmethod
    def of(
        cls,
        url: str,
        *,
        what: str = "the API server",
        authority: str = "",
        authority_data: bytes = b"",
        credentials: Credentials | None = None,
        verified: bool = True,
    ) -> Self:
        """The server at a URL.

        Args:
            url: ``https://HOST[:PORT][/PATH]``; ``http`` for a loopback address.
            what: As the attribute; so are the others.
            authority: See there.
            authority_data: See there.
            credentials: See there.
            verified: See there; a server is only taken for what it says where it is at a loopback address, and is shown no credentials.

        Raises:
            InvalidArgumentError: It is another URL, or the server can't be recognised at such a place.
        """
        try:
            parts = urllib.parse.urlsplit(url)
            host, port = parts.hostname or "", parts.port
        except ValueError:
            host, port = "", None
            parts = urllib.parse.urlsplit("")
        plain = url.isascii() and url.isprintable() and " " not in url and "\\" not in url
        if not _is_host(host) or not plain or parts.scheme not in _PORTS or port == 0 or "@" in parts.netloc:
            # (the URL isn't shown: it may have a password)
            raise errors.InvalidArgumentError(f"the URL of {what} is none", hint="such as https://192.0.2.7:6443")
        if parts.query or parts.fragment:
            raise errors.InvalidArgumentError(f"the URL of {what} has a query")
        if (parts.scheme == "http" or not verified) and not _is_loopback(host):
            raise errors.InvalidArgumentError(
                f"the URL of {what} must begin with https://, since it is another machine's"
            )
        if not verified and credentials is not None:
            raise errors.InvalidArgumentError(f"{what} can't be recognised, and is shown no credentials")
        return cls(
            parts.scheme,
            host,
            port or _PORTS[parts.scheme],
            parts.path.rstrip("/"),
            what,
            authority,
            authority_data,
            credentials or Credentials(),
            verified,
        )

    @classmethod
    def of_kubeconfig(cls, config: kubeconfigs.Kubeconfig, *, what: str = "the API server") -> Self:
        """The server that a kubeconfig file names, with who one is there.

        Raises:
            InvalidArgumentError: Its URL is none.
        """
        return cls.of(
            config.server,
            what=what,
            authority=config.authority,
            authority_data=config.authority_data,
            credentials=config.credentials,
        )

    def as_stranger(self) -> Self:
        """The same server, whose certificate isn't looked at, and which is shown nothing: what it says has to be checked otherwise."""
        return dataclasses.replace(self, verified=False, credentials=Credentials())

    @property
    def address(self) -> str:
        """Host and port, as they stand in a URL."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def shown(self) -> str:
        """What it is for a sentence: what a person knows it as, and where it is."""
        return f"{self.what} at {self.scheme}://{self.address}{self.path}"


def _is_host(text: str) -> bool:
    """Whether a text can be looked up: an address, or a name as DNS has them (RFC 1035, 2.3.4)."""
    return ":" in text or (len(text) <= _MAX_NAME and _NAME.fullmatch(text) is not None)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
