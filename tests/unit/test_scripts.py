"""The shell programs in scripts/ and what they share."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

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


def test_a_machine_without_python_gets_one(tmp_path: Path) -> None:
    script = f'top={tmp_path}; find_python() {{ return 1; }}; need_packages() {{ echo "$@"; exit 7; }}; ensure_venv dev'
    done = shell(script)
    assert (done.returncode, done.stdout) == (7, "python3 python3-venv\n")


def test_a_python_that_is_not_here_is_told() -> None:
    done = shell("ensure_venv dev 3.99")
    assert done.returncode == 125
    assert done.stderr == "error: no Python 3.99 with the venv module is installed\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_services_may_start_again_after_an_installation_that_was_cut_off(
    tmp_path: Path, number: signal.Signals
) -> None:
    policy = tmp_path / "policy-rc.d"
    script = f"service_policy={policy}; without_service_starts sh -c 'cat {policy}; kill -{number} $PPID; sleep 0.1'"
    done = shell(script)
    assert "exit 101" in done.stdout
    assert done.returncode == 128 + number
    assert not policy.exists()
    # What a shell that was killed left is taken for what it is, and a policy of the machine's owner as well.
    assert shell(f"service_policy={policy}; without_service_starts sh -c 'kill -9 $PPID'").returncode == 128 + 9
    assert policy.exists()
    assert shell(f"service_policy={policy}; without_service_starts false").returncode == 1
    assert not policy.exists()
    policy.write_text("#!/bin/sh\nexit 101\n")
    assert shell(f"service_policy={policy}; without_service_starts true").returncode == 0
    assert policy.exists()


@pytest.mark.slow
def test_an_environment_that_is_not_whole_is_made_anew_also_in_a_path_with_blanks(tmp_path: Path) -> None:
    top = tmp_path / "a checkout"
    (top / "requirements").mkdir(parents=True)
    (top / "requirements/runtime.txt").touch()
    (top / "pyproject.toml").touch()
    for name in ("src", "scripts"):
        (top / name).symlink_to(ROOT / name)
    make = f"top={shlex.quote(str(top))}; ensure_venv runtime"
    venv = top / ".venv"
    # What a make that was cut off leaves: a Python, and no pip.
    subprocess.run([sys.executable, "-I", "-m", "venv", "--without-pip", str(venv)], check=True)
    done = shell(make)
    assert done.returncode == 0, done.stderr
    (venv / "mark").touch()
    assert shell(make).stderr == ""
    # The machine's Python is another version by now, with a directory of its own.
    (packages,) = venv.glob("lib/python3.*")
    packages.rename(packages.with_name("python3.1"))
    assert shell(make).returncode == 0
    assert not (venv / "mark").exists()
    # The program starts, as far as it comes without what it needs.
    (packages,) = venv.glob("lib/python3.*/site-packages")
    (packages / "nixlet.pth").write_text(str(tmp_path))
    (tmp_path / "nixlet").mkdir()
    (tmp_path / "nixlet/__init__.py").touch()
    (tmp_path / "nixlet/__main__.py").write_text(
        "import sys\ndef main():\n    print(sys.argv[1:], sys.flags.safe_path)\n"
    )
    program = [str(venv / "bin/nixlet"), "a b", "$c"]
    assert subprocess.run(program, capture_output=True, text=True, check=True).stdout == "['a b', '$c'] True\n"


def test_a_family_is_built_once_and_leaves_the_cache_when_nobody_has_asked_for_it_for_long(tmp_path: Path) -> None:
    top, cache = tmp_path / "checkout", tmp_path / "cache"
    for name in ("scripts", "requirements"):
        (top / name).parent.mkdir(exist_ok=True)
        (top / name).mkdir()
    for name in ("scripts/lib", "scripts/offline", "requirements/runtime.txt"):
        (top / name).symlink_to(ROOT / name)
    (top / "scripts/parts").write_bytes((ROOT / "scripts/parts").read_bytes())
    for family in ("first", "second"):
        build = top / "tests/parts" / family / "build"
        build.parent.mkdir(parents=True)
        build.write_text(f"#!/bin/sh\necho >>{tmp_path}/{family}; sleep 0.2; touch $1/program\n")
        build.chmod(0o755)
    argv = ["bash", str(top / "scripts/parts")]
    environment = {**os.environ, "NIXLET_PARTS_CACHE": str(cache)}

    def parts(*families: str) -> dict[str, Path]:
        done = subprocess.run([*argv, *families], env=environment, capture_output=True, text=True, check=True)
        return {family: Path(place) for family, place in (line.split(" ", 1) for line in done.stdout.splitlines())}

    with subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, text=True) as another:
        found = parts()
        assert another.stdout is not None
        assert another.stdout.read() == "".join(f"{family} {place}\n" for family, place in found.items())
    for family in ("first", "second"):
        assert (found[family] / "program").exists()
        assert (tmp_path / family).read_text() == "\n"
    month_ago = time.time() - 32 * 86400
    for place in found.values():
        os.utime(place, (month_ago, month_ago))
    assert parts("first") == {"first": found["first"]}
    (top / "tests/parts/second/build").write_text("#!/bin/sh\ntouch $1/other\n")
    assert (parts("second")["second"] / "other").exists()
    assert (found["first"].exists(), found["second"].exists()) == (True, False)


def test_whoever_runs_a_clusters_programs_is_among_the_tests_of_clusters() -> None:
    """Where they are the others aren't told: they are built meanwhile."""
    script = (ROOT / "scripts/test").read_text()
    ours = re.search(r"grep -rlE '(.+)'", script)
    late = re.search(r"grep -vxE '(.+)'\)", script)
    assert ours
    assert late
    asked = re.compile(rf"directories\(\)\[.({late[1]}).\]|parts\.kubernetes\(\)")
    files = [file for room in ("contract", "root", "system") for file in (ROOT / "tests" / room).glob("test_*.py")]
    found = {file.name for file in files if asked.search(file.read_text())}
    assert found >= {"test_flannel.py", "test_cluster_kine.py"}
    assert not [
        name
        for name in sorted(found)
        if not any(file.name == name and re.search(ours[1], file.read_text(), re.MULTILINE) for file in files)
    ]
