"""Tokens by which nodes join: k3s's formats (docs.k3s.io/cli/token) and kubeadm's bootstrap tokens.

A token is never shown: not by its representation, not in errors. Whoever has a server's token is the cluster's master.
"""

import dataclasses
import hashlib
import hmac
import os
import re
import secrets
import string

from nixlet import errors
from nixlet.cluster.layout import Layout
from nixlet.host import files

#: The users that tokens are for: servers may do all, nodes may join as agents.
SERVER, NODE = "server", "node"

#: What a token with the hash of the cluster's authority begins with.
_FULL = "K10"

#: Tokens in files and from people are no longer than this (characters).
_MAX_LENGTH = 1024

_HASH = re.compile(r"[0-9a-f]{64}")
_BOOTSTRAP = re.compile(r"([a-z0-9]{6})\.([a-z0-9]{16})")
_SMALL = string.ascii_lowercase + string.digits
_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----(.*?)-----END CERTIFICATE-----", re.DOTALL)


@dataclasses.dataclass(frozen=True, slots=True)
class Token:
    """A token, taken apart.

    Attributes:
        user: Whom it is for: ``server`` or ``node``; empty: a short token doesn't say. A bootstrap token's ID.
        password: The secret.
        authority: The hash of the cluster's certificate authority, in hexadecimal; empty: a short token has none.
        bootstrap: It is a bootstrap token, which ends by itself and is kept in the cluster.
    """

    user: str
    password: str = dataclasses.field(repr=False)
    authority: str = ""
    bootstrap: bool = False

    def credentials(self) -> str:
        """What is shown to a server once it is known to be the right one. A secret."""
        return f"{self.user}.{self.password}" if self.bootstrap else f"{self.user}:{self.password}"

    def full(self, bundle: bytes) -> str:
        """The token as it is handed to others, with the hash of an authority. A secret.

        Args:
            bundle: The authority's certificates, as a server hands them out.

        Raises:
            InvalidArgumentError: That is no certificate, or the password is too long for a token that can be read.
        """
        found = f"{_FULL}{authority_hash(bundle)}::{self.credentials()}"
        if len(found) > _MAX_LENGTH:
            most = _MAX_LENGTH - len(found) + len(self.password)
            raise _malformed(f"has a password of more than {most} characters")
        return found

    def same_secret(self, other: "Token") -> bool:
        """Whether two tokens have the same secret, found out in a time that says nothing of it."""
        return same(self.password, other.password)

    def check_authority(self, bundle: bytes) -> None:
        """Check that a server's authority is the one that the token was made for, before it is shown the secret.

        A short token knows none: whoever answers is believed.

        Raises:
            PermissionDeniedError: It is another one.
            InvalidArgumentError: What the server handed out is no certificate.
        """
        if self.authority and not same(self.authority, authority_hash(bundle)):
            raise errors.PermissionDeniedError(
                "the server has another certificate authority than the one that the token was made for",
                hint="take the token from the server's file server/token, and see that the address is the server's",
            )


def same(one: str, other: str) -> bool:
    """Whether two secrets are equal, found out in a time that doesn't say where they differ, nor how long they are."""
    return hmac.compare_digest(*(hashlib.sha256(text.encode()).digest() for text in (one, other)))


def parse(text: str) -> Token:
    """A token, taken apart.

    The formats are ``K10<hash>::<user>:<password>``, ``K10<hash>::<bootstrap token>`` and a bootstrap token; all else that doesn't begin with
    ``K10`` is a password.

    Raises:
        InvalidArgumentError: It is none of them. The sentence has nothing of it.
    """
    text = text.strip()
    if not text:
        raise _malformed("is empty")
    if len(text) > _MAX_LENGTH:
        raise _malformed(f"is longer than {_MAX_LENGTH} characters")
    if not text.isascii():
        raise _malformed("has other characters than ASCII's in it")
    if not text.isprintable() or " " in text:
        raise _malformed("has blanks or control characters in it")
    if not text.startswith(_FULL):
        return _bootstrap(text, "") or Token("", text)
    authority, separator, credentials = text.removeprefix(_FULL).partition("::")
    if not separator:
        raise _malformed("begins with K10 and lacks the part after ::")
    authority = authority.lower()
    if not _HASH.fullmatch(authority):
        raise _malformed("has no SHA-256 sum between K10 and ::")
    found = _bootstrap(credentials, authority)
    if found is not None:
        return found
    user, separator, password = credentials.partition(":")
    if not user or not separator or not password:
        raise _malformed("has no user and password after ::")
    if user not in {SERVER, NODE}:
        raise _malformed("is neither a server's nor a node's")
    return Token(user, password, authority)


def _malformed(problem: str) -> errors.InvalidArgumentError:
    return errors.InvalidArgumentError(
        f"the token {problem}", hint="it is K10<hash>::server:<password>, a bootstrap token, or the password alone"
    )


def _bootstrap(text: str, authority: str) -> Token | None:
    match = _BOOTSTRAP.fullmatch(text)
    return None if match is None else Token(match[1], match[2], authority, bootstrap=True)


def read(path: str) -> Token:
    """The token in a file.

    Raises:
        InvalidArgumentError: It holds none.
        NixletError: The file system refuses, as in ``files.refused``.
    """
    with files.refusing(f"the token's file {path} can't be read"), open(path, "rb") as file:
        data = file.read(_MAX_LENGTH + 2)
    try:
        return parse(data.decode("ascii"))
    except UnicodeDecodeError:
        # Its cause would hold what was read.
        raise errors.InvalidArgumentError(f"{path} holds no token: it has other characters than a token's") from None
    except errors.InvalidArgumentError as error:
        raise errors.InvalidArgumentError(f"{path} holds no token: {error.message}", hint=error.hint) from None


def new_password() -> str:
    """A new secret for a server's or a node's token: 128 bits, as k3s makes them."""
    return secrets.token_hex(16)


def new_bootstrap() -> Token:
    """A new bootstrap token."""
    identifier, secret = ("".join(secrets.choice(_SMALL) for _ in range(length)) for length in (6, 16))
    return Token(identifier, secret, bootstrap=True)


def authority_hash(bundle: bytes) -> str:
    """The hash of an authority, as k3s takes it: of the text as it is, or of the root in DER form where it is a chain.

    Raises:
        InvalidArgumentError: It holds no certificate.
    """
    found = len(_CERTIFICATE.findall(bundle))
    if found == 0:
        raise errors.InvalidArgumentError("the certificate authority's file holds no certificate")
    if found > 1:
        # Most clusters sign their authorities themselves, and a node that joins one needn't wait for X.509.
        from nixlet.cluster import chains  # noqa: PLC0415 (see above)

        bundle = chains.root(bundle) or bundle
    return hashlib.sha256(bundle).hexdigest()


def keep(places: Layout, bundle: bytes, *, given: str = "", agent: str = "") -> Token:
    """Have a cluster's tokens in their files (mode 0600): ``server/token``, ``server/node-token``, and ``server/agent-token``.

    Args:
        places: Where.
        bundle: The certificates of the authority of servers.
        given: A token that a person has given; empty: the one that is there, else a new one.
        agent: Another one that nodes join by as agents; empty: the same.

    Returns:
        The server's token.

    Raises:
        FailedPreconditionError: The cluster has another token than the one that was given, or another process is at it.
        InvalidArgumentError: What is given, or is there, is no token for this; the file is left as it is.
        NixletError: The file system refuses, as in ``files.refused``.
    """
    with files.exclusive_lock(os.path.join(places.server, ".lock"), what=f"the directory {places.server}"):
        return _kept(places, bundle, given, agent)


def _kept(places: Layout, bundle: bytes, given: str, agent: str) -> Token:
    files.sweep(places.server, ("token", "node-token", "agent-token"))
    path = os.path.join(places.server, "token")
    there = read(path) if os.path.lexists(path) else None
    wanted = _given(given, bundle, SERVER) if given else None
    if there is not None and wanted is not None and not there.same_secret(wanted):
        raise errors.FailedPreconditionError(
            f"the cluster in {places.data_dir} was made with another token", hint=f"give none: it is kept in {path}"
        )
    if there is not None and (there.bootstrap or there.user not in {"", SERVER}):
        kind = "bootstrap" if there.bootstrap else there.user
        raise errors.InvalidArgumentError(f"{path} holds a {kind} token, which can't be a server's")
    password = (there or wanted or Token(SERVER, new_password())).password
    token = Token(SERVER, password, authority_hash(bundle))
    text = token.full(bundle)
    of_agents = Token(NODE, _given(agent, bundle, NODE).password).full(bundle) if agent else ""
    _write(path, text)
    files.link_atomically(os.path.join(places.server, "node-token"), "token")
    agent_path = os.path.join(places.server, "agent-token")
    if of_agents:
        _write(agent_path, of_agents)
    else:
        files.link_atomically(agent_path, "token")
    return token


def rotate(places: Layout, *, old: str = "", new: str = "") -> str:
    """Give a server another token, at once for whoever asks to join; the new one, as it is handed to others.

    Args:
        places: Where.
        old: The one that there is; empty: whichever it is.
        new: A password, or a server's token; empty: any.

    Raises:
        FailedPreconditionError: There is none, or another process is at it.
        PermissionDeniedError: The old one is another one, or the new one is for another authority.
        InvalidArgumentError: What is given is no token for this; it is the same as before.
        NixletError: The file system refuses, as in ``files.refused``.
    """
    path = os.path.join(places.server, "token")
    authority = places.tls("server-ca.crt")
    if not os.path.lexists(path) or not os.path.lexists(authority):
        raise errors.FailedPreconditionError(
            f"there is no token in {places.data_dir}: no server was started there yet",
            hint="--data-dir says where another one is",
        )
    with files.exclusive_lock(os.path.join(places.server, ".lock"), what=f"the directory {places.server}"):
        with files.refusing(f"{authority} can't be read"), open(authority, "rb") as file:
            bundle = file.read()
        there = read(path)
        if old and not there.same_secret(parse(old)):
            raise errors.PermissionDeniedError("the server's token is another one", hint=f"it is in {path}")
        password = _given(new, bundle, SERVER).password if new else new_password()
        if same(password, there.password):
            raise errors.InvalidArgumentError("the new token is the one that there is")
        text = Token(SERVER, password).full(bundle)
        # (what leads to it, node-token for one, goes on leading to it)
        _write(path, text)
        return text


def _given(text: str, bundle: bytes, user: str) -> Token:
    token = parse(text)
    if token.bootstrap or token.user not in {"", user}:
        kind = "bootstrap" if token.bootstrap else token.user
        raise errors.InvalidArgumentError(
            f"a {kind} token can't be the token that a {user} joins by", hint="give a password"
        )
    token.check_authority(bundle)
    return token


def _write(path: str, text: str) -> None:
    files.write_atomically(path, f"{text}\n", mode=0o600)
