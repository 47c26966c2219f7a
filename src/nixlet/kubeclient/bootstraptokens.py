"""Bootstrap tokens: by which a node joins for a while, kept in the cluster as Secrets.

Kubernetes: "Authenticating with Bootstrap Tokens". The API server lets in by them, its token cleaner removes those that have ended.
"""

import base64
import binascii
import datetime
import re
from collections.abc import Sequence

import msgspec

from nixlet import errors
from nixlet.cluster import tokens
from nixlet.cluster.tokens import Token
from nixlet.kubeclient import resources
from nixlet.kubeclient.client import Client, Object

NAMESPACE = "kube-system"

#: The Secrets' type, and what their names begin with.
TYPE = "bootstrap.kubernetes.io/token"
PREFIX = "bootstrap-token-"

#: What a token may be for: to be known by the API server, to sign what is told to everybody.
AUTHENTICATION, SIGNING = "authentication", "signing"
USAGES = (SIGNING, AUTHENTICATION)

#: The group of nodes that join by a token of ours.
DEFAULT_GROUP = "system:bootstrappers:nixlet:default-node-token"

_IDENTIFIER = re.compile(r"[a-z0-9]{6}")
_GROUP = re.compile(r"system:bootstrappers:[a-z0-9:-]{0,255}[a-z0-9]")


class BootstrapToken(msgspec.Struct, frozen=True):
    """A token as the cluster has it.

    Attributes:
        identifier: What it is known by; no secret.
        secret: The rest. A secret.
        description: What a person wrote of it.
        expires: When it ends, in UTC; None: never.
        usages: What it is for.
        groups: Whom it makes of a node, beside ``system:bootstrappers``.
    """

    identifier: str
    secret: str
    description: str = ""
    expires: datetime.datetime | None = None
    usages: tuple[str, ...] = USAGES
    groups: tuple[str, ...] = (DEFAULT_GROUP,)

    def __repr__(self) -> str:
        return f"BootstrapToken({self.identifier!r})"

    @property
    def token(self) -> Token:
        """It as a token."""
        return Token(self.identifier, self.secret, bootstrap=True)

    def has_ended(self, now: datetime.datetime) -> bool:
        """Whether it is no more good."""
        return self.expires is not None and now >= self.expires


def check(usages: Sequence[str], groups: Sequence[str]) -> None:
    """Check what a person wants of a token.

    Raises:
        InvalidArgumentError: There is no such usage, or no group may be called so.
    """
    for usage in usages:
        if usage not in USAGES:
            raise errors.InvalidArgumentError(f"a token has no usage {usage!r}", hint=f"there are {', '.join(USAGES)}")
    for group in groups:
        if not _GROUP.fullmatch(group):
            raise errors.InvalidArgumentError(
                f"a token can't make a node one of the group {group!r}",
                hint="it begins with system:bootstrappers: and ends with a small letter or digit",
            )
    if groups and AUTHENTICATION not in usages:
        raise errors.InvalidArgumentError("a token that isn't for authentication makes nobody one of a group")


def add(client: Client, new: BootstrapToken) -> None:
    """Have the cluster know a token.

    Raises:
        AlreadyExistsError: It has one with that identifier.
        NixletError: As ``Client``'s methods.
    """
    check(new.usages, new.groups)
    data = {"token-id": new.identifier, "token-secret": new.secret}
    data |= {f"usage-bootstrap-{usage}": "true" for usage in new.usages}
    if new.description:
        data["description"] = new.description
    if new.expires is not None:
        data["expiration"] = new.expires.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    if new.groups:
        data["auth-extra-groups"] = ",".join(new.groups)
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": f"{PREFIX}{new.identifier}", "namespace": NAMESPACE},
        "type": TYPE,
        "data": {key: base64.b64encode(value.encode()).decode() for key, value in data.items()},
    }
    try:
        client.create(resources.SECRETS, secret, namespace=NAMESPACE)
    except errors.AlreadyExistsError as error:
        raise errors.AlreadyExistsError(
            f"the cluster has a token {new.identifier} already", hint=f"remove it: nixlet token delete {new.identifier}"
        ) from error


def listed(client: Client) -> list[BootstrapToken]:
    """The tokens that the cluster has, by their identifiers; what is damaged is none.

    Raises:
        NixletError: As ``Client``'s methods.
    """
    found = client.list(resources.SECRETS, namespace=NAMESPACE, fields=f"type={TYPE}").items
    tokens_of = [_parsed(each) for each in found]
    return sorted((each for each in tokens_of if each is not None), key=lambda each: each.identifier)


def find(client: Client, identifier: str) -> BootstrapToken | None:
    """A token by its identifier; None: there is none.

    Raises:
        NixletError: As ``Client``'s methods.
    """
    if not _IDENTIFIER.fullmatch(identifier):
        return None
    try:
        return _parsed(client.get(resources.SECRETS, f"{PREFIX}{identifier}", namespace=NAMESPACE))
    except errors.NotFoundError:
        return None


def remove(client: Client, named: str) -> str:
    """Have the cluster forget a token; its identifier.

    Args:
        client: The cluster's.
        named: The token in any of its forms, or its identifier.

    Raises:
        InvalidArgumentError: It is no bootstrap token.
        NotFoundError: There is none like it.
        NixletError: As ``Client``'s methods.
    """
    identifier = named if _IDENTIFIER.fullmatch(named) else _identifier(named)
    try:
        client.delete(resources.SECRETS, f"{PREFIX}{identifier}", namespace=NAMESPACE)
    except errors.NotFoundError as error:
        raise errors.NotFoundError(
            f"the cluster has no token {identifier}", hint="nixlet token list says which it has"
        ) from error
    return identifier


def _identifier(text: str) -> str:
    token = tokens.parse(text)
    if not token.bootstrap:
        raise errors.InvalidArgumentError(
            "this is no bootstrap token, nor the identifier of one", hint="nixlet token list says which there are"
        )
    return token.user


def _parsed(secret: Object) -> BootstrapToken | None:
    """The token that a Secret is; None where it is none, or damaged: the API server doesn't take those, either."""
    try:
        data = msgspec.convert(secret.get("data") or {}, dict[str, str])
        metadata = msgspec.convert(secret.get("metadata") or {}, dict[str, object])
        values = {key: base64.b64decode(value, validate=True).decode() for key, value in data.items()}
        expires = _moment(values.get("expiration", ""))
    except (msgspec.ValidationError, binascii.Error, UnicodeDecodeError, ValueError, OverflowError):
        return None
    if "deletionTimestamp" in metadata:
        # It is going, and waits for somebody's finalizer only.
        return None
    identifier, password = values.get("token-id", ""), values.get("token-secret", "")
    token = _known(f"{identifier}.{password}")
    if secret.get("type") != TYPE or metadata.get("name") != f"{PREFIX}{identifier}" or not token:
        return None
    usages = tuple(usage for usage in USAGES if values.get(f"usage-bootstrap-{usage}") == "true")
    groups = tuple(group for group in values.get("auth-extra-groups", "").split(",") if group)
    return BootstrapToken(identifier, password, values.get("description", ""), expires, usages, groups)


def _moment(text: str) -> datetime.datetime | None:
    """A time as it is in UTC; None: there is none.

    Raises:
        ValueError, OverflowError: It is no time, or nobody's: it has no zone.
    """
    if not text:
        return None
    found = datetime.datetime.fromisoformat(text)
    if found.tzinfo is None:
        raise ValueError("a time without a zone")
    return found.astimezone(datetime.UTC)


def _known(text: str) -> bool:
    try:
        return tokens.parse(text).bootstrap
    except errors.InvalidArgumentError:
        return False
