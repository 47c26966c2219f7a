"""Tests that mount, without containerd."""

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def root_rights() -> None:
    assert os.geteuid() == 0, "these tests mount: run them as root"
