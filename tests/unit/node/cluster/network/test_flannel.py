"""flannel on a node: what keeps it from starting, and what is known of what it makes."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from nixlet import errors
from nixlet.host import iptables, procfs
from nixlet.node.cluster import traces
from nixlet.node.cluster.network import flannel
from nixlet.node.cluster.preflight import others
from nixlet.node.settings import config
from support import clusters


class Machine:
    """A machine with interfaces, and what is called on it."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.interfaces = ["lo", "eth0"]
        self.called: list[str] = []
        self.others: set[bytes] = set()
        self.routes: list[dict[str, str]] = []
        self.directory = directory
        self.layout = config.Layout(f"{directory}/data", f"{directory}/run")
        program = directory / "ip"
        program.write_text(
            f'#!/bin/sh\necho "$(basename $0) $@" >>{directory}/called\ncat {directory}/routes 2>/dev/null || :\n'
        )
        program.chmod(0o755)
        (directory / "nft").symlink_to(program)
        monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")
        monkeypatch.setattr(socket, "if_nameindex", lambda: list(enumerate(self.interfaces)))
        monkeypatch.setattr(flannel, "_FILTERED", {4: "kernel", 6: "kernel"})
        monkeypatch.setattr(others, "run", lambda program, *, here: here and program in self.others)

        async def remove_chains(names: Any) -> None:
            self.called.append(f"remove_chains {' '.join(names)}")

        monkeypatch.setattr(iptables, "remove_chains", remove_chains)

    async def prepare(self, backend: str, **said: Any) -> list[str]:
        settings = config.Settings(data_dir=self.layout.data_dir, state_dir=self.layout.state_dir, **said)
        Path(self.layout.agent).mkdir(parents=True, exist_ok=True)
        return await flannel.prepare(settings, clusters.settings(self.directory), backend)

    def calls(self) -> list[str]:
        path = self.directory / "called"
        return [*self.called, *(path.read_text().splitlines() if path.exists() else [])]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


async def test_what_it_finds(machine: Machine) -> None:
    arguments = await machine.prepare("vxlan")
    assert f"--net-config-path={flannel.configuration(machine.layout)}" in arguments
    written = json.loads(Path(flannel.configuration(machine.layout)).read_text())
    assert written["Backend"] == {"Type": "vxlan"}
    # All of it is known to whoever takes the node away.
    settings = config.Settings(data_dir=machine.layout.data_dir, state_dir=machine.layout.state_dir)
    trees = list(traces.trees(settings, [machine.layout]))
    for path in (
        flannel.configuration(machine.layout),
        flannel.memory(machine.layout),
        str(Path(flannel.subnet_file(machine.layout)).parent),
    ):
        assert path in trees


@pytest.mark.parametrize(
    ("backend", "said", "message"),
    [
        (
            "wireguard-native",
            {},
            "the cluster's flannel-backend is wireguard-native, which this version of nixlet doesn't have",
        ),
        ("vxlan", {"flannel_iface": "eth9"}, "flannel-iface eth9: this machine has no such interface"),
        ("vxlan", {"flannel_conf": "/no/such/file"}, "the configuration file /no/such/file can't be read"),
    ],
)
async def test_what_keeps_it_from_starting(machine: Machine, backend: str, said: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.NixletError) as caught:
        await machine.prepare(backend, **said)
    assert caught.value.message.startswith(message)
    assert not Path(flannel.memory(machine.layout)).exists()


async def test_a_configuration_of_another_backend_than_the_cluster_s(machine: Machine, tmp_path: Path) -> None:
    file = tmp_path / "f.json"
    file.write_text('{"Network": "10.42.0.0/16", "Backend": {"Type": "vxlan", "VNI": 5}}')
    with pytest.raises(errors.InvalidArgumentError, match=r"has the backend vxlan, and the cluster's is host-gw$"):
        await machine.prepare("host-gw", flannel_conf=str(file))
    await machine.prepare("vxlan", flannel_conf=str(file))
    assert Path(flannel.configuration(machine.layout)).read_text() == file.read_text()


async def test_a_kernel_without_what_it_needs(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flannel, "_FILTERED", {4: "no/such/thing"})
    with pytest.raises(errors.UnsupportedError, match="br_netfilter") as caught:
        await machine.prepare("vxlan")
    assert "modprobe br_netfilter" in caught.value.hint


async def test_another_flannel_s_interface_is_left_alone(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.interfaces.append("flannel.1")
    with pytest.raises(errors.FailedPreconditionError, match="another flannel works on this machine") as caught:
        await machine.prepare("vxlan")
    assert "--flannel-backend none" in caught.value.hint
    await flannel.remove(machine.layout)
    assert machine.calls() == []
    machine.interfaces.remove("flannel.1")
    await machine.prepare("vxlan")
    # Now it is ours, for as long as the machine runs.
    machine.interfaces.append("flannel.1")
    await machine.prepare("vxlan")
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(flannel, "_machine", lambda: "another network namespace")
        with pytest.raises(errors.FailedPreconditionError, match="another flannel works on this machine"):
            await machine.prepare("vxlan")
    monkeypatch.setattr(procfs, "boot_id", lambda: "another")
    with pytest.raises(errors.FailedPreconditionError, match="another flannel works on this machine"):
        await machine.prepare("vxlan")
    await flannel.remove(machine.layout)
    assert machine.calls() == []


async def test_an_interface_that_is_not_needed_any_more_goes(machine: Machine) -> None:
    await machine.prepare("vxlan")
    machine.interfaces.append("flannel.1")
    await machine.prepare("host-gw")
    assert machine.calls() == ["ip link delete flannel.1"]
    # One that can't be deleted is known on, and one that is gone is not: the next of that name is somebody else's.
    await machine.prepare("host-gw")
    assert machine.calls() == ["ip link delete flannel.1"] * 2
    machine.interfaces.remove("flannel.1")
    await machine.prepare("host-gw")
    machine.interfaces.append("flannel.1")
    await machine.prepare("host-gw")
    assert machine.calls() == ["ip link delete flannel.1"] * 2


async def test_an_interface_of_another_number_takes_the_place_of_the_first(machine: Machine, tmp_path: Path) -> None:
    file = tmp_path / "f.json"
    for number in (5, 6):
        file.write_text(f'{{"Network": "10.42.0.0/16", "Backend": {{"Type": "vxlan", "VNI": {number}}}}}')
        await machine.prepare("vxlan", flannel_conf=str(file))
        machine.interfaces.append(f"flannel.{number}")
    assert machine.calls() == ["ip link delete flannel.5"]
    # (it is still there, and so are both)
    await flannel.remove(machine.layout)
    assert [each for each in machine.calls() if "link" in each][1:] == [
        "ip link delete flannel.5",
        "ip link delete flannel.6",
    ]


async def test_another_flannel_that_runs_keeps_what_has_the_same_names(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    """k3s, for instance, when somebody has gone back to it."""
    await machine.prepare("vxlan")
    machine.interfaces.append("flannel.1")
    machine.others = {others.FLANNEL}
    await flannel.remove(machine.layout)
    assert machine.calls() == []
    assert "another flannel runs on this machine" in caplog.text
    machine.others.clear()
    await flannel.remove(machine.layout)
    assert "ip link delete flannel.1" in machine.calls()


@pytest.mark.parametrize("lost", ["ip", "record"])
async def test_what_stays_is_told(machine: Machine, caplog: pytest.LogCaptureFixture, lost: str) -> None:
    await machine.prepare("host-gw")
    if lost == "ip":
        (machine.directory / "ip").write_text("#!/bin/sh\necho no such object >&2; exit 1\n")
    else:
        Path(flannel.memory(machine.layout)).write_text("{")
    await flannel.remove(machine.layout)
    told = "ip -4 -json route show table main can't be done: no such object" if lost == "ip" else "can't be read"
    assert told in caplog.text


async def test_what_it_has_made_is_removed(machine: Machine) -> None:
    await machine.prepare("host-gw")
    (machine.directory / "routes").write_text('[{"dst":"10.42.1.0/24","gateway":"192.0.2.9","dev":"eth0"}]')
    await flannel.remove(machine.layout)
    assert machine.calls() == [
        "remove_chains FLANNEL-POSTRTG FLANNEL-FWD",
        "ip -4 -json route show table main",
        "ip -4 route delete 10.42.1.0/24 via 192.0.2.9 dev eth0",
    ]


def test_routes_to_other_nodes_pods_and_no_others() -> None:
    printed = json.dumps(
        [
            {"dst": "default", "gateway": "192.0.2.1", "dev": "eth0"},
            {"dst": "10.42.0.0/24", "dev": "nixlet0"},
            {"dst": "10.42.1.0/24", "gateway": "192.0.2.9", "dev": "eth0"},
            {"dst": "10.43.0.0/16", "gateway": "192.0.2.9", "dev": "eth0"},
            {"dst": "10.0.0.0/8", "gateway": "192.0.2.9", "dev": "eth0"},
            {"dst": "fd00:42:0:1::/64", "gateway": "2001:db8::9", "dev": "eth0"},
        ]
    ).encode()
    assert flannel.routes(printed, ["10.42.0.0/16"]) == [["10.42.1.0/24", "via", "192.0.2.9", "dev", "eth0"]]
    assert flannel.routes(printed, ["fd00:42::/56"]) == [["fd00:42:0:1::/64", "via", "2001:db8::9", "dev", "eth0"]]
    assert flannel.routes(b"", ["10.42.0.0/16"]) == []
