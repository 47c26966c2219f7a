"""flannel's configuration and arguments, and what it says of the network that it has made."""

import ipaddress
import json
from pathlib import Path
from typing import Any

import pytest

from nixlet import errors
from nixlet.cluster import flannel
from support import clusters


def test_the_configuration(tmp_path: Path) -> None:
    found = flannel.configuration(clusters.settings(tmp_path), flannel.VXLAN)
    assert json.loads(found.text) == {"Network": "10.42.0.0/16", "Backend": {"Type": "vxlan"}}
    assert (found.backend, found.interface, found.nftables) == ("vxlan", "flannel.1", False)
    found = flannel.configuration(clusters.settings(tmp_path), flannel.HOST_GW)
    assert (found.backend, found.interface) == ("host-gw", "")


def test_the_configuration_for_ipv6(tmp_path: Path) -> None:
    six = clusters.settings(
        tmp_path,
        cluster_cidrs=(ipaddress.IPv6Network("fd00:42::/56"),),
        node_ips=(ipaddress.IPv6Address("2001:db8::7"),),
    )
    found = flannel.configuration(six, flannel.VXLAN)
    assert json.loads(found.text) == {
        "EnableIPv4": False,
        "EnableIPv6": True,
        "IPv6Network": "fd00:42::/56",
        "Backend": {"Type": "vxlan"},
    }
    assert found.interface == "flannel-v6.1"
    assert "--public-ipv6=2001:db8::7" in flannel.flanneld(six, "/f", "/s", "")


def test_the_arguments(tmp_path: Path) -> None:
    settings = clusters.settings(tmp_path)
    plain = flannel.flanneld(settings, "/d/net-conf.json", "/r/subnet.env", "")
    assert plain == [
        "--healthz-ip=127.0.0.1",
        "--healthz-port=10247",
        "--iface=192.0.2.7",
        "--ip-masq=true",
        "--kube-subnet-mgr=true",
        f"--kubeconfig-file={tmp_path}/data/agent/kubelet.kubeconfig",
        "--net-config-path=/d/net-conf.json",
        "--public-ip=192.0.2.7",
        "--subnet-file=/r/subnet.env",
    ]
    # An interface has an address of its own.
    named = flannel.flanneld(settings, "/d/net-conf.json", "/r/subnet.env", "eth1")
    assert set(named) - set(plain) == {"--iface=eth1"}
    assert set(plain) - set(named) == {"--iface=192.0.2.7", "--public-ip=192.0.2.7"}


def said(**backend: Any) -> str:
    return json.dumps({"Network": "10.42.0.0/16", "EnableNFTables": True, "Backend": backend})


def test_a_configuration_of_somebody_s_own() -> None:
    found = flannel.read(said(Type="vxlan", VNI=7, DirectRouting=True), what="x")
    assert (found.backend, found.interface, found.nftables) == ("vxlan", "flannel.7", True)


def test_keys_are_taken_as_flannel_takes_them() -> None:
    """It is a program in Go, whose keys have no case; and k3s writes networks of IP versions that aren't wanted."""
    text = '{"network": "10.42.0.0/16", "IPv6Network": "::/0", "enableNftables": true, "backend": {"type": "VXLAN", "vni": 7}}'
    found = flannel.read(text, what="x")
    assert (found.backend, found.interface, found.nftables) == ("vxlan", "flannel.7", True)
    assert found.networks == (ipaddress.IPv4Network("10.42.0.0/16"),)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"Network": "10.0.0.0/8"}, ""),
        # As flannel's own manifest has it.
        ({"Network": "10.244.0.0/16"}, "f.json is for pods in 10.244.0.0/16, and the cluster's are in 10.42.0.0/16"),
        (
            {"EnableIPv6": True, "IPv6Network": "fd00:42::/56"},
            "f.json is for pods in 10.42.0.0/16 and fd00:42::/56, and the cluster's are in 10.42.0.0/16",
        ),
        (
            {"EnableIPv4": False, "EnableIPv6": True, "IPv6Network": "fd00:42::/56"},
            "f.json is for pods in fd00:42::/56, and the cluster's are in 10.42.0.0/16",
        ),
        ({"EnableIPv4": False}, "f.json is for pods in no network, and the cluster's are in 10.42.0.0/16"),
    ],
)
def test_a_configuration_for_other_pods(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    found = flannel.read(json.dumps({**json.loads(said(Type="vxlan")), **more}), what="f.json")
    if not message:
        flannel.check(found, clusters.settings(tmp_path), what="f.json")
        return
    with pytest.raises(errors.InvalidArgumentError) as caught:
        flannel.check(found, clusters.settings(tmp_path), what="f.json")
    assert caught.value.message == message
    assert "Network: 10.42.0.0/16" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "f.json is no JSON: "),
        ("[]", "f.json names no backend"),
        ("{}", "f.json names no backend"),
        ('{"Backend": {"Type": 3}}', "f.json names no backend"),
        (
            said(Type="wireguard"),
            "f.json has the backend 'wireguard', which nixlet doesn't know how to take away again",
        ),
        (said(Type="vxlan", VNI=1 << 24), "f.json: VNI is no number from 1 to 16777215"),
        (said(Type="vxlan", VNI="1"), "f.json: VNI is no number from 1 to 16777215"),
        (said(Type="vxlan", VNI=True), "f.json: VNI is no number from 1 to 16777215"),
        ('{"Backend": {"Type": "vxlan"}}', "f.json: Network '' is no network of IPv4"),
        ('{"Network": "fd00::/48", "Backend": {"Type": "vxlan"}}', "f.json: Network 'fd00::/48' is no network of IPv4"),
        ('{"a":' * 100_000, "f.json is no JSON: "),
    ],
)
def test_a_configuration_that_is_none(text: str, message: str) -> None:
    with pytest.raises(errors.NixletError) as caught:
        flannel.read(text, what="f.json")
    assert caught.value.message.startswith(message)


@pytest.mark.parametrize(("text", "mtu"), [("FLANNEL_SUBNET=10.42.0.1/24\nFLANNEL_MTU=1450\n", 1450), ("", 0)])
def test_the_largest_packet(tmp_path: Path, text: str, mtu: int) -> None:
    assert flannel.mtu(str(tmp_path / "subnet.env")) == 0
    (tmp_path / "subnet.env").write_text(text)
    assert flannel.mtu(str(tmp_path / "subnet.env")) == mtu
