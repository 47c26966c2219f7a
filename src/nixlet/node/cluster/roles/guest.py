"""A node of anybody's cluster: its kubelet asks for its certificates by itself (Kubernetes: "TLS bootstrapping"), and all else is the cluster's affair."""

import asyncio
import contextlib
import dataclasses
import datetime
import logging
import os
from collections.abc import Callable

import msgspec

from nixlet import errors
from nixlet.cluster import kubeconfigs, signing, standing
from nixlet.cluster import settings as model
from nixlet.cluster.kubeconfigs import Credentials, Kubeconfig
from nixlet.cluster.layout import Layout
from nixlet.cluster.settings import ClusterSettings
from nixlet.encoding import unreadable
from nixlet.host import children as host_children
from nixlet.host import files, waits
from nixlet.kubeclient import asynchronous, discovery
from nixlet.kubeclient.asynchronous import AsyncClient
from nixlet.kubeclient.calls import Call
from nixlet.node.cluster.children import described
from nixlet.node.cluster.preflight import finding
from nixlet.node.cluster.roles import member, waiting
from nixlet.node.settings import config as node_config

#: The file of ``agent/`` with what a node knows of the cluster that it is a guest of, and how large that may be (bytes).
_KNOWN, _MAX_KNOWN = "guest.json", 64 << 10

#: The kubelet's own file, which it writes before it has its certificate, and which says where that will be.
_OWN = "kubelet.kubeconfig"

#: Seconds before a person is told to let a node in, and between two reminders.
_FIRST_REMINDER, _REMINDER = 10, 600

_log = logging.getLogger("nixlet.cluster")


class _Known(msgspec.Struct, frozen=True):
    """What a node keeps of the cluster that it is a guest of.

    Attributes:
        way: By what it was found: a URL, or a kubeconfig file.
        cluster_dns: Where the cluster's DNS is, as far as the cluster has said so.
        cluster_domain: The domain of services' names, likewise.
    """

    way: str
    cluster_dns: tuple[str, ...] = ()
    cluster_domain: str = ""


def is_one(places: Layout, way: str) -> bool:
    """Whether a node was one of somebody else's cluster that was found in this way."""
    known = _known(places)
    return known is not None and known.way == way


def _known(places: Layout) -> _Known | None:
    path = places.node(_KNOWN)
    try:
        with open(path, "rb") as file:
            return msgspec.json.decode(file.read(_MAX_KNOWN), type=_Known)
    except (FileNotFoundError, *unreadable.JSON):
        return None
    except OSError as error:
        raise files.refused(f"{path} can't be read", error) from error


class Guest(member.Member):
    """A node of a cluster that isn't nixlet's."""

    starts, bootstraps = "the kubelet", True

    def __init__(
        self,
        settings: node_config.Settings,
        found: finding.Found,
        cluster: ClusterSettings,
        way: str,
        ask: Callable[[Call], Kubeconfig],
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        """A node that is to join.

        Args:
            settings: The node's.
            found: The programs: the kubelet.
            cluster: What is known of the cluster.
            way: By what it is found, for ``is_one``.
            ask: Finds out where it is, and as whom one may ask for a certificate there; it may wait.
            tell: Learns what is waited for, in a line.
        """
        super().__init__(settings, found, cluster)
        self._way, self._ask, self._tell = way, ask, tell

    async def _have_credentials(self) -> None:
        """Find out about the cluster, for which it is waited, and write down what the kubelet needs.

        Raises:
            NixletError: The cluster isn't the one that was meant, or doesn't let us in.
        """
        patience = waiting.Patience("the node waits for its cluster", self._tell)
        while True:
            try:
                return await asynchronous.in_thread(self._write)
            except (errors.UnavailableError, errors.DeadlineExceededError) as error:
                await patience.pause(error)

    def _write(self, call: Call) -> None:
        places = self._cluster.layout
        standing.check_joins(places)
        path = places.node(_OWN)
        own = _own(path)
        if own is None and os.path.lexists(path):
            _log.warning("the kubelet asks for a certificate anew: what %s leads to isn't good, or no more", path)
        known = _known(places)
        if known is None or known.way != self._way:
            known = _Known(self._way)
        try:
            config = self._ask(call)
            authority = _authority(config)
            if own is None:
                _check_credentials(config)
            else:
                _check_same(config, authority, own, path)
            facts = _facts(config, own, call)
        except (
            errors.UnavailableError,
            errors.DeadlineExceededError,
            errors.PermissionDeniedError,
            errors.NotFoundError,
        ) as error:
            # A kubelet that has its certificates renews them by itself, and needs nobody to let it in.
            if own is None:
                raise
            _log.warning("the node starts with what it has from before: %s", error, extra={"hint": error.hint})
        else:
            files.make_directory(places.agent)
            # The API server shows the kubelet a certificate of the authority of its clients, which mostly is that of servers.
            files.write_atomically(places.node("client-ca.crt"), authority)
            kubeconfigs.write(places.node("bootstrap.kubeconfig"), config)
            if facts is not None and facts.cluster_dns:
                known = _Known(self._way, tuple(map(str, facts.cluster_dns)), facts.cluster_domain)
            files.write_atomically(places.node(_KNOWN), msgspec.json.encode(known) + b"\n", mode=0o600)
        self._configure(known)

    def _configure(self, known: _Known) -> None:
        """Have the kubelet's pods ask the cluster's DNS, as far as is known where that is."""
        if self.settings.cluster_dns:
            return
        if known.cluster_dns:
            self._cluster = dataclasses.replace(
                self._cluster,
                cluster_dns=model.addresses(",".join(known.cluster_dns), what="the cluster's clusterDNS"),
                cluster_domain=known.cluster_domain,
            )
            return
        _log.warning(
            "the cluster doesn't say where its DNS is, and pods of this node ask %s",
            ", ".join(map(str, self._cluster.dns_addresses)),
            extra={"hint": "--cluster-dns says it"},
        )

    async def _settle(self, stack: contextlib.AsyncExitStack, children: host_children.Children) -> None:
        # (it is well without a certificate, too, and while it has none it ends every five minutes)
        await children.ready(described.KUBELET)
        own = await self._unless_given_up(stack, children, waits.owned(stack, self._let_in(), "certificate"))
        client = await stack.enter_async_context(AsyncClient.of_kubeconfig(own))
        await self._have_pods(stack, children, client)

    async def _let_in(self) -> Kubeconfig:
        """Wait until the kubelet has its certificate, which a person may have to approve; its way to the cluster."""
        path, waited = self._cluster.layout.node(_OWN), 0
        while (own := await asyncio.to_thread(_own, path)) is None:
            if waited % _REMINDER == _FIRST_REMINDER:
                what = f"the kubelet waits for its certificate, which the cluster hasn't given it for {waited} s"
                hint = "kubectl get csr lists who waits; kubectl certificate approve NAME lets it in"
                _log.warning("%s", what, extra={"hint": hint})
                self._tell(f"{what}: {hint}")
            await asyncio.sleep(1)
            waited += 1
        return own


def read(path: str) -> Kubeconfig:
    """The way to a cluster that a file tells, which a node that has joined needs no more.

    Raises:
        NotFoundError: It isn't there.
        NixletError: As in ``kubeconfigs.read``.
    """
    if not os.path.exists(path):
        raise errors.NotFoundError(f"the kubeconfig {path} is not there")
    return kubeconfigs.read(path)


def _own(path: str) -> Kubeconfig | None:
    """The way to its cluster of a kubelet that has its certificate; None: it hasn't, or that isn't good now.

    Raises:
        NixletError: The file system refuses, as in ``files.refused``.
    """
    try:
        found = kubeconfigs.read(path) if os.path.exists(path) else None
    except (errors.UsageError, errors.UnsupportedError):
        # Kubelets write it in place, and a power cut leaves it empty. They ask anew, too, where they can't read it.
        return None
    return found if found is not None and _is_good(found) else None


def _is_good(own: Kubeconfig) -> bool:
    """Whether a kubelet's own certificate is good now."""
    given, now = own.credentials, datetime.datetime.now(datetime.UTC)
    try:
        if given.certificate_data:
            found = signing.parse_certificates(given.certificate_data)
        else:
            found = signing.read_certificates(given.certificate) or []
    except signing.Unreadable:
        return False
    return bool(found) and found[0].not_valid_before_utc <= now < found[0].not_valid_after_utc


def _authority(config: Kubeconfig) -> bytes:
    """The certificates of the authority that a kubeconfig names."""
    authority = config.authority_data
    if config.authority:
        with files.refusing(f"{config.authority} can't be read"), open(config.authority, "rb") as file:
            authority = file.read()
    if not authority:
        raise errors.FailedPreconditionError(
            "the kubeconfig names no certificate authority, and whoever calls the kubelet couldn't be recognised",
            hint="give it a certificate-authority",
        )
    return authority


def _check_credentials(config: Kubeconfig) -> None:
    if config.credentials == Credentials():
        raise errors.FailedPreconditionError(
            "the kubeconfig names nobody, and the cluster gives no certificate to those whom it doesn't know",
            hint="give its user a token (kubeadm token create prints one) or a client certificate",
        )


def _check_same(config: Kubeconfig, authority: bytes, own: Kubeconfig, path: str) -> None:
    """Check that a kubelet that has its certificates has them from the cluster that is meant: it would go on in the other one.

    Raises:
        FailedPreconditionError: It hasn't.
    """
    try:
        meant, had = (set(signing.parse_certificates(each)) for each in (authority, _authority(own)))
    except signing.Unreadable as error:
        raise errors.FailedPreconditionError(
            f"the certificate authority of {config.server} or {path} {error}"
        ) from error
    if not meant & had:
        raise errors.FailedPreconditionError(
            f"the cluster at {config.server} has another certificate authority than that at {own.server}, of which this node is one",
            hint=f"to have it join the other one, remove {path}",
        )
    if config.server != own.server:
        _log.warning(
            "the kubelet goes on asking %s, and not %s", own.server, config.server, extra={"hint": f"{path} says so"}
        )


def _facts(config: Kubeconfig, own: Kubeconfig | None, call: Call) -> discovery.KubeletFacts | None:
    """What the cluster wants of its kubelets; tokens end, and so a node that has its own certificates asks by them first."""
    for each in (own, config):
        found = None if each is None else discovery.kubelet_facts(each, call=call)
        if found is not None:
            return found
    return None
