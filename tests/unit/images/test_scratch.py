"""Temporary files, as a file system refuses them."""

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.images import scratch

LIMIT = 100_000


@pytest.fixture
def limited() -> Iterator[None]:
    """No file may be larger: as with a quota, a write that goes beyond is done in part, and the next one is refused."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("limited")
@pytest.mark.parametrize("size", [1000, LIMIT + 100, 3 * LIMIT])
def test_a_refusal_is_told_as_one_whatever_is_left_to_write(tmp_path: Path, size: int) -> None:
    def write() -> None:
        with scratch.opened("it can't be copied to", str(tmp_path)) as file:
            for _ in range(1 + LIMIT // size):
                file.write(bytes(size))

    with pytest.raises(errors.FailedPreconditionError, match=f"^it can't be copied to {tmp_path}: File too large$"):
        write()
    assert list(tmp_path.iterdir()) == []
