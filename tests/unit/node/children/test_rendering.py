"""What a node makes of its settings, its machine and the user's files."""

import dataclasses
import logging
import tomllib
from pathlib import Path
from typing import Any

import pytest

from nixlet import errors
from nixlet.containerd import config as containerd_config
from nixlet.containerd import registries, tomlread
from nixlet.node.children import rendering
from nixlet.node.images import pause
from nixlet.node.settings import config

CRI = "io.containerd.grpc.v1.cri"
IMAGES = "io.containerd.cri.v1.images"
RUNTIME = "io.containerd.cri.v1.runtime"


@pytest.fixture
def layout(tmp_path: Path) -> config.Layout:
    return config.Layout(f"{tmp_path}/data", f"{tmp_path}/state")


@pytest.fixture(autouse=True)
def no_runtimes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This machine's runtimes are nobody's business: PATH has those of the directory alone."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")
    return tmp_path / "bin"


def write_file(path: str, text: str, mode: int = 0o644) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)
    Path(path).chmod(mode)


def written(
    layout: config.Layout, version: int = 3, said: registries.Registries | None = None, **settings: Any
) -> dict[str, Any]:
    program = containerd_config.ContainerdProgram("/usr/bin/containerd", "9", version)
    path = rendering.write(
        config.Settings(**settings), layout, program=program, runc="/usr/sbin/runc", cni_bin_dir="/cni", said=said
    )
    assert path == layout.containerd_config
    return tomllib.loads(Path(path).read_text())


def rendered(layout: config.Layout, version: int = 3, **settings: Any) -> dict[str, Any]:
    said = config.Settings(**settings)
    return rendering.render(said, layout, version=version, runc="/usr/sbin/runc", cni_bin_dir="/cni").table


def at(table: dict[str, Any], *path: str) -> Any:
    return tomlread.at(table, ("plugins", *path))


def test_a_node_without_wishes(layout: config.Layout) -> None:
    for version in containerd_config.VERSIONS:
        table = written(layout, version)
        assert (table["version"], table["root"], table["state"]) == (
            version,
            layout.containerd_root,
            layout.containerd_state,
        )
        assert table["proxy_plugins"]["nix"] == {
            "type": "snapshot",
            "address": layout.node_socket,
            "capabilities": ["remap-ids"],
            "exports": {"root": layout.snapshotter_root("nix"), "enable_remote_snapshot_annotations": "true"},
        }
        for architecture, unpack in zip(
            ("amd64", "arm64"), at(table, "io.containerd.transfer.v1.local", "unpack_config"), strict=False
        ):
            assert unpack == {"platform": f"linux/{architecture}", "snapshotter": "nix", "differ": "walking"}
        plugin = (CRI,) if version == 2 else (IMAGES,)
        assert at(table, *plugin, "registry", "config_path") == layout.certs_dir
        assert Path(layout.containerd_config).stat().st_mode & 0o777 == 0o600


def test_images_are_unpacked_for_runtimes_with_snapshotters_of_their_own(layout: config.Layout) -> None:
    """A drop-in adds the runtime; the Transfer service, by which CRI pulls in these versions, has to be told."""
    runtime = 'runtime_type = "io.containerd.runc.v2"'
    for version in (3, 4):
        drop_in = f"{layout.dropin_dir(version)}/other.toml"
        tables = (("kata", 'snapshotter = "overlayfs"'), ("own", 'snapshotter = "nix"'), ("plain", ""))
        texts = [f"[plugins.'{RUNTIME}'.containerd.runtimes.{name}]\n{runtime}\n{more}\n" for name, more in tables]
        write_file(drop_in, "".join(texts))
        unpacks = at(rendered(layout, version), "io.containerd.transfer.v1.local", "unpack_config")
        platforms = [each["platform"] for each in unpacks if each["snapshotter"] == "nix"]
        others = [each for each in unpacks if each["snapshotter"] != "nix"]
        more = {"snapshotter": "overlayfs", "differ": "walking", "optional": True}
        assert others == [{"platform": platform, **more} for platform in platforms]


def test_further_snapshotters_have_runtimes_of_their_names(layout: config.Layout) -> None:
    for version in containerd_config.VERSIONS:
        table = rendered(layout, version, also_snapshotter=("stargz", "overlayfs"))
        assert sorted(table["proxy_plugins"]) == ["nix", "stargz"]
        assert table["proxy_plugins"]["stargz"]["address"] == layout.snapshotter_socket("stargz")
        runtimes = at(table, CRI if version == 2 else RUNTIME, "containerd", "runtimes")
        assert runtimes["stargz"] == {**runtimes["runc"], "snapshotter": "stargz"}
        assert runtimes["overlayfs"] == {**runtimes["runc"], "snapshotter": "overlayfs"}
        unpacks = at(table, "io.containerd.transfer.v1.local", "unpack_config")
        named = {each["snapshotter"] for each in unpacks}
        # containerd 1.7 pulls without the Transfer service.
        assert named == ({"nix"} if version == 2 else {"nix", "stargz", "overlayfs"})
        assert all(each.get("optional") for each in unpacks if each["snapshotter"] != "nix")


def test_containerd_1_6_has_one_snapshotter(layout: config.Layout) -> None:
    program = containerd_config.ContainerdProgram("/usr/bin/containerd", "1.6.20", 2)
    settings = config.Settings(also_snapshotter=("overlayfs",))
    with pytest.raises(errors.UnsupportedError, match=r"containerd 1\.6\.20 has one snapshotter for all pods"):
        rendering.write(settings, layout, program=program, runc="runc", cni_bin_dir="/cni")


@pytest.mark.parametrize("snapshotter", ["overlayfs", "native", "zfs"])
def test_other_snapshotters_need_no_plugin(layout: config.Layout, snapshotter: str) -> None:
    for version in containerd_config.VERSIONS:
        table = rendered(layout, version, snapshotter=snapshotter)
        assert "proxy_plugins" not in table
        path = (CRI, "containerd", "snapshotter") if version == 2 else (IMAGES, "snapshotter")
        assert at(table, *path) == snapshotter
    annotations = (CRI, "containerd", "disable_snapshot_annotations")
    assert at(rendered(layout, 2, snapshotter=snapshotter), *annotations) is True
    assert at(rendered(layout, 2, snapshotter="nix"), *annotations) is False


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, pause.REFERENCE),
        ({"system_default_registry": "r.example"}, pause.REFERENCE),
        ({"pause_image": "pause:9"}, "pause:9"),
        ({"pause_image": "pause:9", "system_default_registry": "r.example"}, "r.example/pause:9"),
        ({"pause_image": "r.example/pause:9", "system_default_registry": "r.example"}, "r.example/pause:9"),
    ],
)
def test_the_pause_image(layout: config.Layout, settings: dict[str, str], wanted: str) -> None:
    assert at(rendered(layout, 2, **settings), CRI, "sandbox_image") == wanted
    assert at(rendered(layout, 3, **settings), IMAGES, "pinned_images", "sandbox") == wanted


def test_selinux_and_devices(layout: config.Layout) -> None:
    for version, plugin in ((2, CRI), (3, RUNTIME), (4, RUNTIME)):
        table = rendered(layout, version, selinux=True, nonroot_devices=True)
        assert (
            at(table, plugin, "enable_selinux") is at(table, plugin, "device_ownership_from_security_context") is True
        )
        table = rendered(layout, version)
        assert (
            at(table, plugin, "enable_selinux") is at(table, plugin, "device_ownership_from_security_context") is False
        )


def test_runtimes_of_the_machine(layout: config.Layout, no_runtimes: Path) -> None:
    for name in ("crun", "containerd-shim-spin-v2"):
        write_file(f"{no_runtimes}/{name}", "", 0o755)
    found = at(rendered(layout, default_runtime="crun"), RUNTIME, "containerd")
    assert found["default_runtime_name"] == "crun"
    assert found["runtimes"] == {
        "runc": {
            "runtime_type": "io.containerd.runc.v2",
            "options": {"BinaryName": "/usr/sbin/runc", "Root": layout.runc_root, "SystemdCgroup": False},
        },
        "crun": {
            "runtime_type": "io.containerd.runc.v2",
            "options": {"BinaryName": f"{no_runtimes}/crun", "Root": layout.runc_root, "SystemdCgroup": False},
        },
        "spin": {
            "runtime_type": "io.containerd.spin.v2",
            "runtime_path": f"{no_runtimes}/containerd-shim-spin-v2",
            "options": {"SystemdCgroup": False},
        },
    }


def test_a_default_runtime_that_is_not_there(layout: config.Layout, no_runtimes: Path) -> None:
    write_file(f"{no_runtimes}/crun", "", 0o755)
    for version in containerd_config.VERSIONS:
        with pytest.raises(errors.UsageError, match=r"^default runtime kata was not found$") as caught:
            rendered(layout, version, default_runtime="kata")
        assert "crun, runc" in caught.value.hint
        assert rendered(layout, version, default_runtime="runc")


def test_a_drop_in_may_bring_the_default_runtime(layout: config.Layout) -> None:
    text = f"[plugins.'{RUNTIME}'.containerd.runtimes.kata]\nruntime_type = 'io.containerd.kata.v2'\n"
    write_file(f"{layout.dropin_dir(3)}/kata.toml", text)
    table = rendered(layout, default_runtime="kata")
    assert at(table, RUNTIME, "containerd", "runtimes", "kata", "runtime_type") == "io.containerd.kata.v2"
    write_file(f"{layout.dropin_dir(3)}/none.toml", f"plugins.'{RUNTIME}'.containerd.default_runtime_name = 'none'")
    with pytest.raises(errors.UsageError, match=r"^default runtime none was not found$"):
        rendered(layout)


def test_classes_of_block_io_and_rdt(layout: config.Layout) -> None:
    directory = Path(layout.containerd_config).parent
    assert at(rendered(layout), "io.containerd.service.v1.tasks-service") is None
    write_file(f"{directory}/blockio_config.yaml", "")
    (directory / "rdt_config.yaml").mkdir()
    assert at(rendered(layout), "io.containerd.service.v1.tasks-service") == {
        "blockio_config_file": f"{directory}/blockio_config.yaml"
    }


def test_in_a_user_namespace(layout: config.Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nixlet.host.userns.is_inside", lambda: True)
    monkeypatch.setattr("nixlet.host.cgroups.are_ours", lambda: False)
    for version, plugin in ((2, CRI), (3, RUNTIME), (4, RUNTIME)):
        table = rendered(layout, version)
        assert at(table, "io.containerd.nri.v1.nri", "disable") is True
        assert at(table, plugin, "disable_apparmor") is at(table, plugin, "restrict_oom_score_adj") is True
        # containerd 2 does not know the key, and says so at every start.
        assert at(table, plugin, "disable_cgroup") is (True if version == 2 else None)


def test_a_machines_own_containerd_keeps_nri(layout: config.Layout) -> None:
    table = rendered(layout)
    assert at(table, "io.containerd.nri.v1.nri", "disable") is None
    assert at(table, RUNTIME, "disable_apparmor") is None


def test_template_and_drop_ins(layout: config.Layout, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    template, directory = layout.template(3), layout.dropin_dir(3)
    write_file(template, '{{ template "base" . }}\n[x]\na = "{{ .NodeConfig.AgentConfig.Snapshotter }}"\nb = 1\n')
    write_file(f"{directory}/20-b.toml", "[x]\nc = 2\n")
    write_file(f"{directory}/10-a.toml", "[x]\nb = 2\n")
    for name in (".hidden.toml", "30.toml~", "README"):
        write_file(f"{directory}/{name}", "this is no TOML [")
    table = written(layout)
    assert table["x"] == {"a": "nix", "b": 2, "c": 2}
    lines = Path(layout.containerd_config).read_text().splitlines()
    sources = [template, f"{directory}/10-a.toml", f"{directory}/20-b.toml"]
    assert [line for line in lines if line.startswith("# With ")] == [f"# With {source}" for source in sources]
    assert [record.args[0] for record in caplog.records if record.levelno == logging.INFO and record.args] == sources  # type: ignore[index]  # a tuple here
    assert (
        "x"
        not in rendering.render(
            config.Settings(), layout, version=3, runc="runc", cni_bin_dir="/cni", user_files=False
        ).table
    )


@pytest.mark.parametrize(
    ("spoken", "there", "wanted", "unused"),
    [
        (4, [], 4, []),
        (4, [4, 3, 2], 4, [3, 2]),
        (4, [3, 2], 3, [2]),
        (4, [2], 2, []),
        (3, [4, 3], 3, [4]),
        (3, [4], 3, [4]),
        (2, [4, 3], 2, [4, 3]),
    ],
)
@pytest.mark.parametrize("by_template", [True, False])
def test_the_version_follows_the_users_files(
    layout: config.Layout,
    caplog: pytest.LogCaptureFixture,
    spoken: int,
    there: list[int],
    wanted: int,
    unused: list[int],
    by_template: bool,
) -> None:
    for version in there:
        if by_template:
            write_file(layout.template(version), '{{ template "base" . }}\n[x]\n')
        else:
            write_file(f"{layout.dropin_dir(version)}/a.toml", "[x]\n")
    Path(layout.dropin_dir(4)).mkdir(parents=True, exist_ok=True)
    table = written(layout, spoken)
    assert (table["version"], "x" in table) == (wanted, wanted in there)
    files = [layout.template(number) if by_template else f"{layout.dropin_dir(number)}/a.toml" for number in unused]
    assert [record.getMessage().split(" is not used")[0] for record in caplog.records] == files


def test_files_that_others_can_write(layout: config.Layout) -> None:
    write_file(f"{layout.dropin_dir(3)}/a.toml", "[x]\n", 0o666)
    with pytest.raises(errors.PermissionDeniedError, match=r"a\.toml can be written by everyone"):
        written(layout)
    Path(layout.dropin_dir(3), "a.toml").chmod(0o644)
    Path(layout.dropin_dir(3)).chmod(0o777)
    with pytest.raises(errors.PermissionDeniedError, match=r"config-v3\.toml\.d can be written by everyone"):
        written(layout)


def test_files_that_cannot_be_used(layout: config.Layout) -> None:
    write_file(layout.dropin_dir(3), "")
    with pytest.raises(errors.UsageError, match=r"the directory of drop-ins .* can't be read: Not a directory"):
        written(layout)
    Path(layout.dropin_dir(3)).unlink()
    write_file(f"{layout.dropin_dir(3)}/a.toml", "x = \n")
    with pytest.raises(errors.UsageError, match=r"a\.toml, line 1, column 5: this is no TOML"):
        written(layout)
    assert not Path(layout.containerd_config).exists()
    Path(layout.dropin_dir(3), "a.toml").unlink()
    Path(layout.template(3)).symlink_to("/missing")
    with pytest.raises(errors.UsageError, match=r"config-v3\.toml\.tmpl can't be read: No such file"):
        written(layout)


ME, ENCODED = registries.Auth("me", "secret"), registries.Auth(auth="bWU6c2VjcmV0")
SAID = {"r.example": registries.HostConfig(ME), "b.example": registries.HostConfig(ENCODED)}
AUTHS = registries.Registries(configs=SAID).auths()


def test_credentials(layout: config.Layout, caplog: pytest.LogCaptureFixture) -> None:
    for version, plugin in ((2, CRI), (3, IMAGES), (4, IMAGES)):
        table = written(layout, version, registries.Registries(configs=SAID))
        assert at(table, plugin, "registry", "configs") == {host: {"auth": auth} for host, auth in AUTHS.items()}
        assert at(table, plugin, "use_local_image_pull") is (None if version == 2 else True)
        assert Path(layout.containerd_config).stat().st_mode & 0o777 == 0o600
    assert caplog.records == []


def test_credentials_that_a_template_leaves_out(layout: config.Layout, caplog: pytest.LogCaptureFixture) -> None:
    text = f"version = 3\n[plugins.'{IMAGES}'.registry.configs.'r.example'.auth]\nusername = 'me'\n"
    write_file(layout.template(3), text)
    written(layout, 3, registries.Registries(configs={**SAID, "a.example": registries.HostConfig(ENCODED)}))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert said[0].startswith("credentials for a.example, b.example are configured, but ")


def test_a_plugin_that_is_k3ss(layout: config.Layout, caplog: pytest.LogCaptureFixture) -> None:
    text = '[plugins."io.containerd.snapshotter.v1.nix"]\naddress = "/x"\n'
    write_file(f"{layout.dropin_dir(3)}/nix.toml", text)
    written(layout)
    assert "containerd has no plugin io.containerd.snapshotter.v1.nix" in caplog.text


def test_selinux_that_nobody_enforces(layout: config.Layout, caplog: pytest.LogCaptureFixture) -> None:
    written(layout, selinux=True)
    assert ["container_runtime_t" in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize("version", [2, 3])
def test_k3s(version: int) -> None:
    layout = config.Layout("/var/lib/rancher/k3s", "/run/k3s")
    table = rendering.render_for_k3s(config.Settings(), layout, version=version, cni_bin_dir="/cni").table
    # The values of a real node.
    assert (
        table["root"] == at(table, "io.containerd.internal.v1.opt", "path") == "/var/lib/rancher/k3s/agent/containerd"
    )
    assert table["grpc"]["address"] == "/run/k3s/containerd/containerd.sock"
    stem = "config" if version == 2 else "config-v3"
    assert table["imports"] == [f"/var/lib/rancher/k3s/agent/etc/containerd/{stem}.toml.d/*.toml"]
    assert at(table, "io.containerd.snapshotter.v1.nix") == {
        "address": "/run/k3s/containerd/nix-snapshotter.sock",
        "image_service": {"enable": True, "containerd_address": "/run/k3s/containerd/containerd.sock"},
    }
    assert "proxy_plugins" not in table


@pytest.mark.parametrize(("environment", "wanted"), [({"INVOCATION_ID": "1"}, True), ({}, False)])
def test_k3s_under_systemd(
    monkeypatch: pytest.MonkeyPatch, layout: config.Layout, environment: dict[str, str], wanted: bool
) -> None:
    monkeypatch.delenv("INVOCATION_ID", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("nixlet.host.cgroups.controllers", lambda: frozenset({"cpuset"}))
    table = rendering.render_for_k3s(config.Settings(), layout, version=3, cni_bin_dir="/cni").table
    assert at(table, RUNTIME, "containerd", "runtimes", "runc", "options") == {"SystemdCgroup": wanted}


def test_k3s_has_no_version_4(layout: config.Layout) -> None:
    with pytest.raises(errors.UnsupportedError, match="of version 4"):
        rendering.render_for_k3s(config.Settings(), layout, version=4, cni_bin_dir="/cni")


def test_snapshotters_of_k3s(layout: config.Layout) -> None:
    for name, block in (("overlayfs", None), ("stargz", containerd_config.STARGZ_SOCKET)):
        said = dataclasses.replace(config.Settings(), snapshotter=name)
        table = rendering.render_for_k3s(said, layout, version=3, cni_bin_dir="/cni").table
        plugin = "io.containerd.snapshotter.v1.stargz"
        assert at(table, plugin, "cri_keychain_image_service_path") == block
        assert at(table, IMAGES, "disable_snapshot_annotations") is (block is None)
        assert at(table, "io.containerd.transfer.v1.local") is None


@pytest.mark.parametrize("by_template", [True, False])
def test_files_that_would_keep_registries_yaml_from_being_obeyed(layout: config.Layout, by_template: bool) -> None:
    said = registries.Registries(mirrors={"docker.io": registries.Mirror(("https://m.example",))})
    text = f"version = 3\n[plugins.'{IMAGES}'.registry]\nconfig_path = '/etc/containerd/certs.d'\n"
    path = layout.template(3) if by_template else f"{layout.dropin_dir(3)}/a.toml"
    write_file(path, text)
    with pytest.raises(errors.UsageError) as raised:
        written(layout, 3, said)
    assert raised.value.message.startswith(f"{path}: with registry.config_path = '/etc/containerd/certs.d' nothing")
    # Where the file says nothing, there is nothing to obey.
    written(layout)
    assert rendering.registries_elsewhere(layout) == "/etc/containerd/certs.d"
    Path(path).unlink()
    written(layout, 3, said)
    assert rendering.registries_elsewhere(layout) is None
