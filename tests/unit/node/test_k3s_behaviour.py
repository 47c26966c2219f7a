"""What a node takes over from k3s: places, flags, keys, containerd's command line and environment, warnings."""

import dataclasses
import logging
import os
import tomllib
from pathlib import Path
from typing import Any

import pytest

from nixlet import errors
from nixlet.cli import app
from nixlet.containerd import config as containerd_config
from nixlet.containerd import crictl, tomlread
from nixlet.host import cgroups, logfiles
from nixlet.kube import manifest
from nixlet.node.children import containerd_child, rendering
from nixlet.node.requirements import snapshotters
from nixlet.node.settings import config, configfile, k3skeys, names
from nixlet.store.daemon import client as nix

RUNTIME = "io.containerd.cri.v1.runtime"


@pytest.fixture
def layout(tmp_path: Path) -> config.Layout:
    return config.Layout(f"{tmp_path}/data", f"{tmp_path}/state")


@pytest.fixture
def programs(tmp_path: Path) -> containerd_child.Programs:
    containerd = containerd_config.ContainerdProgram(f"{tmp_path}/bin/containerd", "2.0.0", 3)
    return containerd_child.Programs(containerd, runc="/usr/sbin/runc", cni_bin_dir="/cni", pause="/bin/pause")


def test_places_have_k3ss_names() -> None:
    """With k3s's two directories everything is where k3s has it, but for what is not its own there."""
    layout = config.Layout("/var/lib/rancher/k3s", "/run/k3s")
    agent = "/var/lib/rancher/k3s/agent"
    containerd = f"{agent}/etc/containerd"
    for place, wanted in (
        (layout.images, f"{agent}/images"),
        (layout.containerd_config, f"{containerd}/config.toml"),
        (layout.template(3), f"{containerd}/config-v3.toml.tmpl"),
        (layout.template(2), f"{containerd}/config.toml.tmpl"),
        (layout.dropin_dir(3), f"{containerd}/config-v3.toml.d"),
        (layout.dropin_dir(2), f"{containerd}/config.toml.d"),
        (layout.certs_dir, f"{containerd}/certs.d"),
        (layout.containerd_root, f"{agent}/containerd"),
        (layout.containerd_log, f"{agent}/containerd/containerd.log"),
        (layout.containerd_state, "/run/k3s/containerd"),
        (layout.containerd_socket, "/run/k3s/containerd/containerd.sock"),
        (layout.node_socket, "/run/k3s/containerd/nix-snapshotter.sock"),
        (layout.snapshotter_root("nix"), f"{agent}/containerd/io.containerd.snapshotter.v1.nix"),
        (layout.crictl_config, f"{agent}/etc/crictl.yaml"),
        (layout.cni_conf_dir, f"{agent}/etc/cni/net.d"),
    ):
        assert place == wanted
    # Ours alone: k3s has containerd's own directory in its place, where nothing of the system's is either.
    assert layout.opt == f"{agent}/opt"
    assert containerd_config.STARGZ_SOCKET == "/run/containerd-stargz-grpc/containerd-stargz-grpc.sock"


def test_defaults() -> None:
    settings = config.Settings()
    # k3s is for all images, nixlet for those of the Nix store first.
    assert settings.snapshotter == "nix"
    assert (names.DEFAULT_FILE, settings.private_registry) == (
        "/etc/nixlet/config.yaml",
        "/etc/nixlet/registries.yaml",
    )
    assert (settings.data_dir, settings.state_dir) == ("/var/lib/nixlet", "/run/nixlet")
    assert settings.default_runtime == settings.container_runtime_endpoint == settings.image_service_endpoint == ""
    booleans = ("selinux", "nonroot_devices", "disable_default_registry_endpoint", "debug")
    assert not any(getattr(settings, name) for name in booleans)


@pytest.mark.parametrize("version", [2, 3])
def test_the_sockets_follow_the_state_directory(tmp_path: Path, version: int) -> None:
    layout = config.Layout("/var/lib/rancher/k3s", f"{tmp_path}/s")
    table = rendering.render_for_k3s(config.Settings(), layout, version=version, cni_bin_dir="/cni").table
    assert tomlread.at(table, ("plugins", "io.containerd.snapshotter.v1.nix")) == {
        "address": f"{tmp_path}/s/containerd/nix-snapshotter.sock",
        "image_service": {"enable": True, "containerd_address": f"{tmp_path}/s/containerd/containerd.sock"},
    }


def test_crictl_asks_the_image_service_for_images() -> None:
    """k3s's file has the runtime's endpoint alone, so that its crictl can't pull archives of the store."""
    assert crictl.render(runtime_socket="/a", image_socket="/b").splitlines()[:2] == [
        'runtime-endpoint: "unix:///a"',
        'image-endpoint: "unix:///b"',
    ]


#: k3s's flags that concern an agent's containers, with a value.
TAKEN = {
    "snapshotter": "native",
    "container-runtime-endpoint": "/run/c.sock",
    "image-service-endpoint": "/run/i.sock",
    "default-runtime": "crun",
    "pause-image": "r.example/pause:1",
    "private-registry": "/etc/r.yaml",
    "disable-default-registry-endpoint": "true",
    "nonroot-devices": "true",
    "system-default-registry": "r.example",
    "airgap-extra-registry": "r.example",
    "resolv-conf": "/etc/r.conf",
    "selinux": "true",
    "data-dir": "/d",
    "rootless": "true",
    "debug": "true",
    "log": "/l",
}

#: The same of its flags that concern a cluster.
OF_A_CLUSTER = {
    "token": "secret",
    "token-file": "/t",
    "agent-token": "another",
    "agent-token-file": "/a",
    "node-name": "n",
    "node-ip": "192.0.2.7",
    "node-label": "a=b",
    "node-taint": "a=b:NoSchedule",
    "cluster-cidr": "10.1.0.0/16",
    "service-cidr": "10.2.0.0/16",
    "cluster-dns": "10.2.0.10",
    "cluster-domain": "example.local",
    "service-node-port-range": "31000-32000",
    "flannel-backend": "none",
    "flannel-iface": "eth0",
    "flannel-conf": "/f",
    "tls-san": "a.example",
    "https-listen-port": "7443",
    "advertise-address": "192.0.2.8",
    "write-kubeconfig": "/k",
    "write-kubeconfig-mode": "640",
    "write-kubeconfig-group": "adm",
    "datastore-endpoint": "mysql://x",
    "datastore-cafile": "/ca",
    "datastore-certfile": "/crt",
    "datastore-keyfile": "/key",
    "cluster-init": "true",
    "secrets-encryption": "true",
    "disable": "coredns",
    "disable-agent": "true",
    "disable-kube-proxy": "true",
    "disable-scheduler": "true",
    "disable-controller-manager": "true",
    "etcd-arg": "a=b",
    "kube-apiserver-arg": "a=b",
    "kube-controller-manager-arg": "a=b",
    "kube-scheduler-arg": "a=b",
    "kubelet-arg": "a=b",
    "kube-proxy-arg": "a=b",
}


def status_of(*arguments: str) -> int:
    return app.run(["server", "--config", os.devnull, "--show-config", *arguments])


@pytest.mark.parametrize(("key", "value"), (TAKEN | OF_A_CLUSTER).items())
def test_flags_that_are_taken(tmp_path: Path, key: str, value: str) -> None:
    name = key.replace("-", "_")
    several = isinstance(getattr(config.Settings(), name), tuple)
    wanted = True if value == "true" else (value,) if several else value
    flag = configfile.load({name: (value,) if several else value}, {}, file=os.devnull).settings
    file = tmp_path / "config.yaml"
    file.write_text(f"{key}: {value}\n")
    assert getattr(flag, name) == getattr(configfile.load({}, {}, file=str(file)).settings, name) == wanted
    assert status_of(f"--{key}={value}") == 0


@pytest.mark.parametrize("key", k3skeys.PASSED_OVER)
def test_what_means_nothing_here_is_told_and_passed_over(
    tmp_path: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"{key}: 'true'\n")
    assert configfile.load({}, {}, file=str(file)).warnings[0].startswith(f"{file}, line 1: {key} is passed over: ")
    assert status_of(f"--{key}=true" if len(key) > 1 else f"-{key}true") == 0
    assert f"warning: --{key} is passed over: " in capsys.readouterr().err


@pytest.mark.parametrize("key", k3skeys.REFUSED)
def test_what_somebody_would_miss_is_refused_in_words(
    tmp_path: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"{key}: 'true'\n")
    with pytest.raises(errors.UnsupportedError, match=f": {key} is k3s's, and not supported: "):
        configfile.load({}, {}, file=str(file))
    assert status_of(f"--{key}=true") == 125
    assert f"error: --{key} is k3s's, and not supported: " in capsys.readouterr().err


def test_a_server_that_is_to_join_another_one_is_refused_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("server: https://192.0.2.7:6443\n")
    assert configfile.load({}, {}, file=str(file)).settings.server == "https://192.0.2.7:6443"
    assert configfile.load({}, {"NIXLET_URL": "https://192.0.2.8"}).settings.server == "https://192.0.2.8"
    assert status_of("--server=https://192.0.2.7:6443") == 125
    assert "error: --server: a cluster has one server, which joins no other one" in capsys.readouterr().err


def test_help_needs_no_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("no-such-key: 1\n")
    for flag in ("--help", "-h"):
        assert app.run(["server", "--config", str(file), flag]) == 0
        assert "--snapshotter" in capsys.readouterr().out


def test_the_command_line_of_containerd(
    monkeypatch: pytest.MonkeyPatch, layout: config.Layout, programs: containerd_child.Programs
) -> None:
    monkeypatch.delenv("CONTAINERD_LOG_LEVEL", raising=False)

    def command(*, debug: bool = False) -> list[str]:
        return containerd_child._command(config.Settings(debug=debug), layout, programs, "/c.toml")

    plain = [
        programs.containerd.path,
        "--config=/c.toml",
        f"--address={layout.containerd_socket}",
        f"--root={layout.containerd_root}",
        f"--state={layout.containerd_state}",
    ]
    assert command() == plain
    assert command(debug=True) == [*plain, "--log-level=debug"]
    monkeypatch.setenv("CONTAINERD_LOG_LEVEL", "warn")
    # The nearer word wins.
    assert command() == command(debug=True) == [*plain, "--log-level=warn"]


def test_the_environment_of_containerd(
    monkeypatch: pytest.MonkeyPatch, programs: containerd_child.Programs, tmp_path: Path
) -> None:
    said = {
        "HTTP_PROXY": "http://ours",
        "KEPT": "as it is",
        "CONTAINERD_HTTP_PROXY": "http://proxy",
        "CONTAINERD_NO_PROXY": "10.0.0.0/8",
        "CONTAINERD_LOG_LEVEL": "debug",
        "CONTAINERD_ADDRESS": "/run/other.sock",
        "CONTAINERD_NAMESPACE": "other",
        "NOTIFY_SOCKET": "/run/systemd/notify",
        "WATCHDOG_PID": "1",
        "WATCHDOG_USEC": "1",
        "PATH": "/own:/usr/bin",
    }
    monkeypatch.setattr(os, "environ", said)
    assert containerd_child.environment(programs) == {
        "HTTP_PROXY": "http://proxy",
        "NO_PROXY": "10.0.0.0/8",
        "KEPT": "as it is",
        "PATH": f"{tmp_path}/bin:/own:/usr/bin:/usr/sbin:/sbin",
    }


def test_the_log_of_containerd_is_as_large_as_k3ss() -> None:
    assert (logfiles.LIMIT, logfiles.BACKUPS) == (50 * 1024 * 1024, 3)


def rendered(layout: config.Layout, version: int = 3, **settings: Any) -> dict[str, Any]:
    said = config.Settings(**settings)
    return rendering.render(said, layout, version=version, runc="/usr/sbin/runc", cni_bin_dir="/cni").table


@pytest.mark.parametrize("there", [True, False])
def test_unprivileged_ports_are_what_the_kernel_has(
    monkeypatch: pytest.MonkeyPatch, layout: config.Layout, tmp_path: Path, there: bool
) -> None:
    """k3s looks at the kernel's version (4.11), nixlet for the setting itself."""
    place = tmp_path / "ip_unprivileged_port_start"
    if there:
        place.write_text("1024\n")
    monkeypatch.setattr(rendering, "_UNPRIVILEGED_PORTS", str(place))
    for version, plugin in ((2, "io.containerd.grpc.v1.cri"), (3, RUNTIME), (4, RUNTIME)):
        table = rendered(layout, version)
        for key in ("enable_unprivileged_ports", "enable_unprivileged_icmp"):
            assert tomlread.at(table, ("plugins", plugin, key)) is there


@pytest.mark.parametrize(
    ("invocation", "controllers", "inside", "wanted"),
    [
        ("1", {"cpuset", "cpu"}, False, True),
        ("1", {"cpu"}, False, False),
        ("", {"cpuset"}, False, False),
        ("1", {"cpuset"}, True, False),
    ],
)
def test_who_makes_cgroups(
    monkeypatch: pytest.MonkeyPatch,
    layout: config.Layout,
    invocation: str,
    controllers: set[str],
    inside: bool,
    wanted: bool,
) -> None:
    """Where k3s has it; in a form for ourselves only where systemd is there."""
    monkeypatch.setenv("INVOCATION_ID", invocation)
    monkeypatch.setattr("nixlet.host.cgroups.controllers", lambda **_: frozenset(controllers))
    monkeypatch.setattr("nixlet.host.userns.is_inside", lambda: inside)
    theirs = rendering.render_for_k3s(config.Settings(), layout, version=3, cni_bin_dir="/cni").table
    path = ("plugins", RUNTIME, "containerd", "runtimes", "runc", "options", "SystemdCgroup")
    assert tomlread.at(theirs, path) is wanted
    for booted in (True, False):
        monkeypatch.setattr("nixlet.host.cgroups.systemd_runs", lambda booted=booted: booted)
        assert tomlread.at(rendered(layout), path) is (wanted and booted)


@pytest.mark.parametrize(
    ("controllers", "inside", "wanted"),
    [({"cpu", "pids"}, True, None), ({"cpu"}, True, True), ({"pids"}, True, True), (set(), False, None)],
)
def test_cgroups_that_are_not_delegated(
    monkeypatch: pytest.MonkeyPatch, layout: config.Layout, controllers: set[str], inside: bool, wanted: bool | None
) -> None:
    monkeypatch.setattr("nixlet.host.cgroups.controllers", lambda **_: frozenset(controllers))
    monkeypatch.setattr("nixlet.host.userns.is_inside", lambda: inside)
    for version in (2, 3):
        plugin = "io.containerd.grpc.v1.cri" if version == 2 else RUNTIME
        table = rendering.render_for_k3s(config.Settings(), layout, version=version, cni_bin_dir="/cni").table
        assert tomlread.at(table, ("plugins", plugin, "disable_cgroup")) is wanted


def test_cgroups_that_cannot_be_written_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nixlet.host.cgroups.controllers", lambda **_: frozenset({"cpu", "pids"}))
    for writable in (True, False):
        monkeypatch.setattr(os, "access", lambda *_, writable=writable: writable)
        assert cgroups.are_ours() is writable


def written(layout: config.Layout, version: int = 3, **settings: Any) -> dict[str, Any]:
    program = containerd_config.ContainerdProgram("/usr/bin/containerd", "9", version)
    path = rendering.write(
        config.Settings(**settings), layout, program=program, runc="/usr/sbin/runc", cni_bin_dir="/cni"
    )
    return tomllib.loads(Path(path).read_text())


def test_missing_cgroups_are_told(
    monkeypatch: pytest.MonkeyPatch, layout: config.Layout, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("nixlet.host.userns.is_inside", lambda: True)
    monkeypatch.setattr("nixlet.host.cgroups.are_ours", lambda: False)
    written(layout, 3)
    (record,) = caplog.records
    assert (record.levelno, "no cgroups are delegated" in record.getMessage()) == (logging.WARNING, True)
    caplog.clear()
    monkeypatch.setattr("nixlet.host.cgroups.are_ours", lambda: True)
    written(layout, 3)
    assert caplog.records == []


@pytest.mark.parametrize(
    ("enforced", "selinux", "context", "warning"),
    [
        (True, False, "unconfined_t", "SELinux is enabled on this host, but containers are not labelled"),
        (False, False, "", ""),
        (True, True, "unconfined_t", "this process does not run as container_runtime_t"),
        (True, True, "system_u:system_r:container_runtime_t:s0", ""),
    ],
)
def test_selinux(
    monkeypatch: pytest.MonkeyPatch,
    layout: config.Layout,
    caplog: pytest.LogCaptureFixture,
    enforced: bool,
    selinux: bool,
    context: str,
    warning: str,
) -> None:
    exists = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: enforced if path == "/sys/fs/selinux/enforce" else exists(path))
    monkeypatch.setattr(rendering, "_selinux_context", lambda: context)
    assert tomlread.at(written(layout, selinux=selinux), ("plugins", RUNTIME, "enable_selinux")) is selinux
    said = [record.getMessage() for record in caplog.records]
    assert [warning in each for each in said] == ([True] if warning else [])


def test_which_template_and_drop_ins_containerd_sees(layout: config.Layout) -> None:
    """Neither the user's template nor the drop-ins are read by containerd: it gets one file with all of it."""
    for path, text in (
        (layout.template(3), '{{ template "base" . }}\n[x]\n'),
        (f"{layout.dropin_dir(3)}/a.toml", "[y]\n"),
    ):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text)
    table = written(layout)
    assert "imports" not in table
    assert {"x", "y"} <= table.keys()


def test_k3ss_pause_image(layout: config.Layout) -> None:
    """The default of k3s's form is k3s's; a registry of one's own goes in front of it, once."""

    def image(**settings: Any) -> object:
        said = dataclasses.replace(config.Settings(), **settings)
        table = rendering.render_for_k3s(said, layout, version=3, cni_bin_dir="/cni").table
        return tomlread.at(table, ("plugins", "io.containerd.cri.v1.images", "pinned_images", "sandbox"))

    assert image() == "rancher/mirrored-pause:3.6"
    assert image(system_default_registry="r.example") == "r.example/rancher/mirrored-pause:3.6"
    already = "r.example/rancher/mirrored-pause:3.6"
    assert image(pause_image=already, system_default_registry="r.example") == already


def test_a_default_runtime_of_k3ss_form(layout: config.Layout) -> None:
    with pytest.raises(errors.UsageError, match=r"^default runtime kata was not found$"):
        rendering.render_for_k3s(config.Settings(default_runtime="kata"), layout, version=3, cni_bin_dir="/cni")


def test_the_runtime_class_names_the_runtime() -> None:
    text = """
apiVersion: v1
kind: Pod
metadata: {name: p}
spec:
  runtimeClassName: crun
  containers: [{name: c, image: localhost/a}]
"""
    assert [pod.runtime for pod in manifest.parse(text.encode(), "pod.yaml")[0]] == ["crun"]


async def test_a_service_has_a_file_for_its_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Services don't have a person's PATH: the unit reads the file that the hint names, which need not be there."""
    unit = Path(__file__).parents[3] / "deploy" / "nixlet.service"
    lines = [line for line in unit.read_text().splitlines() if "EnvironmentFile=" in line]
    assert lines == ["EnvironmentFile=-/etc/default/%N", "EnvironmentFile=-/etc/sysconfig/%N"]
    # %N is the unit's name (systemd.unit(5), "Specifiers").
    file = lines[0].removeprefix("EnvironmentFile=-").replace("%N", unit.stem)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(errors.UnavailableError) as caught:
        await snapshotters.check_store(nix.DaemonStore(nix.DaemonSettings(socket=f"{tmp_path}/no/socket")))
    assert file in caught.value.hint
