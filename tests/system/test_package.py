"""The package, as a user installs it: the one test that asks other machines for something."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_the_package_installs_into_an_empty_environment(tmp_path: Path) -> None:
    """sdist, wheel, and what a user gets from it, with nothing but the locked requirements."""
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert len(list((tmp_path / "dist").glob("*.tar.gz"))) == 1
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    python = str(tmp_path / "env/bin/python")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--require-hashes", "-r", str(ROOT / "requirements/runtime.txt")], check=True)
    subprocess.run([*pip, "--no-deps", str(wheel)], check=True)
    nixlet = str(tmp_path / "env/bin/nixlet")
    environment = {"PATH": os.environ["PATH"], "NIXLET_STATE_DIR": str(tmp_path)}
    for arguments, wanted in (
        (["version"], "nixlet 0.1.0"),
        (["--help"], "server"),
        (["kube", "play", "--help"], "--wait"),
    ):
        output = subprocess.run(
            [nixlet, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert wanted in output.stdout
