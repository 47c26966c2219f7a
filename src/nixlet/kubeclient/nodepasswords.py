"""Node passwords: who has joined as a node keeps its name. k3s keeps them in the same way.

A node makes its password itself and shows it with every joining. Of it the cluster has a hash, in the Secret ``NAME.node-password.nixlet`` of
kube-system, and with it when the node has joined last. When its Node object has gone, and a while has passed since then, whoever comes first may
have the name anew.
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
from nixlet.kubeclient import failures, resources
from nixlet.kubeclient.client import Client, Object

_NAMESPACE = "kube-system"
_SUFFIX = ".node-password.nixlet"

#: The Secret's annotation that says when the node has joined last (RFC 3339).
_JOINED = "nixlet.io/joined"

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
    version: str
    joined: datetime.datetime | None
    hash: str


def claim(client: Client, node: str, password: str) -> None:
    """Have a node's name be whose password this is; the first who comes gets it.

    Raises:
        TakenError: Another machine has it.
        NixletError: As ``Client``'s methods.
    """
    check(password)
    name = f"{node}{_SUFFIX}"
    kept = _kept(client, node)
    if kept is not None and fits(password, kept.hash):
        try:
            _stamp(client, name, kept)
            return
        except (errors.NotFoundError, failures.ConflictError):
            # It was removed, or we ourselves were quicker by another connection.
            kept = _kept(client, node)
            if kept is not None and fits(password, kept.hash):
                return
    # One that got in by another way is somebody, too; and one that has just come isn't there yet.
    if _is_node(client, node):
        raise _taken(node) if kept is not None else _nobody_s(node)
    if kept is not None:
        if _is_young(kept):
            raise _taken(node)
        # Nobody is called so any more.
        with contextlib.suppress(errors.NotFoundError):
            client.delete(resources.SECRETS, name, namespace=_NAMESPACE, uid=kept.uid)
    try:
        client.create(resources.SECRETS, _secret(name, hashed(password)), namespace=_NAMESPACE)
    except errors.AlreadyExistsError as error:
        # Somebody else was quicker, or we ourselves by a connection that was lost.
        kept = _kept(client, node)
        if kept is None or not fits(password, kept.hash):
            raise _taken(node) from error


def _stamp(client: Client, name: str, kept: _Kept) -> None:
    """Have it be known that the node has joined now: for a while nobody else gets its name, also where its Node isn't there yet.

    Raises:
        NotFoundError: The Secret is gone.
        ConflictError: It was changed meanwhile.
        NixletError: As ``Client``'s methods.
    """
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    change: Object = {"metadata": {"annotations": {_JOINED: now}, "resourceVersion": kept.version}}
    client.patch(resources.SECRETS, name, change, namespace=_NAMESPACE)


def _is_young(kept: _Kept) -> bool:
    return kept.joined is not None and datetime.datetime.now(datetime.UTC) - kept.joined < _COMING


def _taken(node: str) -> TakenError:
    minutes = int(_COMING.total_seconds() // 60)
    return TakenError(
        f"there is a node {node} already, and this is another machine, or one that was made anew",
        hint=f"give this one another name (--node-name); or, if the other is gone: kubectl delete node {node}, "
        f"and try it again {minutes} minutes after its last start",
    )


def _nobody_s(node: str) -> TakenError:
    return TakenError(
        f"there is a node {node} already, and nothing says whose it is: it has no Secret {_NAMESPACE}/{node}{_SUFFIX}",
        hint=f"give this one another name (--node-name); or, if it is that node: kubectl delete node {node}, and it joins anew",
    )


def _is_node(client: Client, node: str) -> bool:
    try:
        client.get(resources.NODES, node)
    except errors.NotFoundError:
        return False
    return True


class _Metadata(msgspec.Struct, rename="camel"):
    uid: str = ""
    resource_version: str = ""
    creation_timestamp: datetime.datetime | None = None
    annotations: dict[str, str] = {}


class _Secret(msgspec.Struct):
    metadata: _Metadata
    data: dict[str, str] = {}


def _kept(client: Client, node: str) -> _Kept | None:
    name = f"{node}{_SUFFIX}"
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
            hint=f"remove it, and the Node, and have the node join anew: kubectl -n {_NAMESPACE} delete secret {name}; "
            f"kubectl delete node {node}",
        ) from error
    metadata = secret.metadata
    return _Kept(metadata.uid, metadata.resource_version, _joined(metadata), kept)


def _joined(metadata: _Metadata) -> datetime.datetime | None:
    """When the node has joined last: with the Secret's making, or later."""
    try:
        stamped = msgspec.convert(metadata.annotations.get(_JOINED), datetime.datetime | None)
    except msgspec.ValidationError:
        stamped = None
    if stamped is None or stamped.tzinfo is None:
        return metadata.creation_timestamp
    return stamped if metadata.creation_timestamp is None else max(stamped, metadata.creation_timestamp)


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
