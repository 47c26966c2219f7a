"""Certificates by what they say themselves: for those who look at a data directory without the settings that it was made by.

What the settings would have otherwise (another name for the API server, say) is the next start's affair, which looks at them.
"""

import datetime
import ipaddress
import os
from collections.abc import Collection
from typing import NamedTuple

from cryptography import x509

from nixlet import errors
from nixlet.cluster import certificates, clock, findings, kubeconfigs, signing
from nixlet.cluster.findings import Finding
from nixlet.cluster.layout import Layout
from nixlet.cluster.settings import ClusterSettings
from nixlet.cluster.subjects import Subject
from nixlet.host import files

#: What an agent has of its cluster's authorities, and the services of its own certificates by their files' names.
_AUTHORITIES = ("client-ca", "server-ca")
_OF_AGENTS = {
    "client-kubelet": ("kubelet", "client-ca"),
    "serving-kubelet": ("kubelet", "server-ca"),
    "client-kube-proxy": ("kube-proxy", "client-ca"),
}

#: The files of ``agent/`` by which a kubelet that asks for its certificate by itself is let in the first time, and from then on.
_FIRST, _OWN = "bootstrap.kubeconfig", "kubelet.kubeconfig"


class Rotated(NamedTuple):
    """What has become of certificates that were to be made anew.

    Attributes:
        changes: Those that were.
        left: The files of those that are missing or can't be read: nothing says whom they are for. The server's next start makes them.
    """

    changes: list[certificates.Change]
    left: list[str]


def is_server(places: Layout) -> bool:
    """Whether a server was started in a data directory.

    Raises:
        PermissionDeniedError: We may not look.
        NixletError: The file system refuses, as in ``files.refused``.
    """
    return _is_there(places, places.tls(""))


def check_joins(places: Layout) -> None:
    """Check that a node with this data directory may join a cluster.

    Raises:
        FailedPreconditionError: It is a server's.
        NixletError: As in ``is_server``.
    """
    if is_server(places):
        raise errors.FailedPreconditionError(
            f"{places.data_dir} is a server's, and its node belongs to that cluster",
            hint="--data-dir names another directory for the node that joins",
        )


def _is_there(places: Layout, path: str) -> bool:
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except PermissionError as error:
        raise errors.PermissionDeniedError(
            f"{places.data_dir} can't be looked into: {error.strerror}", hint="run it as root"
        ) from error
    except OSError as error:
        raise files.refused(f"{path} can't be looked at", error) from error
    return True


def plan(places: Layout) -> list[certificates.Wanted]:
    """The certificates of a server, each for whom it says; a missing one, or one that can't be read, is for nobody.

    Raises:
        NixletError: The file system refuses, as in ``files.refused``.
    """
    # Which there are doesn't depend on the settings.
    anybody = ClusterSettings(places.data_dir, places.state_dir, "anybody", (ipaddress.IPv4Address("192.0.2.1"),))
    return [each._replace(subject=_subject(each.pair.certificate)) for each in certificates.wanted(anybody)]


def _subject(file: str) -> Subject:
    try:
        found = signing.read_certificates(file)
    except signing.Unreadable:
        found = None
    return Subject("") if found is None else signing.subject_of(found[0])


def check(places: Layout, now: datetime.datetime) -> list[Finding]:
    """How a node's certificates are, a server's, an agent's, or a kubelet's that asks for them by itself; authorities first. Nothing is changed.

    Raises:
        FailedPreconditionError: There is no cluster.
        PermissionDeniedError: We may not look.
        NixletError: The file system refuses, as in ``files.refused``.
    """
    if is_server(places):
        return findings.check_planned(places, plan(places), now)
    clock.check_zone(now)
    if not any(_is_there(places, places.node(f"{name}.crt")) for name in (*_AUTHORITIES, *_OF_AGENTS)):
        raise _no_cluster(places)
    own = _own(places)
    return check_agent(places, now) if own is None else _check_guest(places, own, now)


def check_agent(places: Layout, now: datetime.datetime) -> list[Finding]:
    """How the certificates of a node are that has them from a server of nixlet's, or should.

    Raises:
        NixletError: The file system refuses, as in ``files.refused``.
    """
    found = []
    for name in _AUTHORITIES:
        file = places.node(f"{name}.crt")
        found.append(findings.finding(findings.AUTHORITIES, file, "", now, "the server has it from its own", None))
    for name, (service, authority) in _OF_AGENTS.items():
        pair = signing.Pair.at(places.node(name))
        issuer = places.node(f"{authority}.crt")
        problem = _problem(pair, issuer)
        found.append(findings.finding(service, pair.certificate, problem, now, "so does its authority", _end(issuer)))
    return found


def _own(places: Layout) -> signing.Pair | None:
    """The files of the certificate that a kubelet has asked for by itself, empty names before it has it; None: a server of nixlet's makes it."""
    path = places.node(_OWN)
    named = signing.Pair("", "")
    try:
        if _is_there(places, path):
            credentials = kubeconfigs.read(path).credentials
            named = signing.Pair(credentials.certificate, credentials.key)
    except (errors.UsageError, errors.UnsupportedError):
        # (it asks anew)
        pass
    if named.certificate:
        # (by another path, where the data directory is a link or was moved)
        return None if os.path.basename(named.certificate) == "client-kubelet.crt" else named
    return named if _is_there(places, places.node(_FIRST)) else None


def _check_guest(places: Layout, own: signing.Pair, now: datetime.datetime) -> list[Finding]:
    """How the certificate of a kubelet is that renews it by itself, and the authority that it knows its cluster by."""
    authority = places.node("client-ca.crt")
    found = [findings.finding(findings.AUTHORITIES, authority, "", now, "the cluster has it from its own", None)]
    if not own.certificate or not _is_there(places, own.certificate):
        path, why = own.certificate or places.node(_OWN), "the cluster hasn't given the kubelet its certificate yet"
        return [*found, Finding("kubelet", path, None, None, None, findings.State.MISSING, why)]
    key = certificates.readable_key(own.key)
    problem = certificates.apart(own, key, lambda _: True, authority)[1]
    return [*found, findings.finding("kubelet", own.certificate, problem, now, "the kubelet renews it by itself", None)]


def _end(authority: str) -> datetime.datetime:
    """When an authority ends that an agent has of its server: what that one signs ends then at the latest."""
    try:
        found = signing.read_certificates(authority)
    except signing.Unreadable:
        found = None
    if not found:
        # (a server may have a better one)
        return datetime.datetime.max.replace(tzinfo=datetime.UTC)
    return min(each.not_valid_after_utc for each in found)


def renewal(places: Layout, now: datetime.datetime) -> datetime.datetime | None:
    """When the first of a node's certificates is to be made anew, which may be now; None: none ever is.

    Raises:
        NixletError: As ``check``.
    """
    return min((each.renewal for each in check(places, now) if each.renewal is not None), default=None)


def _problem(pair: signing.Pair, authority: str) -> str:
    """What of an agent's certificate doesn't fit; empty: nothing, or it is missing."""
    try:
        issuers = signing.read_certificates(authority) or []
    except signing.Unreadable as error:
        return f"{authority} {error}"

    def signed(found: list[x509.Certificate]) -> bool:
        return any(signing.is_signed_by(found[0], each) for each in issuers)

    return certificates.apart(pair, certificates.readable_key(pair.key), signed, authority)[1]


def rotate(places: Layout, services: Collection[str], now: datetime.datetime) -> Rotated:
    """Give services of a server new keys and certificates for the same; all of them, where none is named.

    Raises:
        UsageError: There is no such service.
        FailedPreconditionError: An authority is broken, is not valid now, or isn't its owner's alone; another process is at it; or there is
            no server.
        PermissionDeniedError: We may not look.
        NixletError: The file system refuses, as in ``files.refused``.
    """
    if not is_server(places):
        if _own(places) is not None:
            raise errors.FailedPreconditionError(
                f"{places.data_dir} is a node's of a cluster that isn't nixlet's, which makes its certificates",
                hint="the kubelet asks it for new ones by itself",
            )
        if _is_there(places, places.node("client-kubelet.crt")):
            raise errors.FailedPreconditionError(
                f"{places.data_dir} is an agent's, and its certificates are its server's to make",
                hint=f"start the agent anew: it asks for new ones; and for new keys, where {places.node('*.key')} are removed before",
            )
        raise _no_cluster(places)
    known = plan(places)
    certificates.check_services({each.service for each in known}, services)
    chosen = [each for each in known if not services or each.service in services]
    left = [each.pair.certificate for each in chosen if each.subject == Subject("")]
    there = [each for each in chosen if each.subject != Subject("")]
    return Rotated(certificates.rotate_planned(places, there, (), now) if there else [], left)


def _no_cluster(places: Layout) -> errors.FailedPreconditionError:
    return errors.FailedPreconditionError(
        f"there are no certificates in {places.data_dir}: no node of a cluster was started there yet",
        hint="--data-dir says where another node's are",
    )
