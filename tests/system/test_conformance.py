"""containerd's own suite for snapshotters, over the socket of `nixlet snapshotter`."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nixlet.host import mounts
from support import parts

#: What the suite has; a version with fewer cases, or one that skips some, must not pass for the whole.
CASES = 21


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory with a short name: sockets lie in it."""
    directory = Path(tempfile.mkdtemp(prefix="nc", dir="/tmp"))
    yield directory
    assert mounts.below(str(directory)) == []
    shutil.rmtree(directory)


@pytest.mark.parametrize("test", [pytest.param("TestFreshInstances", marks=pytest.mark.slow), "TestSharedInstance"])
def test_containerds_suite(short: Path, test: str) -> None:
    program = str(parts.directories()["conformance"] / "conformance")
    environment = {**os.environ, "NIXLET": f"{sys.executable} -m nixlet snapshotter", "TMPDIR": str(short)}
    argv = [program, "-test.root", "-test.v", "-test.run", f"^{test}$"]
    done = subprocess.run(argv, cwd=short, env=environment, capture_output=True, text=True, timeout=170, check=False)
    failed = re.findall(rf"--- (?:FAIL|SKIP): {test}/(\S+)", done.stdout)
    assert not failed, done.stdout[-6000:]
    assert len(re.findall(rf"--- PASS: {test}/\S+", done.stdout)) == CASES
    assert done.returncode == 0
    assert mounts.below(str(short)) == []
