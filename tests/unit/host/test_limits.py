"""The limits of a process, in one of its own."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource
from nixlet.host import limits
limits.OPEN_FILES = 512
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
limits.raise_open_files()
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(
    ("soft", "hard", "outcome"), [(128, 1000, (512, 1000)), (128, 256, (256, 256)), (800, 1000, (800, 1000))]
)
def test_a_process_may_open_what_it_needs(soft: int, hard: int, outcome: tuple[int, int]) -> None:
    argv = [sys.executable, "-P", "-c", SCRIPT.format(soft=soft, hard=hard)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert tuple(map(int, done.stdout.split())) == outcome
