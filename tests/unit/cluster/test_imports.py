"""What importing the room takes: X.509 only where a certificate is looked at, and nowhere an event loop."""

import subprocess
import sys
from pathlib import Path

import pytest

from nixlet import cluster

WITH_X509 = {"certificates", "chains", "constraints", "findings", "joining", "signing", "standing"}
MODULES = sorted(path.stem for path in Path(cluster.__file__).parent.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_imported_that_is_not_needed(module: str) -> None:
    program = f"import sys, nixlet.cluster.{module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert ("cryptography" in loaded) == (module in WITH_X509)
    assert not loaded & {"asyncio", "aiohttp", "grpclib", "google"}
