"""How a cluster's certificates are, for those who ask: nothing is changed."""

import datetime
import enum
from typing import NamedTuple

from nixlet import errors
from nixlet.cluster import certificates, clock, signing
from nixlet.cluster.layout import Layout
from nixlet.cluster.settings import ClusterSettings
from nixlet.cluster.subjects import Subject

#: What k3s calls authorities where it lists certificates by service.
AUTHORITIES = "certificate-authority"


class State(enum.StrEnum):
    """How a certificate is."""

    VALID = "valid"
    #: It is being renewed, or will be at the next start.
    ENDING = "ends soon"
    ENDED = "ended"
    #: It begins in the future, or the clock is wrong.
    FUTURE = "not valid yet"
    #: It will be made anew at the next start; of an authority: it is broken, and the node doesn't start.
    MISFIT = "does not fit"
    MISSING = "missing"


class Finding(NamedTuple):
    """A certificate as it is on the disk.

    Attributes:
        service: As in ``Wanted``.
        file: Its file.
        subject: Whom it is for; None where that can't be read.
        not_before: When it begins to be valid.
        not_after: When it ends.
        state: How it is.
        detail: What is wrong, where something is.
        renewal: When it is made anew, now where it can't be used; None: never, or by a person.
    """

    service: str
    file: str
    subject: Subject | None
    not_before: datetime.datetime | None
    not_after: datetime.datetime | None
    state: State
    detail: str = ""
    renewal: datetime.datetime | None = None


def check(settings: ClusterSettings, now: datetime.datetime) -> list[Finding]:
    """How a server's certificates are: authorities first. Nothing is changed.

    Raises:
        NixletError: The file system refuses, as in ``files.refused``.
    """
    return check_planned(settings.layout, certificates.wanted(settings), now)


def check_planned(places: Layout, plan: list[certificates.Wanted], now: datetime.datetime) -> list[Finding]:
    """``check``, for certificates that are not a settings' but a plan's."""
    clock.check_zone(now)
    authorities: dict[str, signing.Authority | None] = {}
    findings = []
    for name in certificates.NAMES:
        pair = signing.Pair.at(places.tls(name))
        problem = ""
        authorities[name] = None
        try:
            authorities[name] = signing.read_authority(pair)
        except errors.FailedPreconditionError as error:
            problem = error.message
        hint = "authorities are not renewed by themselves"
        findings.append(finding(AUTHORITIES, pair.certificate, problem, now, hint, None))
    for each in plan:
        authority = authorities[each.authority]
        problem = (
            "" if authority is None else certificates.misfit(each, certificates.readable_key(each.pair.key), authority)
        )
        hint = "so does its authority" if authority is not None else "it is not renewed while its authority is broken"
        limit = None if authority is None else authority.ends
        findings.append(finding(each.service, each.pair.certificate, problem, now, hint, limit))
    return findings


def finding(
    service: str, file: str, problem: str, now: datetime.datetime, kept: str, limit: datetime.datetime | None
) -> Finding:
    """How a certificate's file is.

    Args:
        service: As in ``Wanted``.
        file: The file.
        problem: What is wrong with it, whatever the time is; empty: nothing.
        now: The time.
        kept: Why one that ends soon isn't renewed.
        limit: It is renewed where it ends before this; None: it isn't.

    Raises:
        NixletError: The file system refuses, as in ``files.refused``.
    """
    at_once = None if limit is None else now
    try:
        found = signing.read_certificates(file)
    except signing.Unreadable as error:
        return Finding(service, file, None, None, None, State.MISFIT, problem or f"it {error}", at_once)
    if found is None:
        return Finding(service, file, None, None, None, State.MISSING, problem, at_once)
    begins, ends = found[0].not_valid_before_utc, found[0].not_valid_after_utc
    state, detail, renewal = State.VALID, problem, at_once
    if now < begins:
        state = State.FUTURE
        detail = detail or f"it is valid from {clock.day(begins)}, and this machine's clock says {clock.day(now)}"
    elif now >= ends:
        state, detail = State.ENDED, detail or f"it has ended on {clock.day(ends)}"
    elif problem:
        state = State.MISFIT
    else:
        renewal = ends - signing.RENEWAL if certificates.can_be_renewed(ends, limit) else None
        if now >= ends - signing.RENEWAL:
            hint = kept if renewal is None else "the node renews it while it runs, or when it starts"
            state, detail = State.ENDING, f"it ends on {clock.day(ends)}; {hint}"
    return Finding(service, file, signing.subject_of(found[0]), begins, ends, state, detail, renewal)
