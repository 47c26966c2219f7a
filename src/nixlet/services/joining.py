"""Who may join a cluster, and what they get: a server's part of ``kubeclient.joinforms``. ``joinserver`` listens."""

import contextlib
import datetime
import ipaddress
import os
from collections.abc import Collection

import msgspec

from nixlet import errors
from nixlet.cluster import settings as model
from nixlet.cluster import tokens
from nixlet.cluster.settings import ClusterSettings
from nixlet.cluster.tokens import Token
from nixlet.host import files
from nixlet.kubeclient import bootstraptokens, joinforms, nodepasswords, resources
from nixlet.kubeclient.client import Client


class _Address(msgspec.Struct):
    type: str = ""
    address: str = ""

    def is_one_of(self, addresses: Collection[model.Address]) -> bool:
        """Whether it is among them; names never are."""
        if self.type not in {"InternalIP", "ExternalIP"}:
            return False
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(self.address) in addresses
        return False


class _Status(msgspec.Struct):
    addresses: tuple[_Address, ...] | None = None


class _Metadata(msgspec.Struct):
    name: str


class _Node(msgspec.Struct):
    """What of a Node is looked at."""

    metadata: _Metadata
    status: _Status = msgspec.field(default_factory=_Status)


class WishError(errors.InvalidArgumentError):
    """A node wants what no node may have."""


class Doorkeeper:
    """Who is let in, and what they get. Its methods wait, for threads."""

    def __init__(self, settings: ClusterSettings, client: Client, *, flannel_backend: str = "none") -> None:
        """For a cluster.

        Args:
            settings: The cluster's.
            client: The API server, as its administrator.
            flannel_backend: What routes pods' packets between nodes.
        """
        self._settings = settings
        self._client = client
        self._facts = joinforms.ClusterFacts(
            tuple(map(str, settings.cluster_cidrs)),
            tuple(map(str, settings.service_cidrs)),
            tuple(map(str, settings.dns_addresses)),
            settings.cluster_domain,
            flannel_backend,
            settings.https_listen_port,
        )

    def authority(self) -> bytes:
        """The certificates of the authority of servers.

        Raises:
            NixletError: The file system refuses, as in ``files.refused``.
        """
        return _content(self._settings.layout.tls("server-ca.crt"))

    def is_known(self, shown: Token) -> bool:
        """Whether somebody with this token may join.

        Raises:
            NixletError: It can't be found out: the API server doesn't answer, or a file can't be read.
        """
        if shown.bootstrap:
            return self._is_good(shown)
        places = self._settings.layout
        # Whoever may make servers may make agents. (both are compared, whatever the first says)
        kept = [tokens.read(os.path.join(places.server, name)) for name in ("token", "agent-token")]
        return any([shown.same_secret(each) for each in kept]) and shown.user in {tokens.NODE, tokens.SERVER}  # noqa: C419 (see above)

    def _is_good(self, shown: Token) -> bool:
        kept = bootstraptokens.find(self._client, shown.user)
        if kept is None or not shown.same_secret(kept.token) or kept.has_ended(datetime.datetime.now(datetime.UTC)):
            return False
        return bootstraptokens.AUTHENTICATION in kept.usages and bootstraptokens.DEFAULT_GROUP in kept.groups

    def let_in(self, wish: joinforms.Wish) -> joinforms.Welcome:
        """Give a node what it needs; whoever it is has shown a token.

        Raises:
            WishError: It wants what no node may have.
            TakenError: Its name is another machine's.
            NixletError: All else is the server's own affair: the API server doesn't answer, an authority is broken.
        """
        try:
            # What can be refused is refused before the name is taken.
            certificates = self._certificates(wish)
        except errors.InvalidArgumentError as error:
            raise WishError(error.message, hint=error.hint) from error
        self._check_addresses(wish)
        nodepasswords.claim(self._client, wish.node, wish.password)
        places = self._settings.layout
        authorities = {name: _content(places.node(name)).decode() for name in ("client-ca.crt", "server-ca.crt")}
        return joinforms.Welcome(self._facts, authorities, certificates)

    def _check_addresses(self, wish: joinforms.Wish) -> None:
        """Check that none of a node's addresses is another's: its certificate would say of it that it is that one.

        Raises:
            WishError: One is.
            NixletError: As ``Client``'s methods.
        """
        wanted = _addresses(wish)
        for node in self._client.list(resources.NODES).items:
            found = msgspec.convert(node, _Node)
            for each in found.status.addresses or () if found.metadata.name != wish.node else ():
                if each.is_one_of(wanted):
                    raise WishError(
                        f"the address {each.address} is that of the node {found.metadata.name}",
                        hint=f"--node-ip names another one; or, if that node is gone: kubectl delete node {found.metadata.name}",
                    )

    def _certificates(self, wish: joinforms.Wish) -> dict[str, str]:
        # X.509 is for those who sign.
        from nixlet.cluster import joining  # noqa: PLC0415 (see above)

        nodepasswords.check(wish.password)
        node = joining.Node(wish.node, _addresses(wish))
        joining.check(self._settings, node)
        if set(wish.requests) - set(joining.SIGNED_BY):
            raise errors.InvalidArgumentError("a node has no such certificate")
        now = datetime.datetime.now(datetime.UTC)

        return {
            name: joining.answer(self._settings, name, request.encode(), node, now).decode()
            for name, request in wish.requests.items()
        }


def _addresses(wish: joinforms.Wish) -> tuple[model.Address, ...]:
    return tuple(address for text in wish.addresses for address in model.addresses(text, what="the node's address"))


def _content(path: str) -> bytes:
    with files.refusing(f"{path} can't be read"), open(path, "rb") as file:
        return file.read()
