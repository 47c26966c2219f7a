"""Drop-ins: how they are merged, and what they may not do."""

import copy
import tomllib

import pytest

from nixlet import errors
from nixlet.containerd import config, dropins, proxyplugins, tomlread


def base(version: int) -> config.Table:
    return config.tables(
        config.ContainerdSettings(
            version=version,
            root="/n/root",
            state="/n/state",
            address="/n/c.sock",
            opt_dir="/n/opt",
            snapshotter="nix",
            proxies=(proxyplugins.ProxyPlugin("nix", "/n/nix.sock", "/n/nix", ("remap-ids",), reads_annotations=True),),
            sandbox_image="localhost/pause:1",
            cni_bin_dir="/cni",
            cni_conf_dir="/n/net.d",
            runc="/usr/sbin/runc",
            runc_root="/n/runc",
            nri_socket="/n/nri.sock",
            restrict_oom_score_adj=True,
            architecture="amd64",
        )
    )


def dropin(text: str, path: str = "/n/d/10.toml") -> dropins.DropIn:
    return dropins.DropIn(path, tomllib.loads(text))


def merged(*texts: str, version: int = 3) -> config.Table:
    files = [dropin(text, f"/n/d/{number}0.toml") for number, text in enumerate(texts, 1)]
    return dropins.merged(base(version), files)


def refusal(*texts: str, version: int = 3) -> errors.UsageError:
    with pytest.raises(errors.UsageError) as caught:
        merged(*texts, version=version)
    return caught.value


RUNTIME = "plugins.'io.containerd.cri.v1.runtime'"


def test_tables_are_merged_and_the_rest_is_replaced() -> None:
    before = base(3)
    text = f"""
    version = 3
    oom_score = 1
    [{RUNTIME}]
    enable_selinux = true
    cni.bin_dirs = ["/other"]
    [{RUNTIME}.containerd.runtimes.kata]
    runtime_type = "io.containerd.kata.v2"
    [proxy_plugins.soci]
    type = "snapshot"
    """
    kept = copy.deepcopy(before)
    result = dropins.merged(before, [dropin(text)])
    assert before == kept
    runtime = before["plugins"]["io.containerd.cri.v1.runtime"]
    runtime["enable_selinux"], runtime["cni"]["bin_dirs"] = True, ["/other"]
    runtime["containerd"]["runtimes"]["kata"] = {"runtime_type": "io.containerd.kata.v2"}
    before["proxy_plugins"]["soci"], before["oom_score"] = {"type": "snapshot"}, 1
    assert result == before


def test_drop_ins_add_to_each_other_and_may_agree() -> None:
    first, second = "[x]\na = 1\nlist = [1]\n", "[x]\nb = 2\nlist = [1]\n[x.c]\nd = 3.0\n"
    assert merged(first, second)["x"] == {"a": 1, "b": 2, "list": [1], "c": {"d": 3.0}}


@pytest.mark.parametrize(
    ("first", "second", "key"),
    [
        ("oom_score = 1", "oom_score = 2", "oom_score"),
        ("[x]\nlist = [1]", "[x]\nlist = [2]", "x.list"),
        (f"[{RUNTIME}]\nenable_selinux = false", f"[{RUNTIME}]\nenable_selinux = true", f"{RUNTIME}.enable_selinux"),
    ],
)
def test_drop_ins_that_contradict_each_other(first: str, second: str, key: str) -> None:
    assert refusal(first, second).message == f"/n/d/10.toml and /n/d/20.toml say different things of {key}"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["plugins = 1"], "/n/d/10.toml: plugins is a number here, and a table otherwise"),
        ([f"[{RUNTIME}]\ncni = ['x']"], f"/n/d/10.toml: {RUNTIME}.cni is a list here, and a table otherwise"),
        ([f"[{RUNTIME}]\nenable_selinux = 'no'"], f"/n/d/10.toml: {RUNTIME}.enable_selinux is a string here, and true or false otherwise"),
        (["[x]\na = 1", "[x.a]\nb = 1"], "/n/d/20.toml: x.a is a table here, and a number in /n/d/10.toml"),
        (["[x.a]\nb = 1", "[x]\na = 2020-01-01"], "/n/d/20.toml: x.a is a time here, and a table in /n/d/10.toml"),
    ],
)  # fmt: skip
def test_a_value_of_another_kind(texts: list[str], message: str) -> None:
    assert refusal(*texts).message == message


@pytest.mark.parametrize("version", [2, 3, 4])
@pytest.mark.parametrize(
    ("text", "what"), [("mine = 'x'", "mine is a string"), ("mine.options = 'x'", "mine.options is a string")]
)
def test_a_runtime_of_a_person_s_own_is_a_table(version: int, text: str, what: str) -> None:
    plugin = "io.containerd.grpc.v1.cri" if version == 2 else "io.containerd.cri.v1.runtime"
    said = refusal(f"[plugins.'{plugin}'.containerd.runtimes]\n{text}", version=version).message
    assert said == f"/n/d/10.toml: plugins.'{plugin}'.containerd.runtimes.{what}, and has to be a table"


@pytest.mark.parametrize("value", ["true", "1.5"])
def test_truth_is_no_number_but_every_number_is_one(value: str) -> None:
    if value == "true":
        assert "true or false" in refusal("[x]\na = 1", f"[x]\na = {value}").message
    else:
        assert "different things" in refusal("[x]\na = 1", f"[x]\na = {value}").message


@pytest.mark.parametrize("version", config.VERSIONS)
def test_what_is_the_nodes_stays_so(version: int) -> None:
    servers = ("plugins", "io.containerd.server.v1.grpc"), ("plugins", "io.containerd.server.v1.ttrpc")
    grpc, ttrpc = servers if version == 4 else (("grpc",), ("ttrpc",))
    cri = ("io.containerd.grpc.v1.cri", "containerd") if version == 2 else ("io.containerd.cri.v1.images",)
    for path, value, hint in (
        (("root",), "/var/lib/containerd", "--data-dir"),
        (("state",), "/run/containerd", "--state-dir"),
        ((*grpc, "address"), "/run/containerd/containerd.sock", "--state-dir"),
        ((*ttrpc, "address"), "/run/containerd/containerd.sock.ttrpc", "--state-dir"),
        (("proxy_plugins", "nix", "address"), "/run/other.sock", "--state-dir"),
        (("proxy_plugins", "nix", "type"), "content", "--state-dir"),
        (("plugins", *cri, "snapshotter"), "overlayfs", "--snapshotter"),
    ):
        name = tomlread.name(path)
        error = refusal(f"{name} = '{value}'", version=version)
        assert error.message == f"/n/d/10.toml: {name} can't be set: the node sets it"
        assert hint in error.hint
        # Saying the same is no harm.
        assert merged(f"{name} = '{tomlread.at(base(version), path)}'", version=version) == base(version)


def test_another_version() -> None:
    error = refusal("version = 2", version=3)
    assert error.message == "/n/d/10.toml: it says version 2, but is part of a configuration of version 3"
    assert "config.toml.d for version 2" in error.hint


def test_imports() -> None:
    assert "imports can't be set" in refusal("imports = ['/etc/containerd/conf.d/*.toml']").message
    assert merged("imports = []")["imports"] == []


CRI = "plugins.'io.containerd.grpc.v1.cri'"
IMAGES = "plugins.'io.containerd.cri.v1.images'"


@pytest.mark.parametrize(
    ("versions", "text", "written", "right"),
    [
        ((4,), "[grpc]\nuid = 1", "grpc.uid", "plugins.'io.containerd.server.v1.grpc'.uid"),
        ((4,), "[grpc]\ntcp_address = ''", "grpc.tcp_address", "plugins.'io.containerd.server.v1.grpc-tcp'.address"),
        ((4,), "[ttrpc]\nuid = 1", "ttrpc.uid", "plugins.'io.containerd.server.v1.ttrpc'.uid"),
        ((4,), "[metrics]\naddress = ''", "metrics.address", "plugins.'io.containerd.server.v1.metrics'.address"),
        ((4,), "[metrics]\ngrpc_histogram = true", "metrics.grpc_histogram", "plugins.'io.containerd.metrics.v1.grpc-prometheus'.grpc_histogram"),
        ((4,), "[debug]\nlevel = 'info'\naddress = ''", "debug.address", "plugins.'io.containerd.server.v1.debug'.address"),
        ((2, 3), "[plugins.'io.containerd.server.v1.metrics']\naddress = ''", "plugins.'io.containerd.server.v1.metrics'", "metrics"),
        ((3, 4), f"[{CRI}]\nsandbox_image = 'x'", f"{CRI}.sandbox_image", f"{IMAGES}.pinned_images.sandbox"),
        ((3, 4), f"[{CRI}.registry.configs.x.auth]\nusername = 'x'", f"{CRI}.registry", f"{IMAGES}.registry"),
        ((3, 4), f"[{CRI}.containerd]\ndiscard_unpacked_layers = true", f"{CRI}.containerd.discard_unpacked_layers", f"{IMAGES}.discard_unpacked_layers"),
        ((3, 4), f"[{CRI}.containerd.runtimes.x]\nruntime_type = 'x'", f"{CRI}.containerd", f"{RUNTIME}.containerd"),
        ((3, 4), f"[{CRI}]\nenable_selinux = true", f"{CRI}.enable_selinux", f"{RUNTIME}.enable_selinux"),
        ((3, 4), f"[{CRI}.cni]\nbin_dir = 'x'", f"{CRI}.cni.bin_dir", f"{RUNTIME}.cni.bin_dirs"),
        ((2,), f"[{RUNTIME}]\nenable_selinux = true", RUNTIME, CRI),
        ((2,), f"[{IMAGES}]\nsnapshotter = 'nix'", IMAGES, CRI),
        ((3, 4), "[plugins.'io.containerd.internal.v1.restart']", "plugins.'io.containerd.internal.v1.restart'", "plugins.'io.containerd.monitor.container.v1.restart'"),
        ((2,), "[plugins.'io.containerd.monitor.task.v1.cgroups']", "plugins.'io.containerd.monitor.task.v1.cgroups'", "plugins.'io.containerd.monitor.v1.cgroups'"),
    ],
)  # fmt: skip
def test_names_of_another_version(versions: tuple[int, ...], text: str, written: str, right: str) -> None:
    for version in config.VERSIONS:
        if version in versions:
            error = refusal(text, version=version)
            assert error.message == (
                f"/n/d/10.toml: {written} has no place in version {version} of containerd's configuration"
            )
            assert error.hint == f"it is {right} there"
        else:
            assert merged(text, version=version)


def test_a_name_that_no_version_has() -> None:
    for version, right in ((2, CRI), (3, f"{RUNTIME}.cni.bin_dirs"), (4, f"{RUNTIME}.cni.bin_dirs")):
        assert refusal(f"[{RUNTIME}.cni]\nbin_dir = 'x'", version=version).hint == f"it is {right} there"


def test_streaming_stays_where_it_was() -> None:
    text = f"[{CRI}]\nstream_idle_timeout = '1h'\n[debug]\nlevel = 'debug'\n"
    for version in config.VERSIONS:
        assert merged(text, version=version)["plugins"]["io.containerd.grpc.v1.cri"]["stream_idle_timeout"] == "1h"


CRI_OF = {
    2: ("plugins", "io.containerd.grpc.v1.cri"),
    3: ("plugins", "io.containerd.cri.v1.runtime"),
    4: ("plugins", "io.containerd.cri.v1.runtime"),
}


def replaced(text: str, version: int = 3, own_import: str = "") -> config.Table:
    return dropins.merged_template(base(version), dropin(text, "/n/t.tmpl"), has_base=False, own_import=own_import)


@pytest.mark.parametrize("version", config.VERSIONS)
def test_a_template_without_the_base_keeps_what_is_the_nodes(version: int) -> None:
    whole, result = base(version), replaced(f"version = {version}\n[x]\ny = 1\n", version)
    assert result["x"] == {"y": 1}
    for key in ("version", "root", "state", "grpc", "ttrpc", "proxy_plugins"):
        assert result.get(key) == whole.get(key)
    for name, plugin in result["plugins"].items():
        if name.startswith(("io.containerd.cri.", "io.containerd.grpc.")):
            runtimes = {"runtimes": {"runc": tomlread.at(whole, (*CRI_OF[version], "containerd", "runtimes", "runc"))}}
            netns = {"netns_mounts_under_state_dir": True, "restrict_oom_score_adj": True}
            images = {"snapshotter": "nix"}
            assert plugin in (
                images,
                {**netns, "containerd": runtimes},
                {**netns, "containerd": {**images, **runtimes}},
            )
        else:
            assert plugin == whole["plugins"][name]
    assert {"io.containerd.internal.v1.opt", "io.containerd.nri.v1.nri"} <= result["plugins"].keys()


def test_a_template_that_is_the_base_changes_nothing() -> None:
    for version in config.VERSIONS:
        whole = base(version)
        template = dropins.DropIn("/n/t.tmpl", copy.deepcopy(whole))
        assert dropins.merged_template(whole, template, has_base=False) == whole


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[x]\nversion = 3", "/n/t.tmpl: it makes no version = 3"),
        ("version = 2", "/n/t.tmpl: it says version 2"),
        ("version = 3\nroot = '/var/lib/containerd'", "/n/t.tmpl: root can't be set"),
        ("version = 3\nproxy_plugins = []", "/n/t.tmpl: proxy_plugins is a list here, and a table otherwise"),
        ("version = 3\nplugins = 1", "/n/t.tmpl: plugins is a number here"),
        ("version = 3\nimports = ['/n/d/*.toml', '/other']", "/n/t.tmpl: imports can't be set"),
    ],
)
def test_a_template_may_not_do_more_than_a_drop_in(text: str, message: str) -> None:
    with pytest.raises(errors.UsageError) as caught:
        replaced(text, own_import="/n/d/*.toml")
    assert caught.value.message.startswith(message)


def test_what_k3s_templates_import_is_merged_anyway() -> None:
    assert "imports" not in replaced("version = 3\nimports = ['/n/d/*.toml']", own_import="/n/d/*.toml")


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (b"x = 1\ny = \n", "line 2, column 5"),
        (b"[a]\n[a]\n", "line 2, column 3"),
        (b"x = [1,\n", "line 1, column 8"),
        (b"\n\nx = '\xe4'", "line 3, column 6"),
        (b"x = 1\r\n\ty", "line 2, column 3"),
    ],
)
def test_what_is_no_toml_is_told_with_its_place(data: bytes, place: str) -> None:
    with pytest.raises(errors.UsageError) as caught:
        tomlread.parsed(data, "/n/d/10.toml")
    assert caught.value.message.startswith(f"/n/d/10.toml, {place}: this is no")


@pytest.mark.parametrize("version", config.VERSIONS)
def test_a_key_in_other_letters_is_the_same_to_containerd(version: int) -> None:
    grpc = "plugins.'io.containerd.server.v1.grpc'" if version == 4 else "grpc"
    cri = f"{CRI}.containerd" if version == 2 else IMAGES
    for wrong, right in (
        ("Root", "root"),
        ("STATE", "state"),
        ("Imports", "imports"),
        (f"{grpc}.Address", f"{grpc}.address"),
        (f"{cri}.Snapshotter", f"{cri}.snapshotter"),
        ("proxy_plugins.nix.Address", "proxy_plugins.nix.address"),
        ("plugins.'io.containerd.internal.v1.opt'.Path", "plugins.'io.containerd.internal.v1.opt'.path"),
        ("plugins.'io.containerd.nri.v1.nri'.Socket_Path", "plugins.'io.containerd.nri.v1.nri'.socket_path"),
    ):
        error = refusal(f"{wrong} = '/run/containerd'", version=version)
        assert error.message == f"/n/d/10.toml: {wrong} is written with other letters than containerd's own key"
        assert error.hint == f"it is {right}"
        with pytest.raises(errors.UsageError, match="other letters"):
            replaced(f"version = {version}\n{wrong} = '/run/containerd'\n", version)
    # These are names that people choose.
    assert merged("[proxy_plugins.NIX]\ntype = 'snapshot'", version=version)["proxy_plugins"].keys() == {"nix", "NIX"}


@pytest.mark.parametrize("version", config.VERSIONS)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mirrors", "{'docker.io' = {endpoint = ['https://m.example']}}"),
        ("configs.'m.example'.tls", "{insecure_skip_verify = true}"),
    ],
)
def test_registries_in_the_way_of_old_need_a_template_of_its_own(version: int, key: str, value: str) -> None:
    """containerd doesn't start with both; without ``config_path`` it does."""
    registry = f"{CRI if version == 2 else IMAGES}.registry"
    error = refusal(f"{registry}.config_path = '/n/certs.d'\n{registry}.{key} = {value}", version=version)
    assert error.message.startswith(f"/n/d/10.toml: {registry}.{key} can't be set")
    assert "registries.yaml" in error.hint
    assert merged(f"{registry}.{key} = {value}", version=version)


def test_a_template_without_the_base_obeys_registries_yaml() -> None:
    whole = base(3)
    images = whole["plugins"]["io.containerd.cri.v1.images"]
    images["registry"] = {"config_path": "/n/certs.d"}

    def made(text: str) -> object:
        table = dropins.merged_template(whole, dropin(f"version = 3\n{text}"), has_base=False)
        return tomlread.at(table, ("plugins", "io.containerd.cri.v1.images", "registry"))

    assert made("") == {"config_path": "/n/certs.d"}
    mirrors = {"mirrors": {"a": {"endpoint": ["http://b"]}}}
    assert made(f"[{IMAGES}.registry.mirrors.a]\nendpoint = ['http://b']\n") == mirrors
