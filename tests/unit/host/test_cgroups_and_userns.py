"""What /proc and /sys/fs/cgroup say, in files of our own and for this process."""

import subprocess
import sys
from pathlib import Path

import pytest

from nixlet.host import cgroups, userns


def lay_out(directory: Path, lines: str, delegated: str | None = None) -> tuple[str, str]:
    (directory / "cgroup").write_text(lines)
    if delegated is not None:
        (directory / "fs" / "user.slice").mkdir(parents=True)
        (directory / "fs" / "user.slice" / "cgroup.controllers").write_text(delegated)
    return str(directory), f"{directory}/fs"


@pytest.mark.parametrize(
    ("lines", "delegated", "wanted"),
    [
        ("0::/user.slice\n", "cpuset cpu pids\n", {"cpuset", "cpu", "pids"}),
        ("0::/user.slice\n", "\n", set()),
        ("0::/user.slice\n", None, set()),
        ("4:cpu,cpuacct:/a:b\n3:pids:/\n0::/\n", None, {"cpu", "cpuacct", "pids"}),
        ("1:name=systemd:/\n", None, {"name=systemd"}),
    ],
)
def test_controllers(tmp_path: Path, lines: str, delegated: str | None, wanted: set[str]) -> None:
    proc, root = lay_out(tmp_path, lines, delegated)
    assert cgroups.controllers(proc, root) == wanted


def test_a_test_that_is_root_has_cgroups() -> None:
    assert {"cpu", "pids"} <= cgroups.controllers()
    assert cgroups.are_ours()
    assert not cgroups.are_ours("/sys/fs/cgroup/missing")


@pytest.mark.parametrize(
    ("uid_map", "inside"),
    [
        ("         0          0 4294967295\n", False),
        ("0 1000 1\n1 100000 65536\n", True),
        ("0 0 65536\n", True),
        ("", True),
    ],
)
def test_user_namespaces(tmp_path: Path, uid_map: str, inside: bool) -> None:
    (tmp_path / "uid_map").write_text(uid_map)
    assert userns.is_inside(f"{tmp_path}/uid_map") is inside


def test_a_kernel_without_user_namespaces(tmp_path: Path) -> None:
    assert not userns.is_inside(f"{tmp_path}/uid_map")


def test_a_user_namespace_that_is_one() -> None:
    said = subprocess.run(
        ["unshare", "--user", "--map-root-user", sys.executable, "-c", "from nixlet.host import userns; print(userns.is_inside())"],
        capture_output=True, text=True, check=True, timeout=30,
    )  # fmt: skip
    assert said.stdout == "True\n"


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        ("4:cpu:/user\n3:pids:/user\n1:name=systemd:/user\n0::/else\n", "/user"),
        # (version 1 of which nothing is mounted here)
        ("4:cpu:/user\n9:misc:/\n", "/user"),
        ("4:cpu:/user\n3:pids:/\n", ""),
        ("4:cpu:/user\n3:pids:/other\n", ""),
        ("4:cpu:/\n3:pids:/\n", ""),
        ("4:cpu:/missing\n3:pids:/missing\n", ""),
        ("0::/user\n", ""),
    ],
)
def test_cgroups_that_root_has_given_us(tmp_path: Path, lines: str, wanted: str) -> None:
    (tmp_path / "cgroup").write_text(lines)
    for hierarchy in ("cpu", "pids", "systemd"):
        for name in ("user", "other"):
            (tmp_path / hierarchy / name).mkdir(parents=True)
    assert cgroups.delegated(str(tmp_path), str(tmp_path)) == wanted


def test_a_cgroup_that_is_ours_to_divide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "user.slice" / "nixlet.service"
    own.mkdir(parents=True)
    (tmp_path / "cgroup").write_text("0::/user.slice/nixlet.service\n")
    (own / "cgroup.procs").touch()
    # (version 1, and version 2 beside it)
    assert not cgroups.is_delegated(str(tmp_path), str(tmp_path))
    (tmp_path / "cgroup.controllers").touch()
    assert cgroups.is_delegated(str(tmp_path), str(tmp_path))
    (own / "cgroup.procs").unlink()
    assert not cgroups.is_delegated(str(tmp_path), str(tmp_path))
