"""The options of ``nixlet server`` and ``nixlet agent``: each setting has one, and --show-config says where values come from."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from nixlet.cli import app
from nixlet.cli import server as verb
from nixlet.node.settings import config, names


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No file and no variable of this machine counts."""
    for field in dataclasses.fields(config.Settings):
        monkeypatch.delenv(names.variable(field.name), raising=False)
    monkeypatch.delenv("NIXLET_CONFIG_FILE", raising=False)
    monkeypatch.setattr(names, "DEFAULT_FILE", str(tmp_path / "none.yaml"))


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, dict[str, Any]]:
    assert app.run([*arguments, "--show-config", "--output", "json"]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert isinstance(settings, dict)
    return settings


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = app.run([*arguments, "--show-config"])
    return status, capsys.readouterr().err


def test_every_setting_has_an_option_with_its_variable_and_default_in_the_help() -> None:
    options = {option.name: option for option in verb.server.options}
    for field in dataclasses.fields(config.Settings):
        option = options[field.name]
        assert names.flag(field.name) in option.flags
        assert f"env var: {names.variable(field.name)}" in option.text
        if isinstance(field.default, str) and field.default:
            assert f"default: {field.default}]" in option.text


def test_what_holds_is_shown_where_nobody_said_anything(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["server", "--config", "/dev/null", "--state-dir", "/run/x", "--show-config"]) == 0
    shown = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert '""' not in "".join(shown.values())
    assert "/run/x/health.sock" in shown["health-address"]
    assert "/var/lib/nixlet/agent/images, /tmp" in shown["archive-dir"]
    assert "runc" in shown["default-runtime"]
    assert "none" in shown["system-default-registry"]


@pytest.mark.parametrize("name", ["server", "agent"])
def test_flags_as_k3s_has_them(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("selinux: true\nnonroot-devices: true\nsnapshotter: native\n")
    arguments = ["-c", str(file), "-d", "/data", "-l", "/log", "--selinux=false", "--debug", "--cni-bin-dir", "/a"]
    said = shown(capsys, name, *arguments, "--cni-bin-dir=/b", "--disable-default-registry-endpoint")
    assert {key: (value["value"], value["source"], *value["places"]) for key, value in said.items()} == {
        **{
            names.key(field.name): (json.loads(json.dumps(field.default)), "default")
            for field in dataclasses.fields(config.Settings)
        },
        "data-dir": ("/data", "flag", "--data-dir"),
        "log": ("/log", "flag", "--log"),
        "selinux": (False, "flag", "--selinux"),
        "debug": (True, "flag", "--debug"),
        "disable-default-registry-endpoint": (True, "flag", "--disable-default-registry-endpoint"),
        "cni-bin-dir": (["/a", "/b"], "flag", "--cni-bin-dir"),
        "nonroot-devices": (True, "file", f"{file}, line 2"),
        "snapshotter": ("native", "file", f"{file}, line 3"),
    }


def test_debug_before_the_verb(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(capsys, "--debug", "server")["debug"]["value"] is True
    assert shown(capsys, "--debug", "server", "--debug=false")["debug"]["value"] is False
    assert shown(capsys, "server")["debug"]["value"] is False
    monkeypatch.setenv("NIXLET_DEBUG", "1")
    assert shown(capsys, "server")["debug"] == {"value": True, "source": "environment", "places": ["NIXLET_DEBUG"]}


def test_a_table_for_people(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIXLET_SNAPSHOTTER", "native")
    assert app.run(["server", "--show-config", "--archive-dir", "/a", "--archive-dir", "/b"]) == 0
    head, *rows = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    table = {key: " ".join(rest.split()) for key, rest in rows}
    assert " ".join(" ".join(head).split()) == "SETTING VALUE FROM"
    assert len(table) == len(dataclasses.fields(config.Settings))
    assert table["snapshotter"] == "native NIXLET_SNAPSHOTTER"
    assert table["archive-dir"] == "/a, /b --archive-dir"
    assert table["selinux"] == "false default"
    assert table["log"] == "standard error default"


@pytest.mark.parametrize("flag", ["--server", "-s"])
def test_joining_a_cluster(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    status, printed = refused(capsys, "server", flag, "https://192.0.2.7:6443")
    assert status == 125
    assert printed.startswith(
        "error: --server: a cluster has one server, which joins no other one\nhint: nixlet agent joins"
    )
    status, printed = refused(capsys, "agent", flag, "https://user:pass@192.0.2.7")
    assert status == 2
    assert printed.startswith("error: --server is no server's URL\nhint: as in https://192.0.2.7:6443")


def test_secrets_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    secrets = {"token": "se-cret", "agent-token": "se-crets", "datastore-endpoint": "mysql://u:se-cret@tcp(db)/k"}
    said = shown(capsys, "server", *(f"--{key}={value}" for key, value in secrets.items()))
    assert {key: said[key]["value"] for key in secrets} == dict.fromkeys(secrets, "(secret)")
    assert app.run(["server", *(f"--{key}={value}" for key, value in secrets.items()), "--show-config"]) == 0
    assert "se-cret" not in capsys.readouterr().out


def test_mistakes(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("\nsnapshoter: nix\n")
    status, printed = refused(capsys, "server", "--config", str(file))
    assert status == 2
    assert printed == f'error: {file}, line 2: snapshoter is not a known key\nhint: did you mean "snapshotter"?\n'
    status, printed = refused(capsys, "agent", "--selinux=perhaps")
    assert (status, printed) == (
        2,
        "error: --selinux must be true or false, not 'perhaps'\nhint: correct what is named there; nixlet VERB --help says what a verb takes\n",
    )
    status, printed = refused(capsys, "server", "extra")
    assert status == 2
    assert "unexpected extra argument" in printed
    monkeypatch.setenv("NIXLET_HEALTH_ADDRESS", "0.0.0.0:80")
    status, printed = refused(capsys, "server")
    assert status == 2
    assert printed.startswith("error: NIXLET_HEALTH_ADDRESS '0.0.0.0:80' is no loopback address")
