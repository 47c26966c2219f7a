"""The systemd units in deploy/ say what keeps pods alive and mounts visible (systemd.service(5), systemd.exec(5))."""

import configparser
from pathlib import Path

import pytest

UNITS = sorted((Path(__file__).parents[2] / "deploy").glob("*.service"))

#: Options that put a service into a mount namespace of its own, where containerd would not see views.
NAMESPACED = ("Protect", "PrivateTmp", "PrivateMounts", "PrivateDevices", "ReadOnly", "ReadWrite", "Inaccessible", "Bind", "RootDirectory", "MountAPIVFS", "TemporaryFileSystem", "DynamicUser", "StateDirectory")  # fmt: skip


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_units(path: Path) -> None:
    unit = configparser.ConfigParser(strict=True, interpolation=None)
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


def test_there_are_two() -> None:
    assert [path.name for path in UNITS] == ["nixlet-snapshotter.service", "nixlet.service"]
