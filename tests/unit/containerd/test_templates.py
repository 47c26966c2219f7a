"""Templates of containerd's configuration: what is understood, and what is said of the rest."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixlet import errors
from nixlet.containerd import config, templates

PATH = "/n/config-v3.toml.tmpl"

BASE: config.Table = {
    "version": 3,
    "root": "/n/root",
    "grpc": {"address": "/n/c.sock"},
    "plugins": {"a.v1.cri": {"containerd": {"runtimes": {"runc": {"type": "v2"}}}, "list": [{"x": 1}, {"x": 2}]}},
    "proxy_plugins": {"nix": {"exports": {"root": "/n/nix"}}},
}

VALUES = {
    ".NodeConfig.AgentConfig.PauseImage": "localhost/pause:1",
    ".NodeConfig.AgentConfig.CNIBinDir": "/cni",
    ".SystemdCgroup": "false",
}


def made(text: str) -> config.Table:
    return templates.tables(text.encode(), PATH, BASE, VALUES)


def refusal(text: str) -> errors.UsageError:
    with pytest.raises(errors.UsageError) as caught:
        made(text)
    assert caught.value.message.startswith(PATH)
    return caught.value


@pytest.mark.parametrize(
    "action",
    ['{{ template "base" . }}', '{{template "base" .}}', "{{- template `base` . -}}", '{{\n  template  "base" .\n}}'],
)
def test_the_base_with_a_table_below(action: str) -> None:
    assert made(f"# of mine\n{action}\n[mine]\nx = 1\n") == BASE | {"mine": {"x": 1}}


def test_keys_and_tables_above_and_below_the_base() -> None:
    text = 'oom_score = 7\n{{ template "base" . }}\n\n# my runtime\n  [plugins."a.v1.cri".containerd.runtimes.kata]\n    type = "kata"\n'
    result = made(text)
    assert result["oom_score"] == 7
    assert result["plugins"]["a.v1.cri"]["containerd"]["runtimes"] == {"runc": {"type": "v2"}, "kata": {"type": "kata"}}


def test_a_template_without_the_base_replaces_it() -> None:
    assert made("version = 3\n[x]\ny = [1,\n2]\n") == {"version": 3, "x": {"y": [1, 2]}}


def test_a_table_of_which_the_base_has_tables_alone() -> None:
    assert made('{{ template "base" . }}\n[proxy_plugins]\nx = 1\n')["proxy_plugins"]["x"] == 1


def test_fields() -> None:
    text = 'version = 3\nx = "{{ .NodeConfig.AgentConfig.PauseImage }}"\ny = {{.SystemdCgroup}}\nz = "{{- .SystemdCgroup -}} !"\n'
    assert made(text) == {"version": 3, "x": "localhost/pause:1", "y": False, "z": "false!"}


def test_comments_and_trimmed_white_space() -> None:
    assert made('{{/* as k3s\nhas it */}}x = "a  {{- /* b */ -}}\n\n  c"\n') == {"x": "ac"}


def test_braces_within_quotes_do_not_end_an_action() -> None:
    assert '{{ printf "}}" }}' in refusal('x = 1\ny = {{ printf "}}" }}').message


@pytest.mark.parametrize(
    "action",
    [
        "if .SystemdCgroup",
        "range $k, $v := .ExtraRuntimes",
        "end",
        "else",
        "with .NodeConfig",
        'define "base"',
        'template "base"',
        'template "other" .',
        'printf "%q" .NodeConfig.AgentConfig.PauseImage',
        ".NodeConfig.AgentConfig.PauseImage | printf",
        "$x",
        '"text"',
        "",
        ".",
    ],
)
def test_what_is_cleverer_is_refused_with_its_line(action: str) -> None:
    error = refusal(f'version = 3\n\nx = "{{{{ {action} }}}}"\n')
    assert error.message.startswith(f"{PATH}, line 3: {{{{ {action}")
    assert error.message.endswith("is not supported in a template")
    assert "PauseImage" in error.hint


def test_a_long_action_is_shown_in_part() -> None:
    assert len(refusal(f"{{{{ printf {'x' * 5000} }}}}").message) < 160


@pytest.mark.parametrize(
    ("field", "message", "hint"),
    [
        (".NodeConfig.AgentConfig.PauseImages", "there is no field", "did you mean {{ .NodeConfig.AgentConfig.PauseImage }}?"),
        (".Zzz", "there is no field", "there are .NodeConfig"),
        (".NodeConfig.AgentConfig", "is no single value", ".NodeConfig.AgentConfig."),
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
    ("text", "line", "table"),
    [
        ('{{ template "base" . }}\n\n[grpc]\ntcp_address = ""\n', 3, "grpc"),
        ('[ grpc ] # mine\nuid = 1\n{{ template "base" . }}\n', 1, "grpc"),
        ('{{ template "base" . }}\n[x]\n[proxy_plugins.nix.exports]\n', 3, "proxy_plugins.nix.exports"),
        ('{{ template "base" . }}\n[[plugins."a.v1.cri".list]]\nx = 3\n', 2, "plugins.'a.v1.cri'.list"),
        ('{{ template "base" . }}\n[plugins."a.v1.cri".containerd.runtimes.runc]\n', 2, "plugins.'a.v1.cri'.containerd.runtimes.runc"),
    ],
)  # fmt: skip
def test_a_table_that_the_base_has(text: str, line: int, table: str) -> None:
    error = refusal(text)
    assert error.message == f"{PATH}, line {line}: the table [{table}] is there already, in the base"
    assert "config-v3.toml.d" in error.hint


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


def test_a_list_that_is_not_closed() -> None:
    assert "this makes no TOML" in refusal('{{ template "base" . }}\n[mine]\na = [\n').message


def test_a_value_that_the_base_needs_for_a_table() -> None:
    error = refusal('grpc = 1\n{{ template "base" . }}\n')
    assert error.message.startswith(f"{PATH} and its base make no TOML: ")
    assert "[grpc]" in error.message


def test_keys_below_the_base_belong_to_nothing() -> None:
    error = refusal('{{ template "base" . }}\n\n# mine\noom_score = 7\n[x]\n')
    assert error.message == f"{PATH}, line 4: oom_score belongs to no table"


def test_the_base_twice() -> None:
    error = refusal('{{ template "base" . }}\n\n{{ template "base" . }}\n')
    assert error.message == f"{PATH}, line 3: the base is there already, at line 1"


def test_what_is_not_utf_8() -> None:
    with pytest.raises(errors.UsageError, match=r"line 2, column 3: this is not UTF-8"):
        templates.tables(b"x = 1\n# \xff", PATH, BASE, VALUES)


PIECES = ['{{ template "base" . }}', "{{", "}}", "{{-", "-}}", "\n", "[a]", "[[a]]", "[grpc]", "x = 1", '"', "`", " .", "#", "/*"]  # fmt: skip


def outcome(text: str) -> str:
    try:
        made(text)
    except errors.UsageError as error:
        return error.message
    return "rendered"


@given(st.lists(st.sampled_from(PIECES), max_size=12))
def test_nothing_ends_in_another_error(pieces: list[str]) -> None:
    assert outcome("".join(pieces)).startswith((PATH, "rendered"))


def test_the_fields_are_those_of_the_settings() -> None:
    settings = config.ContainerdSettings(
        version=3,
        root="/n/root",
        state="/n/state",
        address="/n/c.sock",
        opt_dir="/n/opt",
        snapshotter="nix",
        snapshotter_address="/n/nix.sock",
        snapshotter_root="/n/nix",
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
    )
    values = templates.fields(settings, template_dir="/n/etc", image_service="/n/nix.sock")
    # k3s's names (pkg/agent/templates), with what each is for us.
    wanted = {
        ".Program": "nixlet",
        ".NodeConfig.SELinux": "true",
        ".SystemdCgroup": "false",
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
    assert wanted.items() <= values.items()
    text = "version = 3\n" + "".join(f'x{number} = "{{{{ {name} }}}}"\n' for number, name in enumerate(values))
    result = templates.tables(text.encode(), str(Path(PATH)), config.tables(settings), values)
    assert list(result.values())[1:] == list(values.values())
