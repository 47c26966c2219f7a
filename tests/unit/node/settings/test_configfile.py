"""Where settings come from: what wins, how files add up, and what a person reads about each mistake in them."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.node.settings import config, configfile, names, rules


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.yaml"


def drop_in(file: Path, name: str, text: str) -> Path:
    path = Path(f"{file}.d") / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def load(file: Path, flags: Mapping[str, object] | None = None, /, **environment: str) -> configfile.Configuration:
    return configfile.load(flags or {}, environment, file=str(file))


def refused(file: Path, flags: Mapping[str, object] | None = None, /, **environment: str) -> errors.NixletError:
    with pytest.raises(errors.NixletError) as caught:
        load(file, flags, **environment)
    return caught.value


def test_a_flag_wins_over_the_environment_over_a_file_over_the_default(file: Path) -> None:
    file.write_text("runc: from-file\n")
    flags: dict[str, object] = {"runc": "from-flag"}
    said = load(file, flags, NIXLET_RUNC="from-environment")
    assert (said.settings.runc, str(said.origins["runc"])) == ("from-flag", "--runc")
    said = load(file, {"runc": None}, NIXLET_RUNC="from-environment")
    assert (said.settings.runc, str(said.origins["runc"])) == ("from-environment", "NIXLET_RUNC")
    said = load(file, {"runc": None}, NIXLET_RUNC="")
    assert (said.settings.runc, str(said.origins["runc"])) == ("from-file", f"{file}, line 1")
    file.write_text("")
    said = load(file)
    assert (said.settings.runc, str(said.origins["runc"])) == ("runc", "default")
    assert said.settings == rules.checked(config.Settings())


@pytest.mark.parametrize("name", [name for name in config.Settings.__dataclass_fields__ if name != "debug"])
def test_every_setting_can_be_said_in_each_place(file: Path, name: str) -> None:
    samples = {
        "snapshotter": "native",
        "also_snapshotter": "stargz",
        "pod_cidr": "10.9.0.0/16",
        "bridge": "br9",
        "containerd_restart": "never",
        "strategy": "bind",
        "unsigned_paths": "deny",
        "health_address": "127.0.0.1:9",
        "container_log_max_size": "1Mi",
        "container_log_max_files": "3",
        "pause_image": "r.example.com/p:1",
        "system_default_registry": "r.example.com",
        "airgap_extra_registry": "r.example.com",
        "default_runtime": "crun",
        "kubernetes": "yes",
        "https_listen_port": "7443",
        "disable": "traefik",
        "coredns_image": "r.example.com/c:1",
        "flannel_backend": "host-gw",
        "flannel_iface": "eth9",
        "server": "https://192.0.2.7:6443",
    }
    default = getattr(config.Settings(), name)
    text = "true" if isinstance(default, bool) else samples.get(name, "/x/y")
    wanted = True if isinstance(default, bool) else (text,) if isinstance(default, tuple) else text
    file.write_text(f"{names.key(name)}: {text}\n")
    given = (text,) if isinstance(default, tuple) else text
    for said, source in (
        (load(file), "file"),
        (load(file, {}, **{names.variable(name): text}), "environment"),
        (load(file, {name: given}), "flag"),
    ):
        assert getattr(said.settings, name) == wanted
        assert said.origins[name].source == source
        assert {origin.source for other, origin in said.origins.items() if other != name} == {"default"}


def test_drop_ins_follow_in_the_order_of_their_names(file: Path) -> None:
    file.write_text("# the main file\n\nrunc: main\nbridge: br0\n")
    last = drop_in(file, "20-b.YML", "runc: second\n")
    first = drop_in(file, "10-a.yaml", "runc: first\nsnapshotter: native\n")
    drop_in(file, "30-c.yaml.bak", "runc: backup\n")
    (Path(f"{file}.d") / "40-d.yaml").mkdir()
    said = load(file)
    assert said.files == (str(file), str(first), str(last))
    assert (said.settings.runc, said.settings.snapshotter, said.settings.bridge) == ("second", "native", "br0")
    assert said.origins["runc"].places == (f"{last}, line 1",)
    assert said.origins["bridge"].places == (f"{file}, line 4",)


def test_lists_replace_and_a_plus_appends(file: Path) -> None:
    file.write_text("cni-bin-dir:\n- /a\n- /b\n")
    one = drop_in(file, "1.yaml", "cni-bin-dir+: /c\n")
    two = drop_in(file, "2.yaml", "\ncni-bin-dir+: [/d]\narchive-dir+: /e\n")
    said = load(file)
    assert said.settings.cni_bin_dirs == ("/a", "/b", "/c", "/d")
    assert said.origins["cni_bin_dirs"].places == (f"{file}, line 1", f"{one}, line 1", f"{two}, line 2")
    # What is appended to nothing takes the default's place, as a flag does.
    assert said.settings.archive_dirs == ("/e",)
    drop_in(file, "3.yaml", "cni-bin-dir: /z\n")
    assert load(file).settings.cni_bin_dirs == ("/z",)
    # A flag or a variable replaces all that the files say.
    assert load(file, {"cni_bin_dirs": ("/f", "/g")}).settings.cni_bin_dirs == ("/f", "/g")
    assert load(file, {"cni_bin_dirs": ()}, NIXLET_CNI_BIN_DIR="/h,/i").settings.cni_bin_dirs == ("/h", "/i")


def test_a_plus_in_the_file_that_has_the_key(file: Path) -> None:
    file.write_text("cni-bin-dir: /a\ncni-bin-dir+: /b\n")
    assert load(file).settings.cni_bin_dirs == ("/a", "/b")
    file.write_text("cni-bin-dir+: /b\ncni-bin-dir: /a\n")
    assert load(file).settings.cni_bin_dirs == ("/a",)


@pytest.mark.parametrize(("text", "value"), [("true", True), ("1", True), ("T", True), ("false", False), ("0", False)])
def test_truth_values(file: Path, text: str, value: bool) -> None:
    file.write_text(f"selinux: {str(not value).lower()}\n")
    assert load(file).settings.selinux is not value
    assert load(file, NIXLET_SELINUX=text).settings.selinux is value
    assert load(file, {"selinux": text}).settings.selinux is value
    assert load(file, {"selinux": value}).settings.selinux is value


@pytest.mark.parametrize(
    ("text", "value"), [("'true'", True), ("1", True), ("yes", True), ("'T'", True), ("0", False), ('"false"', False)]
)
def test_truth_values_in_a_file_may_be_what_the_flag_takes(file: Path, text: str, value: bool) -> None:
    file.write_text(f"selinux: {text}\n")
    assert load(file).settings.selinux is value


def test_a_text_in_a_file_is_what_is_written(file: Path) -> None:
    """As k3s takes it: whatever YAML takes it for."""
    file.write_text("log: 5\ndefault-runtime: 1\nrunc: true\n")
    settings = load(file).settings
    assert (settings.default_runtime, settings.runc) == ("1", "true")
    assert settings.log.endswith("5")


def test_keys_of_one_letter(file: Path) -> None:
    file.write_text("d: /data\nl: /log\n")
    said = load(file)
    assert (said.settings.data_dir, said.settings.log) == ("/data", "/log")
    assert refused(file, {"bridge": "A"}).message.startswith("--bridge ")
    file.write_text("d: /a b\n")
    assert refused(file).message.startswith(f"{file}, line 1: data-dir '/a b' holds a blank")


@pytest.mark.parametrize(
    ("text", "sentence", "hint"),
    [
        ("snapshoter: nix\n", ", line 1: snapshoter is not a known key", 'did you mean "snapshotter"?'),
        ("# x\ndata_dir: /x\n", ", line 2: data_dir is not a known key", 'did you mean "data-dir"?'),
        ("--log: /x\n", ", line 1: --log is not a known key", 'did you mean "log"?'),
        ("cni-bin-dirs+: /x\n", ", line 1: cni-bin-dirs+ is not a known key", 'did you mean "cni-bin-dir"?'),
        ("SELinux: true\n", ", line 1: SELinux is not a known key", 'did you mean "selinux"?'),
        ("xyzzy: 1\n", ", line 1: xyzzy is not a known key", "keys are flags without dashes"),
        ("'': 1\n", ", line 1: the document is not a known key", "keys are flags without dashes"),
        ("config: /x\n", ", line 1: config can't stand in a configuration file", ""),
        ("c: /x\n", ", line 1: c can't stand in a configuration file", ""),
        ("server: http://x\n", ", line 1: server is no server's URL", "as in https://192.0.2.7:6443"),
        ("s: x\n", ", line 1: server is no server's URL", "as in https://192.0.2.7:6443"),
        ("docker: true\n", ", line 1: docker is k3s's, and not supported: pods run in containerd", "leave it out"),
        ("kubernetes: maybe\n", ", line 1: kubernetes 'maybe' is not known", "use auto, yes, no, kubelet"),
        ("kubernetes-bin-dir: bin\n", ", line 1: kubernetes-bin-dir 'bin' must be an absolute path", ""),
        ("https-listen-port: 65536\n", ", line 1: https-listen-port '65536' is no port", "as in 6443"),
        ("token: x\ntoken-file: /x\n", ", line 1: token and token-file are both set", "use one of them"),
        ('token: "se\\ncret"\n', ", line 1: token holds a line break", ""),
        ("runc: a\nrunc: b\n", ", line 2: runc stands there twice", ""),
        ("snapshotter: [nix]\n", ", line 1: snapshotter must be a string", ""),
        ("snapshotter: {a: b}\n", ", line 1: snapshotter must be a string", ""),
        ("snapshotter+: nix\n", ", line 1: snapshotter+ can't be: snapshotter has one value", ""),
        ("selinux+: true\n", ", line 1: selinux+ can't be: selinux has one value", ""),
        ("selinux: 2\n", ", line 1: selinux must be true or false", ""),
        ("selinux: 'yes'\n", ", line 1: selinux must be true or false", ""),
        ("selinux: yeah\n", ", line 1: selinux must be true or false", ""),
        ("selinux: [true]\n", ", line 1: selinux must be true or false", ""),
        ("runc:\n", ", line 1: runc has no value", ""),
        ("selinux: ~\n", ", line 1: selinux has no value", ""),
        ("cni-bin-dir:\n", ", line 1: cni-bin-dir has no value", ""),
        ("cni-bin-dir: []\n", ", line 1: cni-bin-dir is empty", ""),
        ("cni-bin-dir: {a: b}\n", ", line 1: cni-bin-dir must be a list", ""),
        ("airgap-extra-registry: [1]\n", ", line 1: airgap-extra-registry '1' is no registry", ""),
        ("cni-bin-dir:\n- /a\n- [7]\n", ", line 3: cni-bin-dir must be a list of strings", ""),
        ('log: "a\\0"\n', ", line 1: log must not contain a NUL character", ""),
        ("bridge: br0\npod-cidr: 10.0.0.0/33\n", ", line 2: pod-cidr '10.0.0.0/33' is not a network", "as in"),
        ("runc: ''\n", ", line 1: runc is empty: it must name a program", ""),
        ("- a\n", ", line 1: the document must be a mapping", ""),
        ("snapshotter\n", ", line 1: the document must be a mapping", ""),
        ("? [a]\n: b\n", ", line 1: the document has a key that is no text", ""),
        ("runc: a\n---\nruncx: b\n", ", line 3: the document is one too many", ""),
        ("runc: a: b\n", ", line 1, column 8: this is no YAML", ""),
        ("runc:\n\t- b\n", ", line 2, column 1: this is no YAML", ""),
        ("runc: \x01\n", ", line 1, column 7: this is no YAML", ""),
        ("runc: &x [*x]\n", ", line 1, column 11: this is no YAML: the alias *x stands in what it stands for", ""),
        ("runc: !!python/name:os.system x\n", ", line 1: runc must be a string", ""),
        ("# " + "x" * (1 << 20), " is larger than 1048576 bytes", ""),
    ],
)
def test_a_mistake_in_a_file(file: Path, text: str, sentence: str, hint: str) -> None:
    file.write_text(text)
    error = refused(file)
    place = error.message.removeprefix("the configuration file ")
    assert place.startswith(f"{file}{sentence}")
    assert error.hint.startswith(hint)


def test_a_file_that_was_written_for_k3s(file: Path) -> None:
    """A node starts with it: what means something here holds, and what doesn't is told."""
    file.write_text(
        "token: se-cret\ntls-san: [a.example]\ndisable:\n- traefik\n- servicelb\nnode-label+: a=b\n"
        "disable-network-policy: true\nwrite-kubeconfig-mode: '0644'\netcd-snapshot-retention: 5\n"
    )
    found = load(file)
    said = found.settings
    assert said.disable == ("traefik", "servicelb")
    assert (said.token, said.tls_san, said.node_label, said.write_kubeconfig_mode) == (
        "se-cret",
        ("a.example",),
        ("a=b",),
        "0644",
    )
    assert [warning.partition(" is passed over: ")[0] for warning in found.warnings] == [
        f"{file}, line 7: disable-network-policy",
        f"{file}, line 9: etcd-snapshot-retention",
    ]
    assert "se-cret" not in repr(found)


def test_bytes_that_are_no_text(file: Path) -> None:
    file.write_bytes(b"runc: a\nlog: \xff\n")
    assert refused(file).message.startswith(f"{file}, line 2, column 6: this is no YAML")


def test_a_mistake_in_a_drop_in_names_that(file: Path) -> None:
    file.write_text("cni-bin-dir: /a\n")
    bad = drop_in(file, "1.yaml", "\ncni-bin-dir+: b\n")
    sentence = f"{file}, line 1; {bad}, line 2: cni-bin-dir 'b' must be an absolute path"
    assert refused(file).message == sentence


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"NIXLET_DEBUG": "perhaps"}, "NIXLET_DEBUG must be true or false, not 'perhaps'"),
        ({"NIXLET_BRIDGE": "A"}, "NIXLET_BRIDGE 'A' is no interface name"),
        ({"NIXLET_CNI_BIN_DIR": "/a,b"}, "NIXLET_CNI_BIN_DIR 'b' must be an absolute path"),
        ({"NIXLET_CNI_BIN_DIR": ","}, "NIXLET_CNI_BIN_DIR is empty: it must name a directory"),
        ({"NIXLET_URL": "x"}, "NIXLET_URL is no server's URL"),
    ],
)
def test_a_mistake_in_the_environment(file: Path, environment: dict[str, str], sentence: str) -> None:
    file.write_text("")
    assert refused(file, {}, **environment).message.startswith(sentence)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"debug": "perhaps"}, "--debug must be true or false, not 'perhaps'"),
        ({"bridge": "A"}, "--bridge 'A' is no interface name"),
        ({"docker": "true"}, "--docker is k3s's, and not supported: pods run in containerd"),
        ({"server": "x"}, "--server is no server's URL"),
    ],
)
def test_a_mistake_on_the_command_line(file: Path, flags: dict[str, object], sentence: str) -> None:
    file.write_text("")
    assert refused(file, flags).message.startswith(sentence)


def test_which_file_is_read(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("runc: chosen\n")
    other = tmp_path / "other.yaml"
    other.write_text("runc: variable\n")
    default = tmp_path / "default.yaml"
    monkeypatch.setattr(names, "DEFAULT_FILE", str(default))
    environment = {"NIXLET_CONFIG_FILE": str(other)}
    assert configfile.load({}, environment, file=str(file)).settings.runc == "chosen"
    assert configfile.load({}, environment).settings.runc == "variable"
    # The default one may be missing, with its drop-ins or without.
    assert configfile.load({}, {}).files == ()
    path = drop_in(default, "1.yaml", "runc: dropped\n")
    assert configfile.load({}, {}).files == (str(path),)
    default.write_text("runc: default\n")
    assert configfile.load({}, {"NIXLET_CONFIG_FILE": ""}).files == (str(default), str(path))
    assert configfile.load({}, {}, file=os.devnull).files == ()
    monkeypatch.chdir(tmp_path)
    assert configfile.load({}, {}, file="config.yaml").origins["runc"].places == (f"{file}, line 1",)


def test_a_file_that_was_asked_for_must_be_there(file: Path) -> None:
    error = refused(file)
    assert error.message == f"the configuration file {file} does not exist"
    assert error.hint.startswith("--config names it")
    with pytest.raises(errors.UsageError, match="does not exist") as caught:
        configfile.load({}, {"NIXLET_CONFIG_FILE": str(file)})
    assert caught.value.hint.startswith("NIXLET_CONFIG_FILE names it")
    drop_in(file, "1.yaml", "runc: dropped\n")
    assert load(file).settings.runc == "dropped"


def test_a_url_is_no_file() -> None:
    with pytest.raises(errors.UsageError, match="is a URL; configuration is read from files alone"):
        configfile.load({}, {}, file="https://example.com/config.yaml")


def test_a_drop_in_directory_that_is_none(file: Path) -> None:
    file.write_text("")
    Path(f"{file}.d").write_text("")
    assert refused(file).message == f"the configuration directory {file}.d can't be read: Not a directory"


def test_a_drop_in_directory_that_others_can_write(file: Path) -> None:
    file.write_text("")
    drop_in(file, "1.yaml", "").parent.chmod(0o1777)
    error = refused(file)
    assert isinstance(error, errors.PermissionDeniedError)
    assert error.message.startswith(f"{file}.d can be written by everyone")
