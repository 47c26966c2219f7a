"""Certificates that are renewed while a node runs; by real programs: system/test_agents.py."""

import asyncio
import datetime
import itertools
import logging
import os
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.cluster import certificates, kubeconfigs, signing, standing
from nixlet.node.cluster.children import preparing
from nixlet.node.cluster.preflight import made
from nixlet.node.cluster.roles import renewing
from nixlet.node.settings import config
from support import apiservers, clusters

DAY = datetime.timedelta(days=1)
BEGIN = datetime.datetime(2027, 1, 1, tzinfo=datetime.UTC)


class Clock:
    """A clock that goes on only while somebody sleeps, and ends the world at a moment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, days: float) -> None:
        self.now = BEGIN
        self.end = BEGIN + days * DAY
        self.slept: list[float] = []
        monkeypatch.setattr(asyncio, "sleep", self.sleep)

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += datetime.timedelta(seconds=seconds)
        if self.now >= self.end:
            raise asyncio.CancelledError


async def kept(
    clock: Clock, due: Callable[[datetime.datetime], datetime.datetime | None], renew: Callable[[], None]
) -> None:
    async def renewed() -> None:
        renew()

    with pytest.raises(asyncio.CancelledError):
        await renewing.keep(due, renewed, lambda: clock.now)


async def test_what_is_due_is_renewed_in_that_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, made = Clock(monkeypatch, 3), [BEGIN]
    await kept(clock, lambda _: made[-1] + DAY, lambda: made.append(clock.now))
    assert made == [BEGIN + days * DAY for days in range(3)]
    assert max(clock.slept) == 600


async def test_a_clock_that_jumps_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, made = Clock(monkeypatch, 400), [BEGIN]
    looked = []

    def due(now: datetime.datetime) -> datetime.datetime:
        looked.append(now)
        if len(looked) == 2:
            # (a machine that was asleep)
            clock.now += 300 * DAY
            clock.end = clock.now + DAY / 24
        return made[-1] + 275 * DAY

    await kept(clock, due, lambda: made.append(clock.now))
    assert [each - BEGIN > 300 * DAY for each in made] == [False, True]


async def test_what_fails_is_told_and_tried_again_ever_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock, tries = Clock(monkeypatch, 0.5), []

    def fail() -> None:
        tries.append(clock.now)
        raise errors.UnavailableError("nobody is there") if len(tries) < 9 else ValueError("a mistake")

    await kept(clock, lambda _: BEGIN, fail)
    pauses = [(after - before).total_seconds() for before, after in itertools.pairwise(tries)]
    assert pauses[:8] == [60, 120, 240, 480, 960, 1920, 3600, 3600]
    assert "nobody is there" in caplog.text
    # A mistake of ours ends nothing, either.
    assert "because of a mistake in nixlet" in caplog.text
    assert len(tries) > 10


async def test_what_is_no_better_afterwards_is_not_renewed_without_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock, tries = Clock(monkeypatch, 0.1), []
    await kept(clock, lambda _: BEGIN, lambda: tries.append(1))
    assert 0 < len(tries) < 10
    assert "are no better" in caplog.text


async def test_what_fails_behind_the_certificates_is_done_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """People's kubeconfig, for one, when the disk that it is on was full just then."""
    clock, made, tries = Clock(monkeypatch, 1), [BEGIN], []

    def renew() -> None:
        tries.append(clock.now)
        made.append(clock.now + 300 * DAY)
        if len(tries) < 3:
            raise errors.ResourceExhaustedError("the kubeconfig can't be written")

    await kept(clock, lambda _: made[-1], renew)
    assert [(each - BEGIN).total_seconds() for each in tries] == [0, 60, 180]


async def test_where_nothing_is_ever_due_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, tries = Clock(monkeypatch, 1), []
    await kept(clock, lambda _: None, lambda: tries.append(1))
    assert tries == []


def test_a_server_s_certificates_and_people_s_kubeconfig_are_made_anew_while_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    now = datetime.datetime.now(datetime.UTC)
    cluster = apiservers.made(tmp_path, now)
    settings = config.Settings(
        data_dir=cluster.data_dir, state_dir=cluster.state_dir, write_kubeconfig=str(tmp_path / "kubeconfig")
    )
    # It lasts for a day before its time comes.
    monkeypatch.setattr(signing, "LIFE", signing.RENEWAL + DAY)
    certificates.rotate(cluster, [], now)
    due = standing.renewal(cluster.layout, now)
    assert due is not None
    assert datetime.timedelta() < due - now <= DAY
    preparing.renew(settings, cluster)
    assert standing.renewal(cluster.layout, now) == due
    monkeypatch.setattr(signing, "LIFE", 365 * DAY)
    monkeypatch.setattr(preparing, "datetime", types.SimpleNamespace(datetime=_Later, UTC=datetime.UTC))
    preparing.renew(settings, cluster)
    later = standing.renewal(cluster.layout, now + 2 * DAY)
    assert later is not None
    assert later - due > 200 * DAY
    data = kubeconfigs.read(settings.write_kubeconfig).credentials.certificate_data
    assert data == Path(cluster.layout.tls("client-admin.crt")).read_bytes()
    assert sum("it ends on" in each.message for each in caplog.records) == 12


@pytest.mark.parametrize("lost", ["etcd", "service.key"])
def test_what_a_cluster_was_made_with_is_not_made_anew_while_it_runs(tmp_path: Path, lost: str) -> None:
    """The programs that run have what was there; by the next start nobody would know that it is another one's."""
    cluster = apiservers.made(tmp_path, datetime.datetime.now(datetime.UTC))
    settings = config.Settings(data_dir=cluster.data_dir, state_dir=cluster.state_dir)
    made.remember(settings, made.ETCD, cluster)
    Path(cluster.layout.tls(lost)).rename(tmp_path / "away")
    for each in ("service.current.key", "client-admin.crt"):
        os.unlink(cluster.layout.tls(each))
    before = clusters.content(tmp_path)
    with pytest.raises(errors.FailedPreconditionError, match=f"{lost}.* is missing, which the cluster in"):
        preparing.renew(settings, cluster)
    assert clusters.content(tmp_path) == before


class _Later(datetime.datetime):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:  # type: ignore[override]  # of our own class none is needed
        return datetime.datetime.now(tz) + 2 * DAY


def test_certificates_that_end_with_their_authority_are_not_renewed(tmp_path: Path) -> None:
    now = datetime.datetime.now(datetime.UTC)
    cluster = apiservers.made(tmp_path, now)
    nearly = now + signing.AUTHORITY_LIFE - 30 * DAY
    certificates.rotate(cluster, [], nearly)
    assert standing.renewal(cluster.layout, nearly) is None
    # The same of an agent.
    places = cluster.layout
    assert standing.renewal(places, now) == now
    for each in ("tls", "cred"):
        Path(places.server, each).rename(tmp_path / each)
    assert not standing.is_server(places)
    assert standing.renewal(places, nearly) is None
