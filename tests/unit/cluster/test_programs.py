"""The programs' arguments, and what people add to them."""

import dataclasses
import ipaddress
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from nixlet.cluster import arguments, certificates, encryption, flannel, kubeconfigs, kubelet, programs
from nixlet.cluster.settings import ClusterSettings
from support import clusters

NODE = programs.Node("/run/nixlet/containerd.sock", "/run/nixlet/nix-snapshotter.sock")


def flags(argv: list[str]) -> dict[str, str]:
    """Arguments by key; none twice, none without a value."""
    found = dict(argument.removeprefix("--").split("=", 1) for argument in argv)
    assert len(found) == len(argv)
    assert list(found) == sorted(found)
    assert all(found.values())
    return found


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ([], ["--a=1", "--b=x"]),
        (["a=2"], ["--a=2", "--b=x"]),
        (["--a=2"], ["--a=2", "--b=x"]),
        # Given twice: both stand there, after each other.
        (["a=2", "a=3"], ["--a=2", "--a=3", "--b=x"]),
        (["b+=y"], ["--a=1", "--b=x", "--b=y"]),
        (["b-=y"], ["--a=1", "--b=y", "--b=x"]),
        (["b+=y", "b-=w", "b+=z"], ["--a=1", "--b=w", "--b=x", "--b=y", "--b=z"]),
        (["b=y", "b+=z", "b=q"], ["--a=1", "--b=y", "--b=z", "--b=q"]),
        (["c"], ["--a=1", "--b=x", "--c=true"]),
        (["c=k=v,l=w"], ["--a=1", "--b=x", "--c=k=v,l=w"]),
        (["c="], ["--a=1", "--b=x", "--c="]),
    ],
)
def test_what_people_add_is_taken_as_k3s_takes_it(extra: list[str], expected: list[str]) -> None:
    ours = {"b": "x", "a": "1"}
    assert arguments.merged(ours, extra) == expected
    assert ours == {"b": "x", "a": "1"}


def test_each_program_takes_its_own_additions(tmp_path: Path) -> None:
    settings = clusters.settings(
        tmp_path,
        etcd_args=("quota-backend-bytes=1",),
        kube_apiserver_args=("enable-admission-plugins+=PodSecurity", "secure-port=7443"),
        kube_controller_manager_args=("v=2",),
        kube_scheduler_args=("v=3",),
        kubelet_args=("v=4",),
        kube_proxy_args=("v=5",),
    )
    assert "--quota-backend-bytes=1" in programs.etcd(settings)
    server = programs.kube_apiserver(settings)
    assert [each for each in server if "admission" in each or "secure-port" in each] == [
        "--enable-admission-plugins=NodeRestriction",
        "--enable-admission-plugins=PodSecurity",
        "--secure-port=7443",
    ]
    assert "--v=2" in programs.kube_controller_manager(settings)
    assert "--v=3" in programs.kube_scheduler(settings)
    assert "--v=4" in programs.kubelet(settings, NODE, "/c")
    assert "--v=5" in programs.kube_proxy(settings)


def test_nobody_is_let_in_unknown(tmp_path: Path) -> None:
    settings = clusters.settings(tmp_path)
    server = flags(programs.kube_apiserver(settings))
    assert server["anonymous-auth"] == "false"
    assert server["authorization-mode"] == "Node,RBAC"
    assert server["enable-admission-plugins"] == "NodeRestriction"
    assert server["client-ca-file"] != server["requestheader-client-ca-file"]
    assert "token-auth-file" not in server
    config = yaml.safe_load(kubelet.configuration(settings, NODE))
    assert config["authentication"]["anonymous"] == {"enabled": False}
    assert config["authentication"]["webhook"]["enabled"] is True
    assert config["authorization"]["mode"] == "Webhook"
    assert config["readOnlyPort"] == 0
    etcd = flags(programs.etcd(settings))
    assert (etcd["client-cert-auth"], etcd["peer-client-cert-auth"]) == ("true", "true")


def test_everything_listens_on_loopback_and_the_node_s_address_only(tmp_path: Path) -> None:
    settings = clusters.settings(tmp_path)
    listens = {}
    for program, argv in {
        "apiserver": programs.kube_apiserver(settings),
        "controllers": programs.kube_controller_manager(settings),
        "scheduler": programs.kube_scheduler(settings),
        "etcd": programs.etcd(settings),
        "kine": programs.kine(settings),
        "proxy": programs.kube_proxy(settings),
        "flannel": flannel.flanneld(settings, "/f", "/s", ""),
    }.items():
        for key, value in flags(argv).items():
            if "listen" in key or key.startswith("healthz-") or key.endswith("bind-address") or key == "secure-port":
                listens[f"{program} {key}"] = value
    for key, value in yaml.safe_load(kubelet.configuration(settings, NODE)).items():
        if "ddress" in key or "ort" in key.removesuffix("s")[-4:]:
            listens[f"kubelet {key}"] = value
    assert listens == {
        "apiserver bind-address": "192.0.2.7",
        "apiserver secure-port": "6443",
        "controllers bind-address": "127.0.0.1",
        "controllers secure-port": "10257",
        "scheduler bind-address": "127.0.0.1",
        "scheduler secure-port": "10259",
        "etcd listen-client-urls": "https://127.0.0.1:2379,https://192.0.2.7:2379",
        "etcd listen-peer-urls": "https://192.0.2.7:2380",
        "etcd listen-metrics-urls": "http://127.0.0.1:2381",
        "kine listen-address": f"unix://{tmp_path}/run/kine/kine.sock",
        "kine metrics-bind-address": "0",
        "kubelet address": "192.0.2.7",
        "kubelet port": 10250,
        "kubelet readOnlyPort": 0,
        "kubelet healthzBindAddress": "127.0.0.1",
        "kubelet healthzPort": 10248,
        "proxy bind-address": "192.0.2.7",
        "proxy healthz-bind-address": "127.0.0.1:10256",
        "proxy metrics-bind-address": "127.0.0.1:10249",
        "flannel healthz-ip": "127.0.0.1",
        "flannel healthz-port": "10247",
    }
    assert flags(programs.kube_proxy(settings))["nodeport-addresses"] == "primary"
    assert programs.directories(settings) == (f"{tmp_path}/data/server/db", f"{tmp_path}/run/kine")


@pytest.mark.parametrize("changes", [{}, {"embedded_etcd": True}, {"secrets_encryption": True}])
def test_all_files_that_are_named_are_made(tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = clusters.settings(tmp_path, **changes)
    certificates.ensure(settings, clusters.NOW)
    encryption.ensure(settings)
    for path, config in {
        **kubeconfigs.of_server(settings),
        **kubeconfigs.of_node(settings.layout, settings.server_url),
    }.items():
        kubeconfigs.write(path, config)
    named = set()
    renders: tuple[Callable[[ClusterSettings], list[str]], ...] = (
        programs.etcd, programs.kube_apiserver, programs.kube_controller_manager, programs.kube_scheduler,
    )  # fmt: skip
    for render in renders:
        named |= {
            value
            for key, value in flags(render(settings)).items()
            if value.startswith("/") and not key.endswith("-dir")
        }
    config = yaml.safe_load(kubelet.configuration(settings, NODE))
    named |= {config["tlsCertFile"], config["tlsPrivateKeyFile"], config["authentication"]["x509"]["clientCAFile"]}
    named.add(flags(programs.kubelet(settings, NODE, "x"))["kubeconfig"])
    named.add(flags(programs.kube_proxy(settings))["kubeconfig"])
    named.add(flags(flannel.flanneld(settings, "/f", "/s", ""))["kubeconfig-file"])
    assert len(named) >= 27
    assert [path for path in sorted(named) if not Path(path).is_file()] == []


def test_the_api_server_s_datastore(tmp_path: Path) -> None:
    def stores(**changes: Any) -> dict[str, str]:
        found = flags(programs.kube_apiserver(clusters.settings(tmp_path, **changes)))
        return {key: value for key, value in found.items() if key.startswith("etcd")}

    tls = f"{tmp_path}/data/server/tls"
    assert stores() == {"etcd-servers": f"unix://{tmp_path}/run/kine/kine.sock"}
    assert stores(datastore_endpoint="mysql://u:p@tcp(db)/k") == stores()
    assert stores(embedded_etcd=True) == {
        "etcd-servers": "https://127.0.0.1:2379",
        "etcd-cafile": f"{tls}/etcd/server-ca.nochain.crt",
        "etcd-certfile": f"{tls}/etcd/client.crt",
        "etcd-keyfile": f"{tls}/etcd/client.key",
    }
    files = {"datastore_cafile": "/ca", "datastore_certfile": "/crt", "datastore_keyfile": "/key"}
    assert stores(datastore_endpoint="https://a:2379,https://b:2379", **files) == {
        "etcd-servers": "https://a:2379,https://b:2379", "etcd-cafile": "/ca", "etcd-certfile": "/crt", "etcd-keyfile": "/key",
    }  # fmt: skip


def test_kine_keeps_a_file_or_goes_to_a_database(tmp_path: Path) -> None:
    ours = flags(programs.kine(clusters.settings(tmp_path)))
    path = f"{tmp_path}/data/server/db/state.db"
    assert (
        ours["endpoint"]
        == f"sqlite://{path}?_journal=WAL&cache=shared&_busy_timeout=30000&_txlock=immediate&_synchronous=FULL"
    )
    endpoint = "postgres://user:word@db/kine"
    settings = clusters.settings(tmp_path, datastore_endpoint=endpoint, datastore_cafile="/ca")
    theirs = flags(programs.kine(settings))
    assert (theirs["endpoint"], theirs["ca-file"]) == (endpoint, "/ca")
    assert "word" not in repr(settings)


def test_one_of_several_servers_leads(tmp_path: Path) -> None:
    for changes, leads in (
        ({}, "false"),
        ({"embedded_etcd": True}, "true"),
        ({"embedded_etcd": True, "is_only_server": True}, "false"),
        ({"datastore_endpoint": "http://x"}, "true"),
    ):
        settings = clusters.settings(tmp_path, **changes)
        assert flags(programs.kube_scheduler(settings))["leader-elect"] == leads
        assert flags(programs.kube_controller_manager(settings))["leader-elect"] == leads


def test_two_ip_versions(tmp_path: Path) -> None:
    settings = clusters.settings(
        tmp_path,
        node_ips=(ipaddress.ip_address("2001:db8::7"), ipaddress.ip_address("192.0.2.7")),
        cluster_cidrs=(ipaddress.ip_network("fd00:42::/56"), ipaddress.ip_network("10.42.0.0/16")),
        service_cidrs=(ipaddress.ip_network("fd00:43::/112"), ipaddress.ip_network("10.43.0.0/16")),
    )
    server = flags(programs.kube_apiserver(settings))
    assert server["service-cluster-ip-range"] == "fd00:43::/112,10.43.0.0/16"
    assert server["advertise-address"] == server["bind-address"] == "2001:db8::7"
    assert settings.server_url == "https://[2001:db8::7]:6443"
    assert flags(programs.etcd(settings))["listen-peer-urls"] == "https://[2001:db8::7]:2380"
    assert flags(programs.kubelet(settings, NODE, "/c"))["node-ip"] == "2001:db8::7,192.0.2.7"
    config = yaml.safe_load(kubelet.configuration(settings, NODE))
    assert config["clusterDNS"] == ["fd00:43::a", "10.43.0.10"]
    assert flags(programs.kube_proxy(settings))["cluster-cidr"] == "fd00:42::/56,10.42.0.0/16"


def test_members_of_etcd_know_each_other(tmp_path: Path) -> None:
    joined = flags(programs.etcd(clusters.settings(tmp_path), ("node-0=https://192.0.2.6:2380",), joins=True))
    assert joined["initial-cluster"] == "node-1=https://192.0.2.7:2380,node-0=https://192.0.2.6:2380"
    assert joined["initial-cluster-state"] == "existing"
    assert flags(programs.etcd(clusters.settings(tmp_path)))["initial-cluster-state"] == "new"


def test_the_kubelet_s_configuration(tmp_path: Path) -> None:
    node = programs.Node(
        "unix:///run/c.sock", cgroup_driver="systemd", resolv_conf="/r", root_dir="/k", static_pods="/s", pod_logs="/l", cgroup_root="/g"
    )  # fmt: skip
    settings = clusters.settings(tmp_path, node_taints=("a=b:NoSchedule", "c:NoExecute"), node_labels=("x=1", "y=2"))
    found = yaml.safe_load(kubelet.configuration(settings, node))
    assert found["apiVersion"] == "kubelet.config.k8s.io/v1beta1"
    # A kubelet refuses machines with cgroup v1 by itself.
    assert found["failCgroupV1"] is False
    assert found["failSwapOn"] is False
    assert found["cgroupDriver"] == "systemd"
    assert found["containerRuntimeEndpoint"] == found["imageServiceEndpoint"] == "unix:///run/c.sock"
    assert (found["clusterDNS"], found["clusterDomain"]) == (["10.43.0.10"], "cluster.local")
    assert (found["resolvConf"], found["staticPodPath"], found["podLogsDir"], found["cgroupRoot"]) == (
        "/r",
        "/s",
        "/l",
        "/g",
    )
    assert found["registerWithTaints"] == [
        {"key": "a", "value": "b", "effect": "NoSchedule"},
        {"key": "c", "effect": "NoExecute"},
    ]
    argv = flags(programs.kubelet(settings, node, "/c"))
    assert (argv["root-dir"], argv["cert-dir"], argv["node-labels"]) == ("/k", "/k/pki", "x=1,y=2")
    plain = yaml.safe_load(kubelet.configuration(clusters.settings(tmp_path), NODE))
    assert plain["imageServiceEndpoint"] == "unix:///run/nixlet/nix-snapshotter.sock"
    assert not {"resolvConf", "staticPodPath", "podLogsDir", "cgroupRoot", "registerWithTaints"} & set(plain)
    assert "root-dir" not in flags(programs.kubelet(clusters.settings(tmp_path), NODE, "/c"))


def test_a_kubelet_that_asks_for_its_certificates_by_itself(tmp_path: Path) -> None:
    settings, node = clusters.settings(tmp_path), dataclasses.replace(NODE, bootstraps=True)
    found, plain = (yaml.safe_load(kubelet.configuration(settings, each)) for each in (node, NODE))
    assert found.pop("rotateCertificates") is True
    assert {plain.pop(key) for key in ("tlsCertFile", "tlsPrivateKeyFile")} == {
        settings.layout.node(f"serving-kubelet.{end}") for end in ("crt", "key")
    }
    assert found == plain
    argv = flags(programs.kubelet(settings, node, "/c"))
    assert argv.pop("bootstrap-kubeconfig") == settings.layout.node("bootstrap.kubeconfig")
    assert argv == flags(programs.kubelet(settings, NODE, "/c"))


def test_kube_proxy_leaves_the_machine_s_conntrack_alone(tmp_path: Path) -> None:
    found = flags(programs.kube_proxy(clusters.settings(tmp_path, proxy_mode="nftables")))
    assert found["proxy-mode"] == "nftables"
    assert found["hostname-override"] == "node-1"
    assert {key: value for key, value in found.items() if "conntrack" in key} == {
        "conntrack-max-per-core": "0",
        "conntrack-min": "0",
        "conntrack-tcp-timeout-established": "0s",
        "conntrack-tcp-timeout-close-wait": "0s",
    }
    # A configuration file would make it pass over all of them.
    assert "config" not in found


def test_a_kubelet_without_a_cluster_asks_nobody_and_serves_nobody(tmp_path: Path) -> None:
    settings = clusters.settings(tmp_path, is_standalone=True)
    found = yaml.safe_load(kubelet.configuration(settings, NODE))
    assert found["enableServer"] is False
    assert found["authentication"]["webhook"]["enabled"] is False
    # Nobody answers where a cluster's DNS would be: its pods ask as their node does.
    assert found["clusterDNS"] == []
    assert not {"address", "port", "tlsCertFile", "rotateCertificates"} & set(found)
    assert not {"kubeconfig", "bootstrap-kubeconfig", "node-ip"} & set(flags(programs.kubelet(settings, NODE, "/c")))
    named = dataclasses.replace(settings, cluster_dns=(ipaddress.ip_address("192.0.2.53"),))
    assert yaml.safe_load(kubelet.configuration(named, NODE))["clusterDNS"] == ["192.0.2.53"]
