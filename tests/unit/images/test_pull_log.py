"""What a node's log has of pulls."""

import asyncio
import logging

import pytest

from nixlet import errors
from nixlet.images import pulllog, pulls
from nixlet.store import interface
from nixlet.telemetry import progress

REFERENCE = "nix:0/nix/store/a.tar"


def step(done: int) -> pulls.Event:
    return pulls.Event(REFERENCE, step=progress.Progress("realising", done, 500, "paths", "glibc-2.40"))


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_the_end_of_a_pull(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    log = pulllog.PullLog()
    pulled = pulls.Pulled("sha256:1", 50, interface.Realised(3, 4096), 120)
    log.take(step(1))
    log.take(pulls.Event(REFERENCE, pulled=pulled))
    assert lines(caplog) == [f"pulled {REFERENCE} in 120 ms: 50 store paths, 3 of them fetched (4096 bytes)"]


def test_a_pull_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    log = pulllog.PullLog()
    log.take(pulls.Event(REFERENCE, error=errors.NotFoundError("it is gone", hint="bring it back")))
    assert lines(caplog) == [f"{REFERENCE} can't be pulled: it is gone"]
    assert caplog.records[0].__dict__["hint"] == "bring it back"


def test_a_pull_that_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    pulllog.PullLog().take(pulls.Event(REFERENCE, error=asyncio.CancelledError()))
    assert lines(caplog) == [f"the pull of {REFERENCE} was given up by its client"]


def test_what_a_long_pull_is_doing(caplog: pytest.LogCaptureFixture) -> None:
    """Now and then, not each of its steps."""
    caplog.set_level(logging.INFO)
    quick, patient = pulllog.PullLog(interval=0), pulllog.PullLog(interval=3600)
    for number in range(3):
        quick.take(step(number))
        patient.take(step(number))
    said = [f"pulling {REFERENCE}: realising {number} of 500 paths (glibc-2.40)" for number in range(3)]
    assert lines(caplog) == said
    caplog.clear()
    quick.take(pulls.Event(REFERENCE, step=progress.Progress("waiting for Nix", 0, 0, "")))
    assert lines(caplog) == [f"pulling {REFERENCE}: waiting for Nix"]


def test_a_reference_makes_no_lines_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    """It is written by whoever may create a pod."""
    log = pulllog.PullLog()
    log.take(pulls.Event("nix:0/a\nnixlet: all is well", error=errors.InvalidArgumentError("that is none")))
    assert lines(caplog) == ["'nix:0/a\\nnixlet: all is well' can't be pulled: that is none"]
