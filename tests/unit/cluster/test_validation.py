"""Settings that make no cluster are told in words."""

import ipaddress
from pathlib import Path
from typing import Any

import pytest

from nixlet import errors
from nixlet.cluster import settings as model
from nixlet.cluster import validation
from support import clusters


def nets(*texts: str) -> tuple[model.Network, ...]:
    return tuple(ipaddress.ip_network(text) for text in texts)


def ips(*texts: str) -> tuple[model.Address, ...]:
    return tuple(ipaddress.ip_address(text) for text in texts)


BOTH = {
    "node_ips": ips("192.0.2.7", "2001:db8::7"),
    "cluster_cidrs": nets("10.42.0.0/16", "fd00:42::/56"),
    "service_cidrs": nets("10.43.0.0/16", "fd00:43::/112"),
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        BOTH,
        {"cluster_dns": ips("10.43.255.254")},
        {"service_cidrs": nets("10.43.0.0/29"), "cluster_dns": ips("10.43.0.5")},
        {"service_cidrs": nets("10.96.0.0/12"), "cluster_cidrs": nets("10.128.0.0/9")},
        {"node_name": "a" * 52},
        {"node_name": "ip-10-0-0-1.eu-central-1.compute.internal"},
        {"tls_sans": ("example.org", "*.Example.org", "::1", "198.51.100.1")},
        {"datastore_endpoint": "mysql://user:word@tcp(db:3306)/kine"},
        {"datastore_endpoint": "https://a:2379,https://b:2379", "datastore_certfile": "/c", "datastore_keyfile": "/k"},
        {"embedded_etcd": True, "proxy_mode": "nftables"},
        {"kube_apiserver_args": ("a=b", "--c+=d=e", "f-=", "g", "oidc_x.y=1\n2")},
        {"node_taints": ("a:NoSchedule", "a/b=c:NoExecute"), "node_labels": ("a/b=c", "a=")},
        {"kube_apiserver_args": ("bind-address=0.0.0.0",)},
        {"kube_apiserver_args": ("bind-address=192.0.2.7",)},
        {"node_taints": ("a:NoSchedule", "a:NoExecute")},
        {"node_labels": ("node.kubernetes.io/x=y", "a.kubelet.kubernetes.io/x=y", "topology.kubernetes.io/zone=z-1")},
        {"node_labels": (f"{'a' * 63}={'B_.' * 20}b",)},
    ],
)
def test_what_makes_a_cluster(tmp_path: Path, changes: dict[str, Any]) -> None:
    validation.check(clusters.settings(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"node_name": "Node_1"}, "'Node_1' can't be a node's name"),
        ({"node_name": ""}, "'' can't be a node's name"),
        ({"node_name": "-a"}, "'-a' can't be a node's name"),
        ({"node_name": "a" * 53}, "it has 53 characters, and a kubelet's certificate has room for 52"),
        ({"cluster_domain": "cluster_local"}, "the cluster domain 'cluster_local' is no domain name"),
        ({"tls_sans": ("a b",)}, "tls-san 'a b' is neither a name nor an address"),
        ({"tls_sans": ("*",)}, "tls-san '*' is neither a name nor an address"),
        ({"node_ips": ()}, "the node has no address"),
        ({"node_ips": ips("127.0.0.1")}, "the node's address 127.0.0.1 is a loopback address"),
        ({"node_ips": ips("0.0.0.0")}, "the node's address 0.0.0.0 is no particular address"),
        ({"node_ips": ips("224.0.0.1")}, "the node's address 224.0.0.1 is a multicast address"),
        ({"node_ips": ips("169.254.1.1")}, "the node's address 169.254.1.1 is a link-local address"),
        ({"node_ips": ips("255.255.255.255")}, "the node's address 255.255.255.255 is the broadcast address"),
        ({"node_ips": ips("192.0.2.7", "::ffff:192.0.2.8")}, "is an IPv4 address written as an IPv6 one"),
        ({"node_ips": ips("192.0.2.7", "fe80::1%eth0")}, "is an address with a zone"),
        ({"tls_sans": ("fe80::1%eth0",)}, "tls-san 'fe80::1%eth0' is neither a name nor an address"),
        ({"tls_sans": ("::ffff:1.2.3.4",)}, "tls-san '::ffff:1.2.3.4' is neither a name nor an address"),
        ({**BOTH, "node_ips": ips("2001:db8::7", "192.0.2.7")}, "node-ip begins with IPv6, and service-cidr with IPv4"),
        (
            {**BOTH, "cluster_cidrs": nets("fd00:42::/56", "10.42.0.0/16")},
            "cluster-cidr begins with IPv6, and service-cidr with IPv4",
        ),
        (
            {**BOTH, "advertise_address": ipaddress.ip_address("2001:db8::1")},
            "advertise-address begins with IPv6, and service-cidr with IPv4",
        ),
        (
            {"cluster_cidrs": nets("127.0.0.0/16")},
            "cluster-cidr 127.0.0.0/16 has addresses in it that are not for networks",
        ),
        (
            {"service_cidrs": nets("224.0.0.0/16")},
            "service-cidr 224.0.0.0/16 has addresses in it that are not for networks",
        ),
        ({"service_node_port_range": "\u0663\u0660\u0660\u0660\u0660-32767"}, "is no range of ports"),
        ({"datastore_endpoint": "https://[::1"}, "the datastore-endpoint must be etcd servers' URLs"),
        ({"datastore_endpoint": "https://a:99999"}, "the datastore-endpoint must be etcd servers' URLs"),
        ({"datastore_endpoint": "https://a:0"}, "the datastore-endpoint must be etcd servers' URLs"),
        ({"datastore_endpoint": "https://a:x"}, "the datastore-endpoint must be etcd servers' URLs"),
        ({"node_ips": ips("192.0.2.7", "192.0.2.8")}, "node-ip names more than one of the same IP version"),
        ({"advertise_address": ipaddress.ip_address("::1")}, "the node's address ::1 is a loopback address"),
        ({"node_ips": ips("10.42.1.1")}, "the node's address 10.42.1.1 lies in cluster-cidr 10.42.0.0/16"),
        ({"node_ips": ips("10.43.1.1")}, "the node's address 10.43.1.1 lies in service-cidr 10.43.0.0/16"),
        ({"cluster_cidrs": ()}, "cluster-cidr names no network"),
        ({"service_cidrs": ()}, "service-cidr names no network"),
        (
            {"cluster_cidrs": nets("10.40.0.0/16", "10.41.0.0/16")},
            "cluster-cidr names more than one of the same IP version",
        ),
        (
            {"cluster_cidrs": nets("10.42.0.0/16", "fd00::/56")},
            "cluster-cidr and service-cidr are not of the same IP versions",
        ),
        ({**BOTH, "node_ips": ips("192.0.2.7")}, "cluster-cidr has a network of IPv6, and the node no such address"),
        (
            {"cluster_cidrs": nets("10.43.128.0/20")},
            "cluster-cidr 10.43.128.0/20 and service-cidr 10.43.0.0/16 overlap",
        ),
        ({"cluster_cidrs": nets("10.0.0.0/8")}, "cluster-cidr 10.0.0.0/8 and service-cidr 10.43.0.0/16 overlap"),
        ({"cluster_cidrs": nets("10.42.0.0/25")}, "its prefix must be /8 to /24"),
        ({"cluster_cidrs": nets("96.0.0.0/7")}, "its prefix must be /8 to /24"),
        ({"service_cidrs": nets("10.43.0.0/30")}, "service-cidr 10.43.0.0/30 must have a prefix of /12 to /29"),
        ({"service_cidrs": nets("112.0.0.0/8")}, "service-cidr 112.0.0.0/8 must have a prefix of /12 to /29"),
        ({"service_cidrs": nets("10.43.0.0/29")}, "service-cidr 10.43.0.0/29 has no tenth address for the DNS service"),
        ({"cluster_dns": ips("10.44.0.10")}, "cluster-dns 10.44.0.10 lies outside of service-cidr 10.43.0.0/16"),
        ({"cluster_dns": ips("10.43.255.255")}, "cluster-dns 10.43.255.255 is no service's"),
        ({"advertise_address": ipaddress.ip_address("10.42.0.9")}, "the node's address 10.42.0.9 lies in cluster-cidr"),
        ({"cluster_dns": ips("10.43.0.1")}, "cluster-dns 10.43.0.1 is taken"),
        ({"cluster_dns": ips("10.43.0.2", "10.43.0.3")}, "cluster-dns names more than one of the same IP version"),
        ({"https_listen_port": 0}, "https-listen-port 0 is no port"),
        ({"https_listen_port": 65536}, "https-listen-port 65536 is no port"),
        ({"https_listen_port": 10250}, "https-listen-port 10250 is the kubelet's"),
        (
            {"https_listen_port": 30001},
            "service-node-port-range 30000-32767 has port 30001 in it, which is the API server's",
        ),
        ({"service_node_port_range": "10000-11000"}, "has port 10250 in it, which is the kubelet's"),
        ({"service_node_port_range": "2-1"}, "service-node-port-range '2-1' is no range of ports"),
        ({"service_node_port_range": "80"}, "service-node-port-range '80' is no range of ports"),
        (
            {"embedded_etcd": True, "datastore_endpoint": "http://x"},
            "either its own etcd or a datastore-endpoint, not both",
        ),
        ({"datastore_certfile": "/c"}, "datastore-certfile and datastore-keyfile belong together"),
        ({"proxy_mode": "ipvs"}, "kube-proxy has no mode 'ipvs'"),
        ({"kubelet_args": ("a=b", "=x")}, "--kubelet-arg number 2 is no argument"),
        ({"kube_apiserver_args": ("a b",)}, "--kube-apiserver-arg number 1 is no argument"),
        ({"kube_apiserver_args": ("a=\0",)}, "--kube-apiserver-arg number 1 is no argument"),
        ({"kubelet_args": ("v=2", "--hostname-override=x")}, "--kubelet-arg hostname-override: other programs"),
        ({"kubelet_args": ("node-ip+=192.0.2.9",)}, "--kubelet-arg node-ip: other programs"),
        ({"kube_proxy_args": ("hostname-override=x",)}, "--kube-proxy-arg hostname-override: other programs"),
        ({"kube_apiserver_args": ("secure-port=7443",)}, "--kube-apiserver-arg secure-port: other programs"),
        ({"kube_controller_manager_args": ("cluster-cidr=10.1.0.0/16",)}, "manager-arg cluster-cidr: other programs"),
        ({"etcd_args": ("data-dir=/fast",)}, "--etcd-arg data-dir: other programs"),
        (
            {"kube_apiserver_args": ("bind-address=127.0.0.1",)},
            "bind-address 127.0.0.1: the node's programs reach the API server at 192.0.2.7",
        ),
        ({"kube_apiserver_args": ("bind-address=host",)}, "bind-address: 'host' is no IP address"),
        ({"node_labels": ("=x",)}, "node-label '=x' is no label"),
        ({"node_labels": ("a",)}, "node-label 'a' is no label"),
        ({"node_labels": ("a b=c",)}, "node-label 'a b=c' is no label"),
        ({"node_labels": ("a=!!",)}, "node-label 'a=!!' is no label"),
        ({"node_labels": ("a=b,c=d",)}, "node-label 'a=b,c=d' is no label"),
        ({"node_labels": ("A/b=c",)}, "node-label 'A/b=c' is no label"),
        ({"node_labels": ("/b=c",)}, "node-label '/b=c' is no label"),
        ({"node_labels": ("a" * 64 + "=c",)}, "is no label"),
        ({"node_labels": ("a=b\n",)}, "is no label"),
        ({"node_labels": ("a=\u0663",)}, "is no label"),
        ({"node_labels": ("a=b", "a=c")}, "node-label a is given more than once"),
        (
            {"node_labels": ("node-role.kubernetes.io/worker=x",)},
            "node-label node-role.kubernetes.io/worker: a kubelet may not label its node so",
        ),
        ({"node_labels": ("k8s.io/x=y",)}, "node-label k8s.io/x: a kubelet may not label its node so"),
        ({"node_taints": ("a b=c:NoSchedule",)}, "node-taint 'a b=c:NoSchedule' is no taint"),
        ({"node_taints": ("a=c d:NoSchedule",)}, "node-taint 'a=c d:NoSchedule' is no taint"),
        ({"node_taints": ("x=1:NoSchedule", "x=2:NoSchedule")}, "node-taint x:NoSchedule is given more than once"),
        ({"node_taints": ("a=b",)}, "node-taint 'a=b' is no taint"),
        ({"node_taints": ("a=b:Never",)}, "node-taint 'a=b:Never' is no taint"),
    ],
)
def test_what_makes_none(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.InvalidArgumentError) as caught:
        validation.check(clusters.settings(tmp_path, **changes))
    assert message in caught.value.message


@pytest.mark.parametrize(
    "endpoint",
    [
        "very-secret-word",
        "oracle://user:very-secret-word@db",
        "https://user:very-secret-word@etcd:2379",
        "https://a,very-secret-word",
        "https://user:very-secret-word@a\u2100b:2379",
        "https://a:very-secret-word",
    ],
)
def test_a_datastore_s_password_is_never_told(tmp_path: Path, endpoint: str) -> None:
    settings = clusters.settings(tmp_path, datastore_endpoint=endpoint)
    with pytest.raises(errors.InvalidArgumentError, match="datastore-endpoint") as caught:
        validation.check(settings)
    assert "very-secret-word" not in f"{caught.value} {caught.value.hint} {settings}"
    assert (caught.value.__cause__, caught.value.__context__) == (None, None)


def test_a_name_that_would_do_is_proposed(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidArgumentError) as caught:
        validation.check(clusters.settings(tmp_path, node_name="My_Node"))
    assert caught.value.hint == "--node-name my-node"


def test_addresses_and_networks_are_read_with_their_flag_s_name() -> None:
    assert model.addresses("192.0.2.1, ::1,", what="node-ip") == ips("192.0.2.1", "::1")
    assert model.networks("10.42.0.0/16,fd00::/56", what="cluster-cidr") == nets("10.42.0.0/16", "fd00::/56")
    for text, message, hint in (
        ("10.42.0.0", "cluster-cidr '10.42.0.0' is an address and no network", "did you mean 10.42.0.0/32?"),
        ("10.42.0.1/16", "cluster-cidr '10.42.0.1/16' is an address and no network", "did you mean 10.42.0.0/16?"),
        ("10.42/16", "cluster-cidr '10.42/16' is no network", "such as 10.42.0.0/16"),
        ("10.42.0.0/33", "cluster-cidr '10.42.0.0/33' is no network", "such as 10.42.0.0/16"),
    ):
        with pytest.raises(errors.InvalidArgumentError) as caught:
            model.networks(text, what="cluster-cidr")
        assert (caught.value.message, caught.value.hint) == (message, hint)
    with pytest.raises(errors.InvalidArgumentError, match="node-ip 'fe80::1%eth0' has a zone"):
        model.addresses("fe80::1%eth0", what="node-ip")
    with pytest.raises(errors.InvalidArgumentError, match="node-ip 'host' is no IP address"):
        model.addresses("host", what="node-ip")
