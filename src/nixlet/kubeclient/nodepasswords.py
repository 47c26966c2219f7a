"""Node passwords: who has joined as a node keeps its name. k3s keeps them in the same way.

A node makes its password itself and shows it with every joining. Of it the cluster has a hash, in the Secret ``NAME.node-password.nixlet`` of
kube-system. When the Node object has gone, whoever comes first may have the name anew.
"""

import base64
import binascii
import contextlib
import datetime
import hashlib
import hmac
import secrets
from typing import NamedTuple

import msgspec

from nixlet import errors
from nixlet.kubeclient import resources
from nixlet.kubeclient.client import Client, Object

_NAMESPACE = "kube-system"
_SUFFIX = ".node-password.nixlet"

#: scrypt's cost, and the version of the format that says so.
_VERSION = "1"
_COST, _BLOCK, _PARALLEL, _LENGTH = 1 << 14, 8, 1, 32

#: Whoever has joined registers its Node object within this time.
_COMING = datetime.timedelta(minutes=5)

#: A password has so many characters at least and at most.
_SHORTEST, _LONGEST = 16, 128


def check(password: str) -> None:
    """Check that a text can be a node's password.

    Raises:
        InvalidArgumentError: It can't.
    """
    if not _SHORTEST <= len(password) <= _LONGEST or not password.isascii() or not password.isprintable():
        raise errors.InvalidArgumentError(f"a node's password has {_SHORTEST} to {_LONGEST} characters of ASCII's")


def new() -> str:
    """A new password: 128 bits."""
    return secrets.token_hex(16)


def hashed(password: str, salt: bytes = b"") -> str:
    """What the cluster keeps of a password."""
    salt = salt or secrets.token_bytes(16)
    found = hashlib.scrypt(password.encode(), salt=salt, n=_COST, r=_BLOCK, p=_PARALLEL, dklen=_LENGTH)
    return f"${_VERSION}:{salt.hex()}:{found.hex()}"


def fits(password: str, kept: str) -> bool:
    """Whether a password is that of which this was kept, found out in a time that says nothing of it."""
    version, _, rest = kept.removeprefix("$").partition(":")
    salt, _, _ = rest.partition(":")
    try:
        again = hashed(password, bytes.fromhex(salt)) if version == _VERSION and salt else ""
    except ValueError:
        return False
    return bool(again) and hmac.compare_digest(again.encode(), kept.encode())


class TakenError(errors.PermissionDeniedError):
    """A node's name is another machine's."""


class _Kept(NamedTuple):
    uid: str
    made: datetime.datetime | None
    hash: str


def claim(client: Client, node: str, password: str) -> None:
    """Have a node's name be whose password this is; the first who comes gets it.

    Raises:
        TakenError: Another machine has it.
        NixletError: As ``Client``'s methods.
    """
    check(password)
    name = f"{node}{_SUFFIX}"
    kept = _kept(client, name)
    if kept is not None and fits(password, kept.hash):
        return
    # One that got in by another way is somebody, too; and one that has just come isn't there yet.
    if _is_node(client, node) or (kept is not None and _is_young(kept)):
        raise _taken(node)
    if kept is not None:
        # Nobody is called so any more.
        with contextlib.suppress(errors.NotFoundError):
            client.delete(resources.SECRETS, name, namespace=_NAMESPACE, uid=kept.uid)
    try:
        client.create(resources.SECRETS, _secret(name, hashed(password)), namespace=_NAMESPACE)
    except errors.AlreadyExistsError as error:
        # Somebody else was quicker, or we ourselves by a connection that was lost.
        kept = _kept(client, name)
        if kept is None or not fits(password, kept.hash):
            raise _taken(node) from error


def _is_young(kept: _Kept) -> bool:
    return kept.made is not None and datetime.datetime.now(datetime.UTC) - kept.made < _COMING


def _taken(node: str) -> TakenError:
    return TakenError(
        f"there is a node {node} already, and this is another machine, or one that was made anew",
        hint=f"give this one another name (--node-name); or, if the other is gone: kubectl delete node {node}",
    )


def _is_node(client: Client, node: str) -> bool:
    try:
        client.get(resources.NODES, node)
    except errors.NotFoundError:
        return False
    return True


class _Metadata(msgspec.Struct, rename="camel"):
    uid: str = ""
    creation_timestamp: datetime.datetime | None = None


class _Secret(msgspec.Struct):
    metadata: _Metadata
    data: dict[str, str] = {}


def _kept(client: Client, name: str) -> _Kept | None:
    try:
        found = client.get(resources.SECRETS, name, namespace=_NAMESPACE)
    except errors.NotFoundError:
        return None
    try:
        secret = msgspec.convert(found, _Secret)
        kept = base64.b64decode(secret.data.get("hash", ""), validate=True).decode()
    except (msgspec.ValidationError, binascii.Error, UnicodeDecodeError) as error:
        raise errors.FailedPreconditionError(
            f"the Secret {_NAMESPACE}/{name} is damaged",
            hint=f"remove it: kubectl -n {_NAMESPACE} delete secret {name}",
        ) from error
    return _Kept(secret.metadata.uid, secret.metadata.creation_timestamp, kept)


def _secret(name: str, kept: str) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "namespace": _NAMESPACE},
        "type": "Opaque",
        "data": _data(kept),
    }


def _data(kept: str) -> dict[str, str]:
    return {"hash": base64.b64encode(kept.encode()).decode()}
