"""The two forms of containerd's configuration, k3s's and ours, table by table: what is the same, and what differs on purpose."""

import dataclasses
import tomllib
from typing import Any

import pytest

from nixlet.containerd import config, hosts, k3s, proxyplugins, registries, runtimes, templates, tomlread

CRI = "io.containerd.grpc.v1.cri"
IMAGES = "io.containerd.cri.v1.images"
RUNTIME = "io.containerd.cri.v1.runtime"
NIX = "io.containerd.snapshotter.v1.nix"
STARGZ = "io.containerd.snapshotter.v1.stargz"
TRANSFER = "io.containerd.transfer.v1.local"
NRI = "io.containerd.nri.v1.nri"
TASKS = "io.containerd.service.v1.tasks-service"

AUTHS = {"b.example": {"auth": "YTpi"}, "a.example:5000": {"username": "me", "password": "p"}}

SOCKET = "/run/k3s/containerd/nix-snapshotter.sock"

SETTINGS = config.ContainerdSettings(
    version=3,
    root="/var/lib/rancher/k3s/agent/containerd",
    state="/run/k3s/containerd",
    address="/run/k3s/containerd/containerd.sock",
    opt_dir="/var/lib/rancher/k3s/agent/containerd",
    snapshotter="nix",
    proxies=(proxyplugins.ProxyPlugin("nix", SOCKET, capabilities=("remap-ids",), reads_annotations=True),),
    sandbox_image="rancher/mirrored-pause:3.6",
    cni_bin_dir="/var/lib/rancher/k3s/data/cni",
    cni_conf_dir="/var/lib/rancher/k3s/agent/etc/cni/net.d",
    runc="/usr/sbin/runc",
    runc_root="/run/k3s/runc",
    nri_socket="/run/k3s/nri.sock",
    restrict_oom_score_adj=False,
    architecture="riscv64",
    certs_dir="/var/lib/rancher/k3s/agent/etc/containerd/certs.d",
)

OWN, THEIRS = "own", "theirs"


def rendered(form: str, version: int, **changes: Any) -> dict[str, Any]:
    """What stands in the text of a form, as containerd reads it."""
    settings = dataclasses.replace(SETTINGS, version=version, **changes)
    table = config.tables(settings) if form == OWN else k3s.tables(settings, f"/etc/{config.stem(version)}.toml.d")
    return tomllib.loads(config.dump(table, version))


def at(table: dict[str, Any], *path: str) -> Any:
    return tomlread.at(table, ("plugins", *path))


def cri(version: int) -> tuple[str, str]:
    """The plugins that have what concerns images, and what concerns containers."""
    return (CRI, CRI) if version == 2 else (IMAGES, RUNTIME)


BOTH_VERSIONS = pytest.mark.parametrize("version", k3s.VERSIONS)
ALL_VERSIONS = pytest.mark.parametrize(
    ("form", "version"), [*((THEIRS, each) for each in k3s.VERSIONS), *((OWN, each) for each in config.VERSIONS)]
)


@BOTH_VERSIONS
def test_the_nix_snapshotters_tables(version: int) -> None:
    table = rendered(THEIRS, version)
    assert at(table, NIX) == {
        "address": "/run/k3s/containerd/nix-snapshotter.sock",
        "image_service": {"enable": True, "containerd_address": "/run/k3s/containerd/containerd.sock"},
    }
    # These two whatever the machine is.
    assert at(table, TRANSFER, "unpack_config") == [
        {"platform": "linux/amd64", "snapshotter": "nix", "differ": "walking"},
        {"platform": "linux/arm64", "snapshotter": "nix", "differ": "walking"},
    ]
    assert at(table, STARGZ) is None


def test_our_transfer_service_knows_this_machine_too() -> None:
    for version in config.VERSIONS:
        platforms = [each["platform"] for each in at(rendered(OWN, version), TRANSFER, "unpack_config")]
        assert platforms == ["linux/amd64", "linux/arm64", "linux/riscv64"]
        table = rendered(OWN, version, architecture="arm64", snapshotter="overlayfs", proxies=())
        assert at(table, TRANSFER, "unpack_config") == [
            {"platform": f"linux/{each}", "snapshotter": "overlayfs", "differ": "walking"}
            for each in ("amd64", "arm64")
        ]


@pytest.mark.parametrize("snapshotter", ["overlayfs", "fuse-overlayfs", "native", "btrfs", "zfs", "stargz", "nix"])
@BOTH_VERSIONS
def test_annotations_reach_those_who_read_them(version: int, snapshotter: str) -> None:
    table = rendered(THEIRS, version, snapshotter=snapshotter)
    path = (CRI, "containerd") if version == 2 else (IMAGES,)
    assert at(table, *path, "snapshotter") == snapshotter
    assert at(table, *path, "disable_snapshot_annotations") is (snapshotter not in {"stargz", "nix"})
    assert (at(table, NIX) is not None, at(table, STARGZ) is not None) == (
        snapshotter == "nix",
        snapshotter == "stargz",
    )
    assert (at(table, TRANSFER) is not None) == (snapshotter == "nix")


def test_our_containerd_2_hands_annotations_on_without_the_key() -> None:
    """It would make CRI warn and give up the Transfer service; the proxy plugin's export says the same."""
    for version in (3, 4):
        table = rendered(OWN, version)
        assert at(table, IMAGES, "disable_snapshot_annotations") is None
        assert table["proxy_plugins"]["nix"]["exports"]["enable_remote_snapshot_annotations"] == "true"
    assert at(rendered(OWN, 2), CRI, "containerd", "disable_snapshot_annotations") is False


def test_cri_says_what_image_a_layer_is_of_to_who_asks_registries() -> None:
    """The Transfer service does so by itself, and refuses credentials."""
    stargz = proxyplugins.ProxyPlugin("stargz", "/s.sock", reads_annotations=True, asks_registries=True)
    for version in (3, 4):
        table = rendered(OWN, version, proxies=(stargz,), snapshotter="stargz")
        assert at(table, IMAGES, "disable_snapshot_annotations") is None
        table = rendered(OWN, version, proxies=(stargz,), snapshotter="stargz", auths=AUTHS)
        assert at(table, IMAGES, "disable_snapshot_annotations") is False
        assert at(rendered(OWN, version, auths=AUTHS), IMAGES, "disable_snapshot_annotations") is None


def test_pulls_stay_with_cri_where_there_are_credentials() -> None:
    assert at(rendered(THEIRS, 3), IMAGES, "use_local_image_pull") is True
    assert at(rendered(THEIRS, 2), CRI, "use_local_image_pull") is None
    for version in (3, 4):
        assert at(rendered(OWN, version), IMAGES, "use_local_image_pull") is None
        assert at(rendered(OWN, version, auths=AUTHS), IMAGES, "use_local_image_pull") is True


@BOTH_VERSIONS
def test_stargzs_tables(version: int) -> None:
    plugin = at(rendered(THEIRS, version, snapshotter="stargz", auths=AUTHS), STARGZ)
    assert plugin == {
        "cri_keychain_image_service_path": "/run/containerd-stargz-grpc/containerd-stargz-grpc.sock",
        "cri_keychain": {"enable_keychain": True},
        "registry": {
            "config_path": SETTINGS.certs_dir,
            "configs": {host: {"auth": auth} for host, auth in AUTHS.items()},
        },
    }


@ALL_VERSIONS
def test_a_user_namespace(form: str, version: int) -> None:
    _, runtime = cri(version)
    inside = rendered(form, version, in_user_namespace=True)
    outside = rendered(form, version)
    assert at(inside, runtime, "disable_apparmor") is at(inside, runtime, "restrict_oom_score_adj") is True
    assert at(outside, runtime, "disable_apparmor") is None
    assert at(outside, runtime, "restrict_oom_score_adj") is (False if form == OWN else None)
    # k3s's version 2 leaves NRI on, whose socket can't be bound there; ours is elsewhere, and off all the same.
    assert at(inside, NRI, "disable") is (None if (form, version) == (THEIRS, 2) else True)
    assert at(outside, NRI, "disable") is None


@pytest.mark.parametrize("snapshotter", ["overlayfs", "native", "stargz", "nix"])
def test_nri_is_off_in_a_user_namespace_for_every_snapshotter(snapshotter: str) -> None:
    table = rendered(THEIRS, 3, snapshotter=snapshotter, in_user_namespace=True)
    assert at(table, NRI) == {"disable": True}


@BOTH_VERSIONS
def test_without_cgroups(version: int) -> None:
    _, runtime = cri(version)
    assert at(rendered(THEIRS, version, disable_cgroup=True), runtime, "disable_cgroup") is True
    assert at(rendered(THEIRS, version), runtime, "disable_cgroup") is None


def test_containerd_2_of_ours_is_not_told_of_missing_cgroups() -> None:
    assert at(rendered(OWN, 2, disable_cgroup=True), CRI, "disable_cgroup") is True
    for version in (3, 4):
        assert at(rendered(OWN, version, disable_cgroup=True), RUNTIME, "disable_cgroup") is None


@ALL_VERSIONS
def test_the_pause_image(form: str, version: int) -> None:
    images, _ = cri(version)
    path = (CRI, "sandbox_image") if version == 2 else (images, "pinned_images", "sandbox")
    assert at(rendered(form, version), *path) == "rancher/mirrored-pause:3.6"
    empty = rendered(form, version, sandbox_image="")
    assert at(empty, *path) is None
    assert at(empty, images, "pinned_images") is None


@ALL_VERSIONS
def test_the_network(form: str, version: int) -> None:
    _, runtime = cri(version)
    programs: dict[str, Any] = (
        {"bin_dir": SETTINGS.cni_bin_dir} if version == 2 else {"bin_dirs": [SETTINGS.cni_bin_dir]}
    )
    assert at(rendered(form, version), runtime, "cni") == {**programs, "conf_dir": SETTINGS.cni_conf_dir}


@ALL_VERSIONS
def test_classes(form: str, version: int) -> None:
    assert at(rendered(form, version), TASKS) is None
    assert at(rendered(form, version, blockio_config="/b"), TASKS) == {"blockio_config_file": "/b"}
    assert at(rendered(form, version, rdt_config="/r"), TASKS) == {"rdt_config_file": "/r"}
    both = {"blockio_config_file": "/b", "rdt_config_file": "/r"}
    assert at(rendered(form, version, blockio_config="/b", rdt_config="/r"), TASKS) == both


@ALL_VERSIONS
def test_what_containers_may(form: str, version: int) -> None:
    _, runtime = cri(version)
    for value in (True, False):
        said = rendered(form, version, enable_selinux=value, enable_unprivileged=value, nonroot_devices=value)
        for key in (
            "enable_selinux",
            "enable_unprivileged_ports",
            "enable_unprivileged_icmp",
            "device_ownership_from_security_context",
        ):
            assert at(said, runtime, key) is value


FOUND = {
    "wasmtime": runtimes.Runtime("io.containerd.wasmtime.v1", "/opt/kwasm/bin/containerd-shim-wasmtime-v1"),
    "crun": runtimes.Runtime("io.containerd.runc.v2", "/usr/bin/crun"),
}


@BOTH_VERSIONS
def test_k3ss_runtimes(version: int) -> None:
    _, runtime = cri(version)
    table = rendered(THEIRS, version, runtimes=FOUND, systemd_cgroup=True, default_runtime="runhcs-wcow-process")
    assert at(table, runtime, "containerd", "default_runtime_name") == "runhcs-wcow-process"
    found = at(table, runtime, "containerd", "runtimes")
    assert list(found) == ["runc", "runhcs-wcow-process", "crun", "wasmtime"]
    assert found["runc"] == {"runtime_type": "io.containerd.runc.v2", "options": {"SystemdCgroup": True}}
    # Windows's stands there on every machine.
    assert found["runhcs-wcow-process"] == {"runtime_type": "io.containerd.runhcs.v1"}
    assert found["wasmtime"]["options"] == {"BinaryName": FOUND["wasmtime"].program, "SystemdCgroup": True}
    assert at(rendered(THEIRS, version), runtime, "containerd", "default_runtime_name") is None


def test_our_runtimes() -> None:
    for version in config.VERSIONS:
        _, runtime = cri(version)
        table = rendered(OWN, version, runtimes=FOUND)
        found = at(table, runtime, "containerd", "runtimes")
        assert list(found) == ["runc", "crun", "wasmtime"]
        # The node's own program and state, not what PATH and /run have.
        assert found["runc"]["options"] == {
            "BinaryName": "/usr/sbin/runc",
            "Root": "/run/k3s/runc",
            "SystemdCgroup": False,
        }
        # A shim is no program that runc's shim could start: it is named as what it is.
        assert found["wasmtime"]["runtime_path"] == FOUND["wasmtime"].program
        assert at(table, runtime, "containerd", "default_runtime_name") == "runc"


@ALL_VERSIONS
def test_registries(form: str, version: int) -> None:
    images, _ = cri(version)
    assert at(rendered(form, version), images, "registry") == {"config_path": SETTINGS.certs_dir}
    registry = at(rendered(form, version, auths=AUTHS), images, "registry")
    assert registry["config_path"] == SETTINGS.certs_dir
    assert list(registry["configs"]) == ["a.example:5000", "b.example"]
    assert registry["configs"]["b.example"] == {"auth": {"auth": "YTpi"}}


@ALL_VERSIONS
def test_places(form: str, version: int) -> None:
    table = rendered(form, version)
    assert (table["version"], table["root"], table["state"]) == (version, SETTINGS.root, SETTINGS.state)
    assert at(table, "io.containerd.internal.v1.opt", "path") == SETTINGS.opt_dir
    server = at(table, "io.containerd.server.v1.grpc") if version == 4 else table["grpc"]
    assert server == {"address": SETTINGS.address}


@ALL_VERSIONS
def test_streaming_is_for_this_machine_alone(form: str, version: int) -> None:
    table = rendered(form, version)
    assert at(table, CRI, "stream_server_address") == "127.0.0.1"
    # Two nodes of ours can't have the same port: the kernel chooses.
    assert at(table, CRI, "stream_server_port") == ("0" if form == OWN else "10010")


@ALL_VERSIONS
def test_only_k3s_lets_containerd_import(form: str, version: int) -> None:
    wanted = [f"/etc/{config.stem(version)}.toml.d/*.toml"] if form == THEIRS else None
    assert rendered(form, version).get("imports") == wanted


@pytest.mark.parametrize(("version", "stem"), [(2, "config"), (3, "config-v3"), (4, "config-v4")])
def test_the_head_names_what_to_write_instead(version: int, stem: str) -> None:
    text = config.render(dataclasses.replace(SETTINGS, version=version))
    assert text.splitlines()[0] == (
        f"# File generated by nixlet. DO NOT EDIT. Use {stem}.toml.tmpl or {stem}.toml.d instead."
    )


def test_what_a_template_may_ask_for_has_k3ss_names() -> None:
    values = templates.fields(
        SETTINGS,
        template_dir="/etc",
        image_service=SOCKET,
        said=registries.Registries(),
        default_endpoint=False,
    ).fields
    node = values["NodeConfig"].fields
    agent, containerd = node["AgentConfig"].fields, node["Containerd"].fields
    assert (agent["Snapshotter"], agent["ImageServiceSocket"]) == ("nix", "/run/k3s/containerd/nix-snapshotter.sock")
    assert (containerd["Address"], containerd["Registry"]) == (SETTINGS.address, SETTINGS.certs_dir)
    assert values["SystemdCgroup"] is False
    assert values["NoDefaultEndpoint"] is True
    assert values.keys() >= {
        *("DisableCgroup", "EnableUnprivileged", "ExtraRuntimes", "IsRunningInUserNS", "NonrootDevices", "Program"),
        *("NoDefaultEndpoint", "PrivateRegistryConfig", "SystemdCgroup"),
    }
    assert node.keys() >= {"SELinux", "DefaultRuntime"}
    assert agent.keys() >= {"PauseImage", "CNIBinDir", "CNIConfDir"}
    assert containerd.keys() >= {"Template", "Root", "State", "Opt", "BlockIOConfig", "RDTConfig"}


def hosts_files(said: registries.Registries) -> dict[str, dict[str, Any]]:
    warnings: list[str] = []
    found = hosts.hosts(said, default_endpoint=True, warn=warnings.append, told=said.auths())
    assert warnings == []
    return {name: tomllib.loads(hosts.render(host, lambda _: None)) for name, host in found.items()}


@pytest.mark.parametrize("host", ["localhost", "localhost:80", "localhost:443", "localhost:5000", "127.0.0.1:5000"])
def test_a_registry_of_this_machine_needs_no_file(host: str) -> None:
    assert hosts_files(registries.Registries({host: registries.Mirror()})) == {}


def test_a_registry_of_this_machine_with_tls_on_a_port_of_its_own() -> None:
    """It is asked by HTTPS where that is said, and by HTTP otherwise: there the default is HTTP."""
    mirrors = {"localhost:5000": registries.Mirror(("https://localhost:5000",))}
    configs = {"localhost:5000": registries.HostConfig(tls=registries.Tls(skip_verify=True))}
    said = registries.Registries(mirrors, configs)
    assert hosts_files(said) == {
        "localhost:5000": {
            "server": "http://localhost:5000/v2",
            "capabilities": ["pull", "resolve", "push"],
            "skip_verify": True,
            "host": {"https://localhost:5000/v2": {"capabilities": ["pull", "resolve"], "skip_verify": True}},
        }
    }


def test_mirrors_and_certificates_of_every_other_registry_come_together() -> None:
    configs = {"*": registries.HostConfig(tls=registries.Tls(skip_verify=True))}
    said = registries.Registries({"*": registries.Mirror(("mirror.example",))}, configs)
    assert hosts_files(said) == {
        "_default": {
            "skip_verify": True,
            "host": {"https://mirror.example/v2": {"capabilities": ["pull", "resolve"]}},
        }
    }
