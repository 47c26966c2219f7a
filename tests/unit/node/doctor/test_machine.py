"""What is looked at on a machine, with machines of other kinds in files."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from nixlet import errors
from nixlet.host import network
from nixlet.node.doctor import checks, machine
from nixlet.node.settings import config

ROUTES = """Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t00000000\t0101A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0
eth0\t0001A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
wg0\t0000400A\t00000000\t0001\t0\t0\t0\t00C0FFFF\t0\t0\t0
nixlet0\t0000CA0A\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0
"""


@pytest.fixture
def routes(tmp_path: Path) -> str:
    (tmp_path / "route").write_text(ROUTES)
    return str(tmp_path / "route")


def test_routes_are_read_as_the_kernel_writes_them(routes: str) -> None:
    found = {name: [str(network) for network in networks] for name, networks in machine.routes(routes).items()}
    assert found == {"eth0": ["192.168.1.0/24"], "wg0": ["10.64.0.0/18"], "nixlet0": ["10.202.0.0/16"]}


def test_addresses_that_are_somebody_elses(routes: str) -> None:
    assert machine.addresses_free("10.63.0.0/16", "nixlet0", routes) == "10.63.0.0/16 is free"
    with pytest.raises(machine.Worse, match=r"10.64.0.0/12 overlaps 10.64.0.0/18, which is on wg0"):
        machine.addresses_free("10.64.0.0/12", "nixlet0", routes)
    # The node's own bridge may have them.
    assert machine.addresses_free("10.202.0.0/16", "nixlet0", routes) == "10.202.0.0/16 is free"


@pytest.mark.parametrize(
    ("free", "inodes", "files", "outcome"),
    [
        (100 << 30, 1_000_000, 2_000_000, None),
        (100 << 30, 0, 0, None),
        (1 << 30, 1_000_000, 2_000_000, machine.Worse),
        (100 << 30, 10_000, 2_000_000, machine.Worse),
        (1 << 20, 1_000_000, 2_000_000, errors.UnavailableError),
        (100 << 30, 10, 2_000_000, errors.UnavailableError),
    ],
)
def test_room(
    monkeypatch: pytest.MonkeyPatch, free: int, inodes: int, files: int, outcome: type[Exception] | None
) -> None:
    status = SimpleNamespace(f_bavail=free >> 12, f_frsize=4096, f_favail=inodes, f_files=files)
    monkeypatch.setattr(os, "statvfs", lambda _: status)
    if outcome is None:
        assert "GiB free at /srv" in machine.space("/srv")
    else:
        with pytest.raises(outcome):
            machine.space("/srv")


def test_kernel_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look = machine._at_least("kernel.keys.root_maxkeys", 10_000, "each container takes one")
    monkeypatch.setattr(machine, "_number", lambda path: {"/proc/sys/kernel/keys/root_maxkeys": 200}[path])
    with pytest.raises(machine.Worse) as raised:
        look()
    assert raised.value.evidence == "kernel.keys.root_maxkeys is 200: each container takes one"
    assert raised.value.remedy == "sysctl -w kernel.keys.root_maxkeys=10000"


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("1.5.9", "was never tried"),
        ("1.6.20", "can't be bound"),
        ("2.5.0", "was never tried"),
        ("nonsense", "was never tried"),
    ],
)
def test_versions_with_trouble(version: str, said: str) -> None:
    with pytest.raises(machine.Worse, match=said):
        checks.known_trouble(version)


def test_versions_without() -> None:
    assert checks.known_trouble("1.7.35") == "1.7.35"
    assert "checkpoints" in checks.known_trouble("2.2.9")
    assert checks.known_trouble("2.4.2") == "2.4.2"


async def test_what_a_check_may_say() -> None:
    def worse() -> str:
        raise machine.Worse("seen", "do")

    def missing() -> str:
        raise errors.UnavailableError("it is not there", hint="install it")

    async def fine() -> str:
        return "seen"

    found = [await checks.Check("group", "name", look).find() for look in (worse, missing, fine)]
    assert [(each.status, each.evidence, each.remedy) for each in found] == [
        ("warning", "seen", "do"),
        ("missing", "it is not there", "install it"),
        ("ok", "seen", ""),
    ]
    assert checks.exit_status(found) == 1
    assert checks.exit_status([found[0], found[2]]) == 0
    assert checks.exit_status([found[2], checks.Finding("g", "n", "unknown", "")]) == 3


async def test_sockets_of_others(tmp_path: Path) -> None:
    import socket

    settings = config.Settings(data_dir=f"{tmp_path}/data", state_dir=f"{tmp_path}/s")
    layout = config.Layout(settings.data_dir, settings.state_dir)
    os.makedirs(layout.containerd_state)
    sockets = [check for check in checks.Doctor(settings).checks() if check.group == "sockets"]
    with socket.socket(socket.AF_UNIX) as other, socket.socket(socket.AF_UNIX) as stale:
        other.bind(layout.containerd_socket)
        other.listen()
        stale.bind(layout.node_socket)
        found = {check.name: await check.find() for check in sockets}
    assert found["containerd"].status == "missing"
    assert f"served by another process ({os.getpid()})" in found["containerd"].evidence
    assert (found["node"].status, found["health"].status) == ("ok", "ok")
    assert "will be replaced" in found["node"].evidence


@pytest.mark.parametrize(
    ("script", "kind", "said"),
    [
        ('echo \'{"linux": {"seccomp": {"enabled": true}}}\'', None, "filters system calls"),
        ('echo \'{"linux": {"seccomp": {"enabled": false}}}\'', errors.UnsupportedError, "was built without seccomp"),
        ("echo '{\"linux\": {}}'", errors.UnsupportedError, "was built without seccomp"),
        ("echo 'No help topic for features'; exit 3", machine.Worse, "does not tell whether it filters system calls"),
        ("echo features", machine.Worse, "does not tell whether it filters system calls"),
    ],
)
async def test_a_runc_that_can_not_filter_system_calls(
    tmp_path: Path, script: str, kind: type[Exception] | None, said: str
) -> None:
    program = tmp_path / "runc"
    program.write_text(f'#!/bin/sh\n[ "$1" = features ] || exit 9\n{script}\n')
    program.chmod(0o755)
    if kind is None:
        assert await machine.runc(str(program)) == f"{program}, {said}"
    else:
        with pytest.raises(kind, match=said):
            await machine.runc(str(program))


def test_how_many_more_pods_a_bridge_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    members: list[str] = []
    monkeypatch.setattr(network, "bridge_members", lambda _: members)
    assert machine.bridge_ports("nixlet0") == "nixlet0: 0 of 1,023 ports are in use"
    members += ["veth"] * 1000
    with pytest.raises(machine.Worse, match="1,000 of 1,023 ports are in use"):
        machine.bridge_ports("nixlet0")
    members += ["veth"] * 23
    with pytest.raises(errors.FailedPreconditionError, match="the bridge is full: nixlet0: 1,023 of 1,023"):
        machine.bridge_ports("nixlet0")
