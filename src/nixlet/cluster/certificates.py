"""A cluster's certificates on the disk: made where they are missing, kept where they fit, renewed before they end.

The directory is k3s's ``server/tls``, mode 0700, and keys have mode 0600, whatever the umask is. What is there and fits is not touched. A
crash leaves files that are whole: of a pair the key is written first, and a certificate that isn't its key's is made anew.
Authorities are made once and never overwritten, since with them all nodes and users would have to come anew.
"""

import contextlib
import datetime
import os
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from cryptography import x509

from nixlet import errors
from nixlet.cluster import clock, signing, subjects
from nixlet.cluster.layout import Layout
from nixlet.cluster.settings import ClusterSettings
from nixlet.cluster.subjects import Subject
from nixlet.host import files

#: The authorities: their files' names in ``server/tls``, and what their own names begin with.
CLIENT, SERVER, REQUEST_HEADER = "client-ca", "server-ca", "request-header-ca"
ETCD_SERVER, ETCD_PEER = "etcd/server-ca", "etcd/peer-ca"
NAMES = {
    CLIENT: "nixlet-client-ca",
    SERVER: "nixlet-server-ca",
    REQUEST_HEADER: "nixlet-request-header-ca",
    ETCD_SERVER: "etcd-server-ca",
    ETCD_PEER: "etcd-peer-ca",
}

#: What an agent has to know the cluster by: whether with the chain. A kubelet believes the authority of clients alone, while those that look
#: for the API server may know the root only.
_FOR_NODES = {CLIENT: False, SERVER: True}

#: The key that service accounts' tokens are signed with, and the first of the keys in it alone.
SERVICE_KEY, CURRENT_SERVICE_KEY = "service.key", "service.current.key"


class Wanted(NamedTuple):
    """A certificate that there has to be.

    Attributes:
        service: What it belongs to, as k3s calls it for ``certificate rotate --service``.
        pair: Its files.
        authority: Who signs it.
        subject: What it says.
    """

    service: str
    pair: signing.Pair
    authority: str
    subject: Subject


class Change(NamedTuple):
    """What was written: a file, and why."""

    file: str
    reason: str


def wanted(settings: ClusterSettings) -> list[Wanted]:
    """The certificates of a server, its own node's among them."""
    places = settings.layout

    def in_tls(service: str, name: str, authority: str, subject: Subject) -> Wanted:
        return Wanted(service, signing.Pair.at(places.tls(name)), authority, subject)

    def of_node(service: str, name: str, authority: str, subject: Subject) -> Wanted:
        return Wanted(service, signing.Pair.at(places.node(name)), authority, subject)

    user, node = subjects.user, settings.node_name
    return [
        in_tls("admin", "client-admin", CLIENT, user("system:admin", subjects.MASTERS)),
        in_tls("api-server", "client-kube-apiserver", CLIENT, user(subjects.API_SERVER_USER)),
        in_tls("api-server", "serving-kube-apiserver", SERVER, subjects.api_server(settings)),
        in_tls("controller-manager", "client-controller", CLIENT, user("system:kube-controller-manager")),
        in_tls("scheduler", "client-scheduler", CLIENT, user("system:kube-scheduler")),
        in_tls("auth-proxy", "client-auth-proxy", REQUEST_HEADER, user(subjects.FRONT_PROXY)),
        in_tls("etcd", "etcd/client", ETCD_SERVER, user("etcd-client")),
        in_tls("etcd", "etcd/server-client", ETCD_SERVER, subjects.etcd(settings, "etcd-server")),
        in_tls("etcd", "etcd/peer-server-client", ETCD_PEER, subjects.etcd(settings, "etcd-peer")),
        of_node("kubelet", "client-kubelet", CLIENT, subjects.kubelet_client(node)),
        of_node("kubelet", "serving-kubelet", SERVER, subjects.kubelet_serving(node, settings.node_ips)),
        of_node("kube-proxy", "client-kube-proxy", CLIENT, subjects.kube_proxy()),
    ]


def ensure(settings: ClusterSettings, now: datetime.datetime) -> list[Change]:
    """Have all certificates of a server there and valid; what was made for that, and why.

    Raises:
        FailedPreconditionError: An authority is broken or not valid now, the clock was never set, or another process is at it.
        InvalidArgumentError: The time has no zone.
        NixletError: The file system refuses, as in ``files.refused``.
    """
    clock.check_zone(now)
    places = settings.layout
    _make_directories(places)
    with _locked(places):
        changes: list[Change] = []
        plan = wanted(settings)
        _sweep(places, plan)
        for name in (*NAMES, SERVICE_KEY.removesuffix(".key")):
            signing.keep_private(signing.Pair.at(places.tls(name)).key)
        authorities = {name: _ensured_authority(places, name, plan, now, changes) for name in NAMES}
        _publish(places, authorities)
        for each in plan:
            authority = authorities[each.authority]
            signing.keep_private(each.pair.key)
            key = readable_key(each.pair.key)
            reason = _reason(each, key, authority, now)
            if reason:
                # Whoever renews keeps the key: there is no moment in which the two files don't fit each other.
                _issue(each, key, authority, now)
                changes.append(Change(each.pair.certificate, reason))
        _ensure_service_key(places, changes)
        return changes


def rotate(settings: ClusterSettings, services: Collection[str], now: datetime.datetime) -> list[Change]:
    """Give services new keys and certificates; all of them, where none is named. Authorities stay, and the key of service accounts.

    What runs reads them anew by itself, as when they are renewed.

    Raises:
        UsageError: There is no such service.
        FailedPreconditionError: As in ``ensure``; or there is no cluster.
        NixletError: The file system refuses, as in ``files.refused``.
    """
    return rotate_planned(settings.layout, wanted(settings), services, now)


def rotate_planned(
    places: Layout, plan: list[Wanted], services: Collection[str], now: datetime.datetime
) -> list[Change]:
    """``rotate``, for certificates that are not a settings' but a plan's."""
    clock.check_zone(now)
    check_services({each.service for each in plan}, services)
    if not os.path.isdir(places.tls("")):
        raise errors.FailedPreconditionError(
            f"there are no certificates in {places.data_dir}: no server was started there yet"
        )
    changes = []
    with _locked(places):
        chosen = [each for each in plan if not services or each.service in services]
        # An authority that is broken or has ended is told before any key is gone.
        authorities = {
            name: signing.read_authority(signing.Pair.at(places.tls(name)))
            for name in {each.authority for each in chosen}
        }
        for name, authority in authorities.items():
            _check_private(places.tls(f"{name}.key"), "the certificate authority's key")
            authority.check_time(now)
        for each in chosen:
            _issue(each, None, authorities[each.authority], now)
            changes.append(Change(each.pair.certificate, "it was asked for"))
    return changes


def check_services(known: Collection[str], services: Collection[str]) -> None:
    """Check that services have certificates.

    Raises:
        UsageError: One has none.
    """
    if unknown := sorted(set(services) - set(known)):
        hint = f"there are {', '.join(sorted(known))}"
        raise errors.UsageError(f"no certificates belong to a service {unknown[0]!r}", hint=hint)


def _make_directories(places: Layout) -> None:
    files.make_directory(places.agent)
    for path in (places.server, places.tls(""), places.tls("etcd"), places.cred("")):
        if os.path.islink(path):
            raise errors.FailedPreconditionError(
                f"{path} is a link, and whoever may change what it leads to may have the cluster's keys",
                hint="have --data-dir where they are to be",
            )
        with files.refusing(f"can't make the directory {path}"):
            if files.own_directory(path, 0o700):
                files.sync_directory(os.path.dirname(path))


def _sweep(places: Layout, plan: list[Wanted]) -> None:
    """Remove what a start left that was killed while it wrote: keys, for instance."""
    stems = [*(places.tls(name) for name in NAMES), *(each.pair.key.removesuffix(".key") for each in plan)]
    paths = [*(f"{stem}{end}" for stem in stems for end in (".crt", ".nochain.crt", ".key"))]
    paths += [places.tls(name) for name in (SERVICE_KEY, CURRENT_SERVICE_KEY)]
    paths += [places.node(f"{name}.crt") for name in _FOR_NODES]
    for directory in (places.tls(""), places.tls("etcd"), places.agent):
        files.sweep(directory, [os.path.basename(path) for path in paths if os.path.dirname(path) == directory])


@contextlib.contextmanager
def _locked(places: Layout) -> Iterator[None]:
    """Be the only one who writes."""
    with files.exclusive_lock(places.tls(".lock"), what=f"the directory {places.tls('')}"):
        yield


def _ensured_authority(
    places: Layout, name: str, plan: list[Wanted], now: datetime.datetime, changes: list[Change]
) -> signing.Authority:
    pair = signing.Pair.at(places.tls(name))
    if not os.path.lexists(pair.certificate):
        signed = [
            each.pair.certificate for each in plan if each.authority == name and os.path.lexists(each.pair.certificate)
        ]
        if signed:
            raise errors.FailedPreconditionError(
                f"the certificate authority {pair.certificate} is missing, and {signed[0]} was signed by it",
                hint="bring it back from a backup, or remove all that was signed by it to begin a new cluster",
            )
        # A key that is there alone: whoever made it was cut off before anything was signed.
        try:
            key = signing.read_key(pair.key)
        except signing.Unreadable as error:
            raise errors.FailedPreconditionError(f"the certificate authority's key {pair.key} {error}") from error
        if key is None:
            _check_free(pair.key, "the certificate authority's key")
            clock.check(now)
            key = signing.new_key()
            signing.write_key(pair.key, key)
        certificate = signing.make_authority(NAMES[name], key, now)
        files.write_atomically(pair.certificate, signing.certificates_text([certificate]))
        changes.append(Change(pair.certificate, "it was missing"))
    authority = signing.read_authority(pair)
    _check_private(pair.key, "the certificate authority's key")
    authority.check_time(now)
    return authority


def _check_free(path: str, what: str) -> None:
    """Check that nothing is written over a link that leads nowhere: what it leads to isn't mounted, perhaps."""
    if os.path.lexists(path):
        raise errors.FailedPreconditionError(
            f"{what} {path} is a link that leads nowhere", hint="bring back what it leads to"
        )


def _check_private(path: str, what: str) -> None:
    """Check that nobody else has a key, or may have read it."""
    with files.refusing(f"{what} {path} can't be looked at"):
        status = os.stat(path)
    if status.st_uid not in {0, os.geteuid()} or status.st_mode & 0o077:
        whose = (
            f"belongs to user {status.st_uid}" if status.st_uid not in {0, os.geteuid()} else "can be read by others"
        )
        raise errors.FailedPreconditionError(
            f"{what} {path} {whose}", hint="have it for the node's user alone, with mode 600; others may have copied it"
        )


def _publish(places: Layout, authorities: dict[str, signing.Authority]) -> None:
    """Have authorities' certificates where programs look for them."""
    for name, authority in authorities.items():
        # The controller manager takes no chain, and who is believed by others is one authority.
        text = signing.certificates_text([authority.certificate])
        files.write_atomically(places.tls(f"{name}.nochain.crt"), text)
    for name, whole in _FOR_NODES.items():
        found = authorities[name].certificates if whole else [authorities[name].certificate]
        files.write_atomically(places.node(f"{name}.crt"), signing.certificates_text(found))


def readable_key(path: str) -> signing.Key | None:
    """A key that is no authority's: one that can't be read is none, and is made anew."""
    try:
        return signing.read_key(path)
    except signing.Unreadable:
        return None


def _reason(each: Wanted, key: signing.Key | None, authority: signing.Authority, now: datetime.datetime) -> str:
    """Why a certificate is to be made (anew); empty: it is good."""
    # (a link that leads nowhere is as good as none)
    if not os.path.exists(each.pair.certificate):
        return "it was missing"
    problem = misfit(each, key, authority)
    if problem:
        return problem
    found = signing.read_certificates(each.pair.certificate)
    assert found
    ends = found[0].not_valid_after_utc
    if now >= ends:
        return f"it has ended on {clock.day(ends)}"
    if now < found[0].not_valid_before_utc:
        return f"it is valid from {clock.day(found[0].not_valid_before_utc)}, and this machine's clock says {clock.day(now)}"
    # A new one of an authority that itself ends soon would not last longer.
    if now >= ends - signing.RENEWAL and can_be_renewed(ends, authority.ends):
        return f"it ends on {clock.day(ends)}"
    return ""


def can_be_renewed(ends: datetime.datetime, limit: datetime.datetime | None) -> bool:
    """Whether a certificate that ends so would last longer when it was made anew by an authority that ends then; None: that is broken."""
    return limit is not None and ends < limit.replace(microsecond=0)


def misfit(each: Wanted, key: signing.Key | None, authority: signing.Authority) -> str:
    """What of a certificate isn't as it should be, whatever the time is; empty: nothing, or it is missing."""

    def signed(found: list[x509.Certificate]) -> bool:
        return authority.signed(found[0]) and found[1:] == authority.certificates

    found, problem = apart(each.pair, key, signed, authority.file)
    return _difference(signing.subject_of(found[0]), each.subject) if found and not problem else problem


def apart(
    pair: signing.Pair, key: signing.Key | None, signed: Callable[[list[x509.Certificate]], bool], authority: str
) -> tuple[list[x509.Certificate], str]:
    """What a certificate's file holds, and what of it doesn't fit its key or its authority; empty: nothing, or it is missing.

    Args:
        pair: The files.
        key: What is in the one of the key.
        signed: Whether the authority has signed it.
        authority: The authority's file.
    """
    try:
        found = signing.read_certificates(pair.certificate)
    except signing.Unreadable as error:
        return [], f"it {error}"
    if found is None:
        return [], ""
    if key is None:
        return found, "its key is missing or can't be read"
    if not signing.is_of(found[0], key):
        return found, "its key is another one's"
    return found, "" if signed(found) else f"it was signed by another authority than {authority}"


def _difference(there: Subject, should: Subject) -> str:
    if there.common_name != should.common_name or set(there.organizations) != set(should.organizations):
        return f"it is for {there.common_name!r}, and should be for {should.common_name!r}"
    if lacking := sorted(set(should.names) - set(there.names)):
        return f"it lacks {', '.join(lacking)}"
    if more := sorted(set(there.names) - set(should.names)):
        return f"it has {', '.join(more)} as well"
    if (there.client, there.server) != (should.client, should.server):
        return "it is for another use"
    return ""


def _issue(each: Wanted, key: signing.Key | None, authority: signing.Authority, now: datetime.datetime) -> None:
    if key is None:
        key = signing.new_key()
        signing.write_key(each.pair.key, key)
    _write(each.pair.certificate, authority.issue(each.subject, key.public_key(), now))


def _write(path: str, certificates: list[x509.Certificate]) -> None:
    files.write_atomically(path, signing.certificates_text(certificates))


def _ensure_service_key(places: Layout, changes: list[Change]) -> None:
    """Have the key of service accounts. Keys behind the first are older ones, whose tokens are still good."""
    path = places.tls(SERVICE_KEY)
    try:
        key = signing.read_key(path)
    except signing.Unreadable as error:
        hint = "bring it back from a backup; without it no service account's token is good any more"
        raise errors.FailedPreconditionError(f"the key of service accounts {path} {error}", hint=hint) from error
    if key is None:
        _check_free(path, "the key of service accounts")
        current = places.tls(CURRENT_SERVICE_KEY)
        if os.path.lexists(current):
            raise errors.FailedPreconditionError(
                f"the key of service accounts {path} is missing, and {current} is there",
                hint="bring it back from a backup, or make it a copy of the other; no token would be good with a new one",
            )
        key = signing.new_key()
        signing.write_key(path, key)
        changes.append(Change(path, "it was missing"))
    _check_private(path, "the key of service accounts")
    signing.write_key(places.tls(CURRENT_SERVICE_KEY), key)
