"""What a server at which nodes join shows them, and what they show it."""

import base64
import contextlib
import os
import ssl
from typing import Any

from nixlet import errors
from nixlet.cluster import subjects, tokens
from nixlet.cluster.settings import ClusterSettings
from nixlet.cluster.tokens import Token
from nixlet.host import files


class Shown:
    """What is shown to those who come: the API server's certificate as it is on the disk, also when it was renewed."""

    def __init__(self, settings: ClusterSettings) -> None:
        tls = settings.layout.tls
        self._files = (tls("serving-kube-apiserver.crt"), tls("serving-kube-apiserver.key"))
        self._authority = tls("client-ca.nochain.crt")
        self._made_of: tuple[tuple[int, int], ...] = ()
        self._current: ssl.SSLContext | None = None

    def context(self) -> ssl.SSLContext:
        """For a server, which asks for what is current with each handshake.

        Raises:
            FailedPreconditionError: They are no certificate and its key.
            NixletError: The file system refuses, as in ``files.refused``.
        """
        with files.refusing("the API server's certificate can't be read"):
            made_of = self._state()
            try:
                outer = self._made()
            except ssl.SSLError:
                raise errors.FailedPreconditionError(
                    f"{self._files[0]} is no certificate, or its key is another one's"
                ) from None
        self._current, self._made_of = outer, made_of
        outer.sni_callback = self._choose
        return outer

    def _choose(self, connection: "ssl.SSLSocket | ssl.SSLObject", _name: str, _context: ssl.SSLContext) -> None:
        # While they are being written they may not fit each other: then the former ones are shown.
        with contextlib.suppress(OSError):
            made_of = self._state()
            if made_of != self._made_of:
                self._current, self._made_of = self._made(), made_of
        if self._current is not None:
            connection.context = self._current

    def _state(self) -> tuple[tuple[int, int], ...]:
        return tuple((status.st_ino, status.st_mtime_ns) for status in map(os.stat, self._files))

    def _made(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(*self._files)
        # (an authority that is believed needs no root above it)
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        context.load_verify_locations(self._authority)
        context.verify_mode = ssl.CERT_OPTIONAL
        return context


def token(authorization: str) -> Token | None:
    """The token in a request's header: of users by Basic, bootstrap tokens by Bearer; None: there is none."""
    scheme, _, said = authorization.partition(" ")
    try:
        if scheme.lower() == "basic":
            user, _, password = base64.b64decode(said, validate=True).decode("ascii").partition(":")
            return Token(user, password) if user and password else None
        found = tokens.parse(said) if scheme.lower() == "bearer" else None
    except (ValueError, errors.InvalidArgumentError):
        # (base64's own errors are ValueErrors, and so is a letter that no text of it has)
        return None
    return found if found is not None and found.bootstrap and not found.authority else None


def node(certificate: "dict[str, Any] | None") -> str:
    """The node that a client's certificate is for, which is an authority's of the cluster; empty: none.

    Args:
        certificate: As ``ssl.SSLSocket.getpeercert`` has it.
    """
    said = [pair for name in (certificate or {}).get("subject", ()) for pair in name]
    users, groups = ([value for key, value in said if key == wanted] for wanted in ("commonName", "organizationName"))
    return subjects.node_of(users[0], groups) if len(users) == 1 else ""
