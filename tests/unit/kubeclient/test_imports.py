"""What importing the room takes: TLS and HTTP only where somebody is asked."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["client", "endpoint", "resources", "calls"])
def test_nothing_is_imported_before_it_is_needed(module: str) -> None:
    program = f"import sys, nixlet.kubeclient.{module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"ssl", "http.client", "email", "asyncio", "aiohttp", "grpclib", "google", "cryptography"}
