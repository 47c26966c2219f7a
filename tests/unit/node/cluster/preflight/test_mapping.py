"""From a node's settings to those of its cluster."""

import ipaddress
import socket
from pathlib import Path
from typing import Any

import pytest

from nixlet import errors
from nixlet.cluster import settings as model
from nixlet.host import network
from nixlet.node.cluster.preflight import finding, mapping
from nixlet.node.cluster.roles import standalone
from nixlet.node.settings import config, kubeletfiles, names

FOUND = finding.Found({"kubelet": "/bin/kubelet"}, finding.ETCD)


def mapped(found: finding.Found = FOUND, **said: Any) -> model.ClusterSettings:
    return mapping.cluster_settings(
        config.Settings(**{"node_ip": ("192.0.2.7",), "node_name": "n", **said}), found, "nftables"
    )


def test_defaults_are_those_of_the_cluster() -> None:
    made = mapped()
    plain = model.ClusterSettings(made.data_dir, made.state_dir, "n", (ipaddress.ip_address("192.0.2.7"),))
    changed = {name: getattr(made, name) for name in made.__slots__ if getattr(made, name) != getattr(plain, name)}
    assert changed == {
        "embedded_etcd": True,
        "is_only_server": True,
        "proxy_mode": "nftables",
        "node_labels": ("nixlet.io/nix-images=true",),
    }
    assert not made.shares_datastore
    assert mapped(cluster_init=True).shares_datastore
    assert mapped(snapshotter="native").node_labels == ()
    assert mapped(node_label=("nixlet.io/nix-images=false",)).node_labels == ("nixlet.io/nix-images=false",)


def test_what_is_said_goes_over() -> None:
    made = mapped(
        finding.Found({}, finding.KINE),
        node_ip=("192.0.2.7,2001:db8::7",),
        tls_san=("a.example, b.example", "192.0.2.9"),
        cluster_cidr=("10.1.0.0/16",),
        service_cidr=("10.2.0.0/16",),
        https_listen_port="7443",
        advertise_address="192.0.2.8",
        node_label=("a=b",),
        kubelet_arg=("v=2",),
        datastore_endpoint="mysql://x",
    )
    assert [str(address) for address in made.node_ips] == ["192.0.2.7", "2001:db8::7"]
    assert made.tls_sans == ("a.example", "b.example", "192.0.2.9")
    assert (made.https_listen_port, str(made.advertise_address)) == (7443, "192.0.2.8")
    assert (made.node_labels[1:], made.kubelet_args) == (("a=b",), ("v=2",))
    assert (made.embedded_etcd, made.datastore_endpoint) == (False, "mysql://x")


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"node_ip": ("127.0.0.1",)}, "127.0.0.1 is a loopback address"),
        ({"advertise_address": "192.0.2.7,192.0.2.8"}, "advertise-address names more than one address"),
        ({"node_ip": ("192.0.2.7", "x")}, "node-ip 'x' is no IP address"),
        ({"node_name": "A_b"}, "'A_b' can't be a node's name"),
        (
            {"kubelet_arg": ("v=2", "config-dir=/x")},
            "kubelet-arg config-dir: the kubelet's configuration has a directory",
        ),
        ({"kubelet_arg": ("config=",)}, "kubelet-arg config names no file"),
        ({"kubelet_arg": ("root-dir=kubelet",)}, "kubelet-arg root-dir 'kubelet' is no absolute path"),
        (
            {"kubelet_arg": (f"root-dir=/{'d' * 82}",)},
            f"the kubelet's directory /{'d' * 82} is longer than 82 characters, which the paths of its sockets don't allow",
        ),
        ({"cluster_cidr": ("10.42.0.0/16", "fd00::/56")}, "cluster-cidr names two networks"),
    ],
)
def test_what_makes_no_cluster_is_refused(said: dict[str, Any], sentence: str) -> None:
    if "fd00" in str(said):
        said = {**said, "node_ip": ("192.0.2.7", "2001:db8::7"), "service_cidr": ("10.43.0.0/16", "fd01::/112")}
    with pytest.raises(errors.NixletError) as caught:
        mapped(**said)
    assert sentence in caught.value.message


def test_the_node_s_address_is_the_one_of_the_default_route(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "outgoing_address", lambda: ipaddress.IPv4Address("192.0.2.33"))
    assert str(mapped(node_ip=()).node_ip) == "192.0.2.33"
    # Without one any other address of the machine will do, but none of the pods' bridge and none of loopback.
    monkeypatch.setattr(network, "outgoing_address", lambda: None)
    interfaces = {"lo": "127.0.0.1/8", "nixlet0": "10.9.0.1/24", "eth9": "192.0.2.34/24"}
    monkeypatch.setattr(socket, "if_nameindex", lambda: list(enumerate(interfaces)))
    monkeypatch.setattr(network, "addresses", lambda name: [ipaddress.IPv4Interface(interfaces[name])])
    assert str(mapped(node_ip=()).node_ip) == "192.0.2.34"
    del interfaces["eth9"]
    with pytest.raises(errors.FailedPreconditionError, match="no address that a node of a cluster can have") as caught:
        mapped(node_ip=())
    assert "--node-ip" in caught.value.hint


def test_the_address_of_flannel_s_interface_is_the_node_s(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = {"eth1": [ipaddress.IPv4Interface("192.0.2.35/24")]}
    monkeypatch.setattr(network, "addresses", addresses.__getitem__)
    assert str(mapped(node_ip=(), flannel_iface="eth1").node_ip) == "192.0.2.35"
    assert str(mapped(node_ip=("192.0.2.7",), flannel_iface="eth1").node_ip) == "192.0.2.7"


def test_a_node_that_joins_knows_no_networks_yet() -> None:
    """Those of its cluster may be others than the default ones, and its address in these."""
    found = finding.Found({"kubelet": "/bin/kubelet"}, finding.ELSEWHERE)
    for where in ({"server": "https://192.0.2.1:6443"}, {"kubeconfig": "/k"}):
        made = mapped(found, node_ip=("10.42.0.7",), cluster_dns=("10.96.0.10",), **where)
        assert [str(address) for address in made.dns_addresses] == ["10.96.0.10"]
        with pytest.raises(errors.InvalidArgumentError, match="loopback"):
            mapped(found, node_ip=("127.0.0.1",), **where)
    with pytest.raises(errors.InvalidArgumentError, match="lies in cluster-cidr"):
        mapped(node_ip=("10.42.0.7",))


def test_where_the_kubelet_listens_may_stand_in_a_file(tmp_path: Path) -> None:
    assert mapped(data_dir=str(tmp_path)).kubelet_files == ()
    file = Path(kubeletfiles.directory(config.Layout(str(tmp_path), "")), "50-mine.conf")
    file.parent.mkdir(parents=True)
    file.write_text("healthzPort: 10300\n")
    assert mapped(data_dir=str(tmp_path)).kubelet_files == ("healthz-port=10300",)
    assert standalone.cluster_settings(config.Settings(data_dir=str(tmp_path))).kubelet_files == ("healthz-port=10300",)


def test_tokens_come_from_settings_or_files(tmp_path: Path) -> None:
    assert mapping.given_tokens(config.Settings()) == ("", "")
    file = tmp_path / "token"
    file.write_text("se-cret\n")
    file.chmod(0o600)
    assert mapping.given_tokens(config.Settings(token_file=str(file), agent_token="b")) == ("se-cret", "b")
    file.write_text("se cret")
    with pytest.raises(errors.InvalidArgumentError, match=f"{file} holds no token: the token has blanks") as caught:
        mapping.given_tokens(config.Settings(token_file=str(file)))
    assert "se cret" not in str(caught.value)
    with pytest.raises(errors.UsageError, match="can't be read"):
        mapping.given_tokens(config.Settings(token_file=str(tmp_path / "none")))


def test_where_the_kubeconfig_goes() -> None:
    assert mapping.kubeconfig_path(config.Settings()) == "/etc/nixlet/kubeconfig.yaml"
    assert mapping.kubeconfig_path(config.Settings(data_dir="/d")) == "/d/kubeconfig.yaml"
    assert mapping.kubeconfig_path(config.Settings(write_kubeconfig="/k")) == "/k"
    assert config.Settings().data_dir == names.DEFAULT_DATA_DIR
