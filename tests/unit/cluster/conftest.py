"""Files are written as they are, but for the disk's part: what a power cut leaves can't be tested here."""

import os

import pytest


@pytest.fixture(autouse=True)
def _without_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster's files are synced one by one, which on a busy disk takes more time than all else together."""
    monkeypatch.setattr(os, "fsync", lambda _fd: None)
