"""The systemd units in deploy/ say what keeps pods alive and mounts visible (systemd.service(5), systemd.exec(5))."""

import configparser
import subprocess
import sys
from pathlib import Path

import pytest

UNITS = sorted((Path(__file__).parents[2] / "deploy").glob("*.service"))

#: Options that put a service into a mount namespace of its own, where containerd would not see views.
NAMESPACED = ("Protect", "PrivateTmp", "PrivateMounts", "PrivateDevices", "ReadOnly", "ReadWrite", "Inaccessible", "Bind", "RootDirectory", "MountAPIVFS", "TemporaryFileSystem", "DynamicUser", "StateDirectory")  # fmt: skip


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_units(path: Path) -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)  # a list is a key more than once
    unit.optionxform = str  # type: ignore[method-assign, assignment]  # names as they stand: configparser's way
    unit.read_string(path.read_text())
    service = unit["Service"]
    assert service["Type"] == "notify"
    assert int(service["WatchdogSec"]) > 0
    assert service["FileDescriptorStoreMax"] == "1"
    assert service["Restart"] in {"always", "on-failure"}
    assert not [option for option in service if option.startswith(NAMESPACED)]
    if path.name == "nixlet.service":
        assert (service["KillMode"], service["Delegate"]) == ("process", "yes")
        assert service["ExecStart"].endswith("/nixlet server")


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_systemd_has_nothing_to_say_against_them(path: Path, tmp_path: Path) -> None:
    # It wants to see the program.
    (tmp_path / path.name).write_text(path.read_text().replace("/usr/local/bin/nixlet ", f"{sys.executable} "))
    argv = ["systemd-analyze", "verify", "--man=no", str(tmp_path / path.name)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_snapshotter_that_fails_keeps_no_containerd_down() -> None:
    """It comes before containerd, which starts and stops by itself all the same."""
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.read_string((UNITS[0].parent / "nixlet-snapshotter.service").read_text())
    assert unit["Unit"]["Before"] == "containerd.service"
    assert unit["Install"]["WantedBy"] == "multi-user.target containerd.service"
    assert "RequiredBy" not in unit["Install"]


def test_there_are_two() -> None:
    assert [path.name for path in UNITS] == ["nixlet-snapshotter.service", "nixlet.service"]
