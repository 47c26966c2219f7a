"""Settings: what each value must be like, and what a person reads who got one wrong."""

import dataclasses
from typing import Any

import pytest

from nixlet import errors
from nixlet.node.settings import config, names, rules

OF_A_CLUSTER = (
    "token_file", "agent_token_file", "node_name", "cluster_domain", "service_node_port_range", "flannel_conf", "advertise_address",
    "write_kubeconfig", "write_kubeconfig_mode", "write_kubeconfig_group", "datastore_cafile", "datastore_certfile", "datastore_keyfile",
)  # fmt: skip
LISTS_OF_A_CLUSTER = (
    "node_ip", "node_label", "node_taint", "cluster_cidr", "service_cidr", "cluster_dns", "tls_san", "etcd_arg", "kube_apiserver_arg",
    "kube_controller_manager_arg", "kube_scheduler_arg", "kubelet_arg", "kube_proxy_arg",
)  # fmt: skip

WRONG = [
    ("data_dir", "", "--data-dir is empty: it must name a directory"),
    ("data_dir", "/a b", "--data-dir '/a b' holds a blank, colon, comma, quote or backslash"),
    ("data_dir", "/a:b", "--data-dir '/a:b' holds a blank"),
    ("data_dir", '/a"b', "holds a blank, colon, comma, quote or backslash"),
    ("data_dir", "/a\\b", "holds a blank, colon, comma, quote or backslash"),
    ("data_dir", "/a\nb", "--data-dir '/a\\nb' holds a line break"),
    ("data_dir", "/\udcff", "--data-dir '/\\udcff' holds a line break, a control character or no UTF-8"),
    ("state_dir", "", "--state-dir is empty"),
    ("state_dir", "/a,b", "--state-dir '/a,b' holds a blank"),
    ("state_dir", "/run/" + "x" * 56, f"--state-dir /run/{'x' * 56} is longer than 60 characters"),
    ("state_dir", "/run/" + "ü" * 28, "is longer than 60 characters"),
    ("snapshotter", "", "--snapshotter '' is no snapshotter's name"),
    ("snapshotter", "Nix", "--snapshotter 'Nix' is no snapshotter's name"),
    ("snapshotter", "a_b", "--snapshotter 'a_b' is no snapshotter's name"),
    ("snapshotter", "-a", "--snapshotter '-a' is no snapshotter's name"),
    ("snapshotter", "nix\n", "--snapshotter 'nix\\n' holds a line break"),
    ("also_snapshotter", ("a_b",), "--also-snapshotter 'a_b' is no snapshotter's name"),
    ("also_snapshotter", ("stargz", "stargz"), "--also-snapshotter names stargz once more"),
    ("also_snapshotter", ("nix",), "--also-snapshotter names nix once more"),
    ("also_snapshotter", ("runc",), "--also-snapshotter can't be runc, which is a runtime's name"),
    ("containerd", "", "--containerd is empty: it must name a program"),
    ("runc", "", "--runc is empty: it must name a program"),
    ("pause", "", "--pause is empty: it must name a program"),
    ("cni_bin_dirs", (), "--cni-bin-dir is empty: it must name a directory"),
    ("cni_bin_dirs", ("/opt", "bin"), "--cni-bin-dir 'bin' must be an absolute path"),
    ("cni_bin_dirs", ("/opt\t",), "--cni-bin-dir '/opt\\t' holds a line break"),
    ("resolv_conf", "/a\n", "--resolv-conf '/a\\n' holds a line break"),
    ("archive_dirs", ("images",), "--archive-dir 'images' must be an absolute path"),
    ("pod_cidr", "", "--pod-cidr '' is not a network"),
    ("pod_cidr", "10.0.0.0/33", "--pod-cidr '10.0.0.0/33' is not a network"),
    ("pod_cidr", "10.0.0.1/24", "--pod-cidr '10.0.0.1/24' is not a network: 10.0.0.1/24 has host bits set"),
    ("pod_cidr", "10.0.0.0/30", "--pod-cidr 10.0.0.0/30 has room for fewer than five pods"),
    ("bridge", "", "--bridge '' is no interface name"),
    ("bridge", "a/b", "--bridge 'a/b' is no interface name"),
    ("bridge", "a" * 16, "is no interface name of at most 15 lower-case characters"),
    (
        "container_runtime_endpoint",
        "tcp://1.2.3.4:5",
        "--container-runtime-endpoint 'tcp://1.2.3.4:5' is not a Unix socket",
    ),
    ("container_runtime_endpoint", "containerd.sock", "'containerd.sock' is not a Unix socket"),
    ("container_runtime_endpoint", "unix://a.sock", "'unix://a.sock' is not a Unix socket"),
    ("container_runtime_endpoint", "unix://", "'unix://' is not a Unix socket"),
    ("container_runtime_endpoint", "/" + "a" * 107, "is longer than 107 bytes, which socket paths don't allow"),
    ("image_service_endpoint", "npipe:////./x", "--image-service-endpoint 'npipe:////./x' is not a Unix socket"),
    ("image_service_endpoint", "unix:///" + "ü" * 54, "is longer than 107 bytes"),
    ("private_registry", "", "--private-registry is empty: it must name a file, which need not exist"),
    ("pause_image", "Pause", "--pause-image can't be used: 'Pause' is not an image reference"),
    ("pause_image", "nix:0pause:a:b", "--pause-image can't be used: "),
    ("pause_image", "a b", "--pause-image can't be used: "),
    ("default_runtime", "a/b", "--default-runtime 'a/b' is no runtime's name"),
    ("default_runtime", "crun]", "--default-runtime 'crun]' is no runtime's name"),
    ("system_default_registry", "https://r.example.com", "'https://r.example.com' is no registry"),
    ("system_default_registry", "r.example.com/", "--system-default-registry 'r.example.com/' is no registry"),
    ("airgap_extra_registry", ("r.example.com", ""), "--airgap-extra-registry '' is no registry"),
    ("airgap_extra_registry", ("http://r.example.com",), "'http://r.example.com' is no registry"),
    ("system_default_registry", "registry", "--system-default-registry 'registry' is no registry"),
    ("system_default_registry", "nix:0", "--system-default-registry 'nix:0' is no registry"),
    ("system_default_registry", "r.example.com/A", "--system-default-registry 'r.example.com/A' is no registry"),
    ("strategy", "best", "--strategy 'best' is not known"),
    ("unsigned_paths", "maybe", "--unsigned-paths 'maybe' is not known"),
    ("containerd_restart", "always", "--containerd-restart 'always' is not known"),
    ("containerd_restart", "", "--containerd-restart '' is not known"),
    ("container_log_max_size", "10 MB", "--container-log-max-size is '10 MB', which is no quantity"),
    ("container_log_max_size", "1Ki", "--container-log-max-size 1Ki is less than 64Ki"),
    ("container_log_max_files", "1", "--container-log-max-files '1' is no number from 2 to 9999"),
    ("health_address", "0.0.0.0:80", "--health-address '0.0.0.0:80' is no loopback address"),
    ("health_address", "[::]:80", "--health-address '[::]:80' is no loopback address"),
    ("health_address", "example.com:80", "--health-address 'example.com:80' is no loopback address"),
    ("health_address", "::1:80", "--health-address '::1:80' is no loopback address"),
    ("health_address", "[127.0.0.1]:80", "--health-address '[127.0.0.1]:80' is no loopback address"),
    ("health_address", "127.0.0.1", "--health-address '127.0.0.1' is not HOST:PORT"),
    ("health_address", ":80", "--health-address ':80' is not HOST:PORT"),
    ("health_address", "127.0.0.1:", "--health-address '127.0.0.1:' is not HOST:PORT"),
    ("health_address", "127.0.0.1:0", "--health-address '127.0.0.1:0' is not HOST:PORT"),
    ("health_address", "127.0.0.1:65536", "is not HOST:PORT, with a port up to 65535"),
    ("health_address", "127.0.0.1:٨٠", "is not HOST:PORT"),
    ("log", "/var/log/\x1b", "--log '/var/log/\\x1b' holds a line break"),
    ("kubernetes", "maybe", "--kubernetes 'maybe' is not known"),
    ("server", "https://user:pass@192.0.2.7", "--server is no server's URL"),
    ("server", "https://192.0.2.7:6443/path", "--server is no server's URL"),
    ("kubeconfig", "/a\n", "--kubeconfig '/a\\n' holds a line break"),
    ("kubernetes_bin_dir", "bin", "--kubernetes-bin-dir 'bin' must be an absolute path"),
    ("flannel_backend", "wireguard-native", "--flannel-backend 'wireguard-native' is none that nixlet has"),
    ("flannel_iface", "eth0/x", "--flannel-iface 'eth0/x' is no interface's name"),
    ("disable", ("coredns.yaml",), "--disable 'coredns.yaml' is a file's name"),
    ("coredns_image", "A", "--coredns-image can't be used: "),
    ("https_listen_port", "0", "--https-listen-port '0' is no port"),
    ("https_listen_port", "65536", "--https-listen-port '65536' is no port"),
    ("https_listen_port", "", "--https-listen-port '' is no port"),
    # A secret isn't repeated.
    *((name, "a\nb", f"{names.flag(name)} holds a line break") for name in sorted(config.SECRET)),
    # What else they must be like is told by the cluster's own rules, when there is a cluster.
    *((name, "a\nb", f"{names.flag(name)} 'a\\nb' holds a line break") for name in OF_A_CLUSTER),
    *((name, ("a\nb",), f"{names.flag(name)} 'a\\nb' holds a line break") for name in LISTS_OF_A_CLUSTER),
]

RIGHT = [
    ("snapshotter", "native", "native"),
    ("snapshotter", "fuse-overlayfs", "fuse-overlayfs"),
    ("also_snapshotter", ("stargz", "overlayfs"), ("stargz", "overlayfs")),
    ("container_runtime_endpoint", "unix:///run/a.sock", "/run/a.sock"),
    ("container_runtime_endpoint", "/run/a.sock", "/run/a.sock"),
    ("image_service_endpoint", "unix:///run/a.sock", "/run/a.sock"),
    ("data_dir", "/var//lib/x/", "/var/lib/x"),
    ("private_registry", "/etc/../r.yaml", "/r.yaml"),
    ("log", "/var/log//x", "/var/log/x"),
    ("log", "", ""),
    ("pause_image", "registry.k8s.io/pause:3.10", "registry.k8s.io/pause:3.10"),
    ("pause_image", "nix:0/srv/pause.tar", "nix:0/srv/pause.tar"),
    ("system_default_registry", "r.example.com:5000/mirror", "r.example.com:5000/mirror"),
    ("airgap_extra_registry", ("r.example.com/x/",), ("r.example.com/x/",)),
    ("system_default_registry", "localhost", "localhost"),
    ("system_default_registry", "docker.io", "docker.io"),
    ("default_runtime", "io.containerd.runsc.v1", "io.containerd.runsc.v1"),
    ("containerd_restart", "never", "never"),
    ("health_address", "none", "none"),
    ("health_address", "127.8.0.1:1", "127.8.0.1:1"),
    ("health_address", "[::1]:65535", "[::1]:65535"),
    ("health_address", "localhost:10248", "localhost:10248"),
    ("pod_cidr", "10.0.0.0/29", "10.0.0.0/29"),
    *(("flannel_backend", each, each) for each in ("", "none", "host-gw", "vxlan")),
    ("flannel_iface", "eth0.100", "eth0.100"),
    ("flannel_conf", "/etc/../f.json", "/f.json"),
]


@pytest.mark.parametrize(("name", "value", "sentence"), WRONG)
def test_a_value_that_cannot_be(name: str, value: Any, sentence: str) -> None:
    with pytest.raises(errors.UsageError) as caught:
        rules.checked(dataclasses.replace(config.Settings(), **{name: value}))
    assert sentence in caught.value.message
    assert caught.value.message.startswith(f"{names.flag(name)} ")


@pytest.mark.parametrize(("name", "value", "checked"), RIGHT)
def test_a_value_that_can_be(name: str, value: Any, checked: str) -> None:
    assert getattr(rules.checked(dataclasses.replace(config.Settings(), **{name: value})), name) == checked


def test_a_token_comes_from_one_place() -> None:
    with pytest.raises(errors.UsageError, match=r"^--agent-token and agent-token-file are both set$"):
        rules.checked(config.Settings(agent_token="x", agent_token_file="/x"))
    checked = rules.checked(config.Settings(token_file="t", write_kubeconfig="/a/../k"))
    assert checked.token_file.endswith("/t")
    assert checked.token_file.startswith("/")
    assert checked.write_kubeconfig == "/k"


def test_the_defaults_can_be_and_checking_twice_changes_nothing() -> None:
    settings = rules.checked(config.Settings(container_runtime_endpoint="unix:///run/a.sock", data_dir="data"))
    assert rules.checked(settings) == settings


def test_every_setting_has_a_case() -> None:
    texts = {field.name for field in dataclasses.fields(config.Settings) if not isinstance(field.default, bool)}
    assert {name for name, _, _ in WRONG} == texts


def test_an_error_calls_the_setting_as_its_origin_does() -> None:
    with pytest.raises(errors.UsageError, match=r"^/etc/x, line 3: bridge 'A' is no interface name"):
        rules.checked(config.Settings(bridge="A"), lambda name: f"/etc/x, line 3: {names.key(name)}")


def test_the_files_that_belong_to_versions_of_containerds_format() -> None:
    layout = config.Layout("/d", "/s")
    assert layout.containerd_config == "/d/agent/etc/containerd/config.toml"
    assert [layout.template(version) for version in (2, 3, 4)] == [
        "/d/agent/etc/containerd/config.toml.tmpl",
        "/d/agent/etc/containerd/config-v3.toml.tmpl",
        "/d/agent/etc/containerd/config-v4.toml.tmpl",
    ]
    assert [layout.dropin_dir(version) for version in (2, 3, 4)] == [
        "/d/agent/etc/containerd/config.toml.d",
        "/d/agent/etc/containerd/config-v3.toml.d",
        "/d/agent/etc/containerd/config-v4.toml.d",
    ]


@pytest.mark.parametrize(("name", "value"), [("snapshotter", "fuse-overlayfs"), ("also_snapshotter", ("stargz",))])
def test_snapshotters_that_an_ordinary_users_node_has_not_yet(name: str, value: Any) -> None:
    settings = config.Settings(rootless=True, **{name: value})
    with pytest.raises(errors.UsageError, match=r"--(also-)?snapshotter \S+ can't be with rootless yet"):
        rules.checked(settings)
