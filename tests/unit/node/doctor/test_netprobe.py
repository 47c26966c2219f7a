"""What a firewall's rules say of pods, and what the programs of a node must be like."""

import os
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.host import process
from nixlet.node.doctor import netprobe
from nixlet.node.requirements import preflight

DOCKER = """-P FORWARD DROP
-A FORWARD -j DOCKER-USER
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -i docker0 ! -o docker0 -j ACCEPT
"""


@pytest.mark.parametrize(
    ("rules", "dropped"),
    [
        ("-P FORWARD ACCEPT\n", False),
        (DOCKER, True),
        (f"{DOCKER}-A FORWARD -i nixlet0 -j ACCEPT\n", False),
        (f"{DOCKER}-A FORWARD -s 10.63.0.0/16 -j ACCEPT\n", False),
        # Another bridge, and a rule that does something else.
        (f"{DOCKER}-A FORWARD -i nixlet01 -j ACCEPT\n", True),
        (f"{DOCKER}-A FORWARD -i nixlet0 -j LOG\n", True),
        ("", False),
    ],
)
def test_who_is_let_through(rules: str, dropped: bool) -> None:
    assert netprobe.drops(rules, "nixlet0", "10.63.0.0/16") is dropped


async def test_a_kernel_that_makes_no_vxlan(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    monkeypatch.setattr(preflight, "check_root", lambda: None)
    monkeypatch.setattr(process, "find_program", lambda name: f"/sbin/{name}")
    status = 0

    async def apart(argv: list[str]) -> process.Completed:
        tried.append(" ".join(argv))
        return process.Completed(tuple(argv), status, b"", b"Error: Unknown device type.")

    monkeypatch.setattr(netprobe, "_apart", apart)
    assert await netprobe.vxlan() == "an interface of the type vxlan can be made"
    assert tried == ["/sbin/ip link add probe0 type vxlan id 1 dstport 0"]
    status = 2
    with pytest.raises(
        errors.UnsupportedError, match=r"no interface of the type vxlan: Error: Unknown device type\.$"
    ) as caught:
        await netprobe.vxlan()
    assert caught.value.hint == "load its module: modprobe vxlan"


def test_the_shim_beside_containerd_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for directory in ("beside", "elsewhere"):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "containerd-shim-runc-v2").touch(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/elsewhere")
    containerd = f"{tmp_path}/beside/containerd"
    assert preflight.find_shim(containerd) == f"{tmp_path}/beside/containerd-shim-runc-v2"
    os.unlink(tmp_path / "beside/containerd-shim-runc-v2")
    assert preflight.find_shim(containerd) == f"{tmp_path}/elsewhere/containerd-shim-runc-v2"
    os.unlink(tmp_path / "elsewhere/containerd-shim-runc-v2")
    with pytest.raises(errors.UnavailableError, match="neither beside"):
        preflight.find_shim(containerd)
