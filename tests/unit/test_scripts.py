"""The shell programs in scripts/ and what they share."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def shell(script: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    argv = [
        "bash",
        "-euc",
        f"top={ROOT}; source $top/scripts/lib/packages.sh; source $top/scripts/lib/venv.sh; {script}",
    ]
    return subprocess.run(argv, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


def test_each_supported_python_that_is_here_is_found() -> None:
    found = {}
    for line in shell(
        'for v in "${supported_pythons[@]}"; do echo "$v $(python_of "$v" || true)"; done'
    ).stdout.splitlines():
        version, _, program = line.partition(" ")
        found[version] = program
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    classified = [each.rpartition(" ")[2] for each in project["classifiers"] if ":: 3." in each]
    assert list(found) == classified
    assert project["requires-python"] == f">={classified[0]}"
    for version, program in found.items():
        if program:
            says = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
            assert says.startswith(f"Python {version}.")
    # The one that runs this is among them, unless it is an environment's whose own is gone.
    here = "{}.{}".format(*sys.version_info)
    assert shell(f"is_python {sys.executable} {here}").returncode == 0
    assert shell(f"is_python {sys.executable} 3.1").returncode != 0


def test_what_a_foreign_directory_holds_is_not_run(tmp_path: Path) -> None:
    """A person calls the scripts from anywhere."""
    for name in ("venv", "ensurepip", "sysconfig"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'a').write(__name__)")
    assert shell(f"cd {tmp_path}; suitable_python").returncode == 0
    assert not (tmp_path / "imported").exists()


def test_a_python_that_is_not_here_is_told() -> None:
    done = shell("ensure_venv dev 3.99")
    assert done.returncode == 125
    assert done.stderr == "error: no Python 3.99 with the venv module is installed\n"
