"""Templates of containerd's configuration: what is understood, and what is said of the rest."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixlet import errors
from nixlet.containerd import config, proxyplugins, registries, rewrites, runtimes, templates, tomlread
from nixlet.encoding import gotemplate_values

PATH = "/n/config-v3.toml.tmpl"

BASE: config.Table = {
    "version": 3,
    "root": "/n/root",
    "grpc": {"address": "/n/c.sock"},
    "plugins": {"a.v1.cri": {"containerd": {"runtimes": {"runc": {"type": "v2"}}}, "list": [{"x": 1}, {"x": 2}]}},
    "proxy_plugins": {"nix": {"exports": {"root": "/n/nix"}}},
}

SETTINGS = config.ContainerdSettings(
    version=3,
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
    certs_dir="/n/certs.d",
    enable_selinux=True,
    runtimes={"wasmtime": runtimes.Runtime("io.containerd.wasmtime.v1", "/opt/wasmtime")},
)

SAID = registries.Registries(
    {
        "docker.io": registries.Mirror(
            ("https://a.example", "https://b.example"), (rewrites.Rewrite(rewrites.compiled("^x/"), "y/"),)
        )
    },
    {
        "a.example": registries.HostConfig(registries.Auth("ada", 'se"cret'), registries.Tls("/ca.crt")),
        "b.example": registries.HostConfig(),
    },
)

VALUES = templates.fields(
    SETTINGS, template_dir="/n/etc", image_service="/n/nix.sock", said=SAID, default_endpoint=True
)


def made(text: str) -> config.Table:
    return templates.tables(text.encode(), PATH, BASE, VALUES)


def refusal(text: str) -> errors.UsageError:
    with pytest.raises(errors.UsageError) as caught:
        made(text)
    assert caught.value.message.startswith(PATH)
    return caught.value


@pytest.mark.parametrize(
    "action",
    [
        '{{ template "base" $ }}',
        '{{ template "base" . }}',
        '{{template "base" .}}',
        "{{- template `base` . -}}",
        '{{\n  template  "base" .\n}}',
    ],
)
def test_the_base_with_a_table_below(action: str) -> None:
    assert made(f"# of mine\n{action}\n[mine]\nx = 1\n") == BASE | {"mine": {"x": 1}}


def test_a_mark_that_says_utf_8() -> None:
    """As some editors put it first."""
    assert made('\ufeff# of mine\n{{ template "base" . }}\n') == BASE
    assert tomlread.parsed("\ufeffx = 1\n".encode(), PATH) == {"x": 1}
    with pytest.raises(errors.UsageError, match=r"line 1, column 3: this is not UTF-8"):
        tomlread.parsed(b"\xef\xbb\xbf# \xff", PATH)


def test_keys_and_tables_above_and_below_the_base() -> None:
    text = 'oom_score = 7\n{{ template "base" . }}\n\n# my runtime\n  [plugins."a.v1.cri".containerd.runtimes.kata]\n    type = "kata"\n'
    result = made(text)
    assert result["oom_score"] == 7
    assert result["plugins"]["a.v1.cri"]["containerd"]["runtimes"] == {"runc": {"type": "v2"}, "kata": {"type": "kata"}}


def test_a_template_without_the_base_replaces_it() -> None:
    result = made("version = 3\n[x]\ny = [1,\n2]\n")
    assert result["x"] == {"y": [1, 2]}
    assert "list" not in result["plugins"].get("a.v1.cri", {})


def test_a_table_of_which_the_base_has_tables_alone() -> None:
    assert made('{{ template "base" . }}\n[proxy_plugins]\nx = 1\n')["proxy_plugins"]["x"] == 1


def test_fields() -> None:
    text = 'version = 3\nx = "{{ .NodeConfig.AgentConfig.PauseImage }}"\ny = {{.SystemdCgroup}}\nz = "{{- .SystemdCgroup -}} !"\n'
    result = made(text)
    assert [result[key] for key in "xyz"] == ["localhost/pause:1", False, "false!"]


def test_comments_and_trimmed_white_space() -> None:
    assert made('version = 3{{/* as k3s\nhas it */}}\nx = "a  {{- /* b */ -}}\n\n  c"\n')["x"] == "ac"


def test_braces_within_quotes_do_not_end_an_action() -> None:
    assert made('version = 3\nx = "{{ printf "}}" }}"')["x"] == "}}"


def printed(action: str) -> str:
    return str(made(f"version = 3\nx = '''{action}'''\n")["x"])


@pytest.mark.parametrize(
    ("action", "text"),
    [
        ("{{ if .NodeConfig.SELinux }}a{{ else }}b{{ end }}", "a"),
        ("{{ if not .NodeConfig.SELinux -}} a {{- else }} b{{ end }}", " b"),
        ("{{if .DisableCgroup}}a{{else if .NodeConfig.SELinux}}b{{else}}c{{end}}", "b"),
        ('{{ if eq .NodeConfig.AgentConfig.Snapshotter "stargz" "nix" }}a{{ end }}', "a"),
        ('{{ if ne .Program "k3s" }}a{{ end }}', "a"),
        ('{{ if and .NodeConfig.SELinux (or .DisableCgroup (eq .Program "nixlet")) }}a{{ end }}', "a"),
        ("{{ if .PrivateRegistryConfig }}a{{ end }}", "a"),
        ("{{ or .NodeConfig.DefaultRuntime .Program }}", "nixlet"),
        ("{{ range $k, $v := .ExtraRuntimes }}{{ $k }}={{ $v.RuntimeType }};{{ end }}", "wasmtime=io.containerd.wasmtime.v1;"),
        ("{{ range .ExtraRuntimes }}{{ .BinaryName }}{{ $.Program }}{{ end }}", "/opt/wasmtimenixlet"),
        (
            ("{{ range $k, $v := .PrivateRegistryConfig.Mirrors }}"
            '{{ range $i, $j := $v.Endpoints }}{{ if $i }}, {{ end }}{{ printf "%q" . }}{{ end }}'
            "{{ range $p, $r := $v.Rewrites }} {{ $p }}={{ $r }}{{ end }}{{ end }}"),
            '"https://a.example", "https://b.example" ^x/=y/',
        ),
        (
            ("{{ range $k, $v := .PrivateRegistryConfig.Configs }}{{ if $v.Auth }}{{ $k }}"
            ' {{ if $v.Auth.Username }}{{ printf "%q" $v.Auth.Password }}{{ end }}{{ end }}'
            "{{ if $v.TLS }} {{ $v.TLS.CAFile }}{{ end }}{{ end }}"),
            'a.example "se\\"cret" /ca.crt',
        ),
        ("{{ range .PrivateRegistryConfig.Auths }}a{{ else }}b{{ end }}", "b"),
        ("{{ with .NodeConfig.AgentConfig }}{{ .PauseImage }}{{ end }}", "localhost/pause:1"),
        ("{{ with .NodeConfig.DefaultRuntime }}a{{ else }}{{ $.Program }}{{ end }}", "nixlet"),
        ('{{ $x := "a" }}{{ if true }}{{ $x = "b" }}{{ $y := 1 }}{{ end }}{{ $x }}', "b"),
        ("{{ deschemify .NodeConfig.Containerd.Address | printf `%q` }}", '"/n/c.sock"'),
        ('{{ printf "%s-%d-%t-%v%%" "a" 7 true .Program }}', "a-7-true-nixlet%"),
        ('{{ filepathjoin .NodeConfig.Containerd.Root "../x" }}', "/n/x"),
        ("{{ toJson (index .PrivateRegistryConfig.Mirrors `docker.io`).Endpoints }}", '["https://a.example","https://b.example"]'),
        ("{{ len .ExtraRuntimes }}", "1"),
        ('{{ if gt (len .ExtraRuntimes) 0 }}a{{ end }}{{ lt "a" "b" }}{{ ge 1 1 }}{{ le 2 1 }}', "atruetruefalse"),
        ('{{ "tab\\t\\u00e4\\"" }}', 'tab\tä"'),
    ],
)  # fmt: skip
def test_what_k3ss_own_templates_use(action: str, text: str) -> None:
    assert printed(action) == text


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("{{ eq .Program true }}", "a text can't be compared with true or false"),
        ("{{ gt .Program 1 }}", "a text can't be compared with a number"),
        ("{{ lt true false }}", "true or false can't be compared with true or false"),
        ("{{ .NodeConfig.AgentConfig }}", "this is a group of values, and no single value"),
        ("{{ .Program.Name }}", "there is no field Name in a text"),
        ("{{ range .Program }}{{ end }}", "a text has no elements"),
        ('{{ printf "%d" .Program }}', "%d is not for a text"),
        ('{{ printf "%s" }}', "printf has fewer values than verbs"),
        ('{{ printf "a" .Program }}', "printf has more values than verbs"),
        ("{{ $x }}", "there is no variable $x"),
        ("{{ if true }}{{ $x := 1 }}{{ end }}{{ $x }}", "there is no variable $x"),
        ("{{ $x = 1 }}", "there is no variable $x"),
        ("{{ .Program .Program }}", "this is no function"),
        ("{{ not }}", "it takes 1 of values, not 0"),
    ],
)
def test_what_does_not_fit_its_value(action: str, message: str) -> None:
    error = refusal(f"version = 3\n\nx = '{action}'\n")
    assert error.message.startswith(f"{PATH}, line 3: {{{{ ")
    assert message in error.message


NVIDIA = """
{{ template "base" . }}

{{- if .NodeConfig.AgentConfig.Snapshotter }}
[plugins."a.v1.cri".containerd]
  default_runtime_name = "nvidia"
{{- end }}

[plugins."a.v1.cri".containerd.runtimes.runc]
  extra = {{ .SystemdCgroup }}

{{- range $name := .Names }}
{{ end }}
"""


def test_tables_of_the_base_are_merged() -> None:
    result = made(NVIDIA.replace(".Names", ".PrivateRegistryConfig.Auths"))
    assert result["plugins"]["a.v1.cri"]["containerd"] == {
        "default_runtime_name": "nvidia",
        "runtimes": {"runc": {"type": "v2", "extra": False}},
    }
    # The line of what goes wrong is the template's.
    assert refusal(NVIDIA).message.startswith(
        f"{PATH}, line 12: {{{{ range $name := .Names }}}}: there is no field Names"
    )


def test_what_is_the_nodes_is_told() -> None:
    assert "root can't be set: the node sets it" in refusal('root = "/x"\n{{ template "base" . }}\n').message


@pytest.mark.parametrize(
    "action",
    [
        'define "base"',
        'block "x" .',
        "break",
        'template "base"',
        "printf (.Program",
        "printf .Program)",
        "lower .Program",
        ".Program | ",
        "1.5",
        "'c'",
        'printf "%x" 1',
        '"\\q"',
        "",
        "if",
    ],
)
def test_what_is_cleverer_is_refused_with_its_line(action: str) -> None:
    error = refusal(f'version = 3\n\nx = "{{{{ {action} }}}}"\n')
    assert error.message.startswith(f"{PATH}, line 3: {{{{ {action}")
    assert error.message.endswith("is not supported in a template")
    assert "PauseImage" in error.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ end }}", "line 1: {{ end }} closes nothing"),
        ("\n{{ else }}", "line 2: {{ else }} closes nothing"),
        ("\n{{ if true }}", "line 2: {{ if true }} is not closed by {{ end }}"),
        ("{{ if true }}{{ else }}{{ else }}{{ end }}", "line 1: {{ else }} is not supported"),
        ("{{ if true }}{{ else range .X }}{{ end }}", "line 1: {{ else range .X }} is not supported"),
        ('\n{{ template "other" . }}', 'line 2: there is no template "other"'),
        ("{{ if true }}" * 60, "line 1: blocks are nested too deep"),
        ("{{" + "(" * 60, "line 1: {{ is not closed by }}"),
        ("{{ len " + "(" * 60 + "1" + ")" * 60 + " }}", " is not supported in a template"),
    ],
)
def test_blocks_that_are_not_closed(text: str, message: str) -> None:
    assert message in refusal(text).message


def test_a_long_action_is_shown_in_part() -> None:
    assert len(refusal(f"{{{{ printf {'x' * 5000} }}}}").message) < 160


@pytest.mark.parametrize(
    ("field", "message", "hint"),
    [
        (".NodeConfig.AgentConfig.PauseImages", "there is no field", "did you mean .NodeConfig.AgentConfig.PauseImage?"),
        (".Zzz", "there is no field", "there are DisableCgroup"),
        (".NodeConfig.AgentConfig", "no single value", "it has CNIBinDir"),
    ],
)  # fmt: skip
def test_fields_that_are_not_there(field: str, message: str, hint: str) -> None:
    error = refusal(f"\n{{{{ {field} }}}}")
    assert error.message.startswith(f"{PATH}, line 2: ")
    assert message in error.message
    assert hint in error.hint


def test_an_action_without_an_end() -> None:
    assert refusal("a = 1\n\nb = {{ .SystemdCgroup\n").message == f"{PATH}, line 3: {{{{ is not closed by }}}}"


@pytest.mark.parametrize(
    ("text", "line", "first"),
    [
        ("[a]\nx = 1\n[b]\n[a]\n", 4, 1),
        ('{{ template "base" . }}\n[a]\n[[c]]\n[[c]]\n[c.d]\n[[c]]\n[c.d]\n[a]\n', 8, 2),
    ],
)
def test_a_table_that_the_template_has_twice(text: str, line: int, first: int) -> None:
    assert refusal(text).message == f"{PATH}, line {line}: the table [a] is there already, at line {first}"


@pytest.mark.parametrize("text", ["x = \n", "[a\n", 'x = "open\n', "x = 1\nx = 2\n"])
def test_what_is_no_toml_is_told_with_the_templates_line(text: str) -> None:
    line = 5 if text.startswith("x = 1") else 4
    assert refusal(f'{{{{ template "base" . }}}}\n[mine]\na = 1\n{text}').message.startswith(
        f"{PATH}, line {line}: this makes no TOML: "
    )


@pytest.mark.parametrize(
    "text",
    [
        'x = [\n{{ template "base" . }}\n]\n',
        'x = """\n{{ template "base" . }}\n"""\n',
        'x = {{ template "base" . }}\n1\n',
    ],
)
def test_the_base_stands_between_lines(text: str) -> None:
    assert refusal(text).message.startswith(f"{PATH}, line ")


def test_a_list_that_is_not_closed() -> None:
    assert "this makes no TOML" in refusal('{{ template "base" . }}\n[mine]\na = [\n').message


def test_a_value_that_the_base_needs_for_a_table() -> None:
    assert "grpc is a number here, and a table otherwise" in refusal('grpc = 1\n{{ template "base" . }}\n').message


def test_keys_below_the_base_belong_to_nothing() -> None:
    error = refusal('{{ template "base" . }}\n\n# mine\noom_score = 7\n[x]\n')
    assert error.message == f"{PATH}, line 4: oom_score belongs to no table"


def test_the_base_twice() -> None:
    error = refusal('{{ template "base" . }}\n\n{{ template "base" . }}\n')
    assert error.message == f"{PATH}, line 3: the base is there already, at line 1"


def test_what_is_not_utf_8() -> None:
    with pytest.raises(errors.UsageError, match=r"line 2, column 3: this is not UTF-8"):
        templates.tables(b"x = 1\n# \xff", PATH, BASE, VALUES)


PIECES = ["{{ if .Program }}", "{{ else }}", "{{ end }}", "{{ range $a, $b := .ExtraRuntimes }}", '{{ template "base" . }}', "{{", "}}", "{{-", "-}}", "\n", "[a]", "[[a]]", "[grpc]", "x = 1", '"', "`", " .", "#", "/*"]  # fmt: skip


def outcome(text: str) -> str:
    try:
        made(text)
    except errors.UsageError as error:
        return error.message
    return "rendered"


@given(st.lists(st.sampled_from(PIECES), max_size=12))
def test_nothing_ends_in_another_error(pieces: list[str]) -> None:
    assert outcome("".join(pieces)).startswith((PATH, "rendered"))


def flat(value: object, name: str = "") -> dict[str, object]:
    if not isinstance(value, gotemplate_values.Struct):
        return {name: value}
    return {key: each for field, inner in value.fields.items() for key, each in flat(inner, f"{name}.{field}").items()}


def test_the_fields_are_those_of_the_settings() -> None:
    # k3s's names (pkg/agent/templates), with what each is for us.
    wanted = {
        ".Program": "nixlet",
        ".NodeConfig.SELinux": True,
        ".SystemdCgroup": False,
        ".NoDefaultEndpoint": False,
        ".NodeConfig.Containerd.Root": "/n/root",
        ".NodeConfig.Containerd.State": "/n/state",
        ".NodeConfig.Containerd.Address": "/n/c.sock",
        ".NodeConfig.Containerd.Opt": "/n/opt",
        ".NodeConfig.Containerd.Registry": "/n/certs.d",
        ".NodeConfig.Containerd.Template": "/n/etc",
        ".NodeConfig.AgentConfig.Snapshotter": "nix",
        ".NodeConfig.AgentConfig.PauseImage": "localhost/pause:1",
        ".NodeConfig.AgentConfig.CNIBinDir": "/cni",
        ".NodeConfig.AgentConfig.CNIConfDir": "/n/net.d",
        ".NodeConfig.AgentConfig.ImageServiceSocket": "/n/nix.sock",
    }
    assert wanted.items() <= flat(VALUES).items()
