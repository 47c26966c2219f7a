"""A cluster's certificates for all tests of the client: making keys takes time."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nixlet.cluster.settings import ClusterSettings
from support import apiservers


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> ClusterSettings:
    directory: Path = tmp_path_factory.mktemp("cluster")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _fd: None)
        return apiservers.made(directory)


@pytest.fixture(autouse=True)
def _nothing_stays_open() -> Iterator[None]:
    before = apiservers.open_files()
    yield
    assert apiservers.open_files() <= before
