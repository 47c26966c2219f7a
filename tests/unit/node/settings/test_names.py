"""Where a node is found, by whoever asks."""

import os

import pytest

from nixlet.node.settings import config, configfile, names

OF_ROOT = {
    "data_dir": "/var/lib/nixlet",
    "state_dir": "/run/nixlet",
    "private_registry": "/etc/nixlet/registries.yaml",
    "file": "/etc/nixlet/config.yaml",
}
OF_USER = {
    "data_dir": "/home/ada/.local/share/nixlet",
    "state_dir": "/run/user/1234/nixlet",
    "private_registry": "/home/ada/.config/nixlet/registries.yaml",
    "file": "/home/ada/.config/nixlet/config.yaml",
}


def test_roots_are_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert names.defaults({"HOME": "/root", "XDG_RUNTIME_DIR": "/run/user/0"}) == OF_ROOT
    assert names.defaults({}) == {**OF_ROOT, "private_registry": config.Settings().private_registry}


def test_an_ordinary_users_are_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    assert names.defaults({"HOME": "/home/ada"}) == OF_USER
    # What isn't absolute says nothing.
    relative = dict.fromkeys(("XDG_RUNTIME_DIR", "XDG_DATA_HOME", "XDG_CONFIG_HOME"), "here")
    assert names.defaults({"HOME": "/home/ada", **relative}) == OF_USER
    said = {"XDG_RUNTIME_DIR": "/r", "XDG_DATA_HOME": "/d", "XDG_CONFIG_HOME": "/c"}
    assert names.defaults({"HOME": "/home/ada", **said}) == {
        "data_dir": "/d/nixlet",
        "state_dir": "/r/nixlet",
        "private_registry": "/c/nixlet/registries.yaml",
        "file": "/c/nixlet/config.yaml",
    }


def test_in_the_namespaces_of_a_node_its_user_is_root() -> None:
    environment = {names.INSIDE: "1:2", "HOME": "/home/ada", "XDG_RUNTIME_DIR": "/run/user/1234"}
    assert names.defaults(environment) == OF_USER


def test_settings_go_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    made = configfile.load({"rootless": True}, {"HOME": "/nowhere", "XDG_RUNTIME_DIR": "/run/user/1234"})
    assert made.settings.data_dir == "/nowhere/.local/share/nixlet"
    assert made.settings.state_dir == "/run/user/1234/nixlet"
    assert made.settings.private_registry == "/nowhere/.config/nixlet/registries.yaml"
    assert made.origins["state_dir"].source == "default"
    # It is a node alone.
    assert made.settings.kubernetes == "no"
