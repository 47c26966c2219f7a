"""What an ordinary user's node needs, looked for in directories and files of our own."""

import os
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.node.requirements import rootless


def program(directory: Path, name: str, mode: int = 0o755) -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / name
    path.write_text("#!/bin/sh\n")
    path.chmod(mode)
    return path


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory on PATH, and no other one where programs are."""
    monkeypatch.setattr(rootless, "_PLACES", (str(tmp_path / "usr"),))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


def test_programs_are_found_beside_path(places: Path) -> None:
    """A unit's PATH may lack where the system has them."""
    with pytest.raises(errors.UnavailableError, match="newuidmap is not installed, without which") as caught:
        rootless.find_mapper("newuidmap")
    assert "apt install uidmap" in caught.value.hint
    theirs = program(places / "usr", "newuidmap", 0o4755)
    assert rootless.find_mapper("newuidmap") == str(theirs)


def test_a_mapper_that_may_do_nothing_is_passed_over(places: Path) -> None:
    """One of the Nix store has no set-user-ID bit."""
    useless = program(places / "bin", "newuidmap")
    with pytest.raises(errors.FailedPreconditionError, match=f"{useless} is not set-user-ID root"):
        rootless.find_mapper("newuidmap")
    useful = program(places / "usr", "newuidmap", 0o4755)
    assert rootless.find_mapper("newuidmap") == str(useful)
    for name in ("newgidmap", "slirp4netns"):
        program(places / "usr", name, 0o4755)
    # rootlesskit takes the first one.
    assert rootless.path_with_helpers() == f"{places}/usr:{places}/bin:{places}/usr"
    useless.unlink()
    assert rootless.path_with_helpers() == f"{places}/bin:{places}/usr"


@pytest.mark.parametrize("name", ["rootlesskit", "slirp4netns"])
def test_what_is_not_installed_is_named_with_its_package(places: Path, name: str) -> None:
    with pytest.raises(errors.UnavailableError, match=f"^{name} is not installed, which ") as caught:
        getattr(rootless, f"find_{name}")()
    assert caught.value.hint == f"install it (Debian: apt install {name})"


@pytest.mark.parametrize(
    ("text", "has"),
    [
        (None, "has no IDs"),
        ("", "has no IDs"),
        ("other:100000:65536\n", "has no IDs"),
        ("{name}:100000:1000\nother:1:65536\n", "has 1000 IDs"),
        ("{name}:oops\n{uid}:5:many\n", "has no IDs"),
    ],
)
def test_ranges_that_are_missing(tmp_path: Path, text: str | None, has: str) -> None:
    file = tmp_path / "subuid"
    if text is not None:
        file.write_text(text.format(name="root", uid=os.getuid()))
    with pytest.raises(
        errors.FailedPreconditionError, match=f"root {has} in {file}, and containers need 65536"
    ) as caught:
        rootless.check_range(str(file), "subuids")
    assert caught.value.hint.startswith("sudo usermod --add-subuids 100000-165535 root")


@pytest.mark.parametrize("text", ["root:100000:65536\n", "0:1:60000\nroot:100000:5536\n"])
def test_ranges(tmp_path: Path, text: str) -> None:
    (tmp_path / "subuid").write_text(text)
    assert rootless.check_range(f"{tmp_path}/subuid", "subuids") == f"65536 for root in {tmp_path}/subuid"


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("kernel.unprivileged_userns_clone", 0, "sudo sysctl -w kernel.unprivileged_userns_clone=1"),
        ("user.max_user_namespaces", 0, "sudo sysctl -w user.max_user_namespaces=28633"),
        (
            "kernel.apparmor_restrict_unprivileged_userns",
            1,
            "sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
        ),
    ],
)
def test_switches_of_distributions(
    places: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: int, hint: str
) -> None:
    settings = places / "sys"
    monkeypatch.setattr(rootless, "_SETTINGS", str(settings))
    monkeypatch.setattr(rootless, "_PROFILES", str(places))
    assert rootless.check_switches() == "ordinary users may make them"
    file = settings / name.replace(".", "/")
    file.parent.mkdir(parents=True)
    program(places / "bin", "rootlesskit")
    file.write_text(f"{1 - value}\n")
    assert rootless.check_switches() == "ordinary users may make them"
    file.write_text(f"{value}\n")
    with pytest.raises(errors.UnsupportedError, match=f"{name} is {value}, which keeps ordinary users") as caught:
        rootless.check_switches()
    assert caught.value.hint.startswith(hint)
    # AppArmor lets those pass that it has a profile for.
    (places / f"{places}/bin/rootlesskit".strip("/").replace("/", ".")).touch()
    if "apparmor" in name:
        assert rootless.check_switches() == "ordinary users may make them"


def test_interfaces_for_slirp4netns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tun = tmp_path / "tun"
    monkeypatch.setattr(rootless, "_TUN", str(tun))
    with pytest.raises(errors.UnavailableError, match=f"there is no {tun}") as caught:
        rootless.check_tun()
    assert caught.value.hint == "sudo modprobe tun"
    tun.touch()
    assert rootless.check_tun() == str(tun)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(errors.FailedPreconditionError, match=f"{tun} is not for ordinary users") as denied:
        rootless.check_tun()
    assert denied.value.hint == f"sudo chmod 0666 {tun}"


def test_where_sockets_are_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rootless.check_runtime_dir(f"{tmp_path}/run/nixlet") == f"{tmp_path}/run/nixlet"
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(errors.FailedPreconditionError, match=f"can't be made: {tmp_path} is not ours"):
        rootless.check_runtime_dir(f"{tmp_path}/run/nixlet")
    with pytest.raises(errors.FailedPreconditionError, match="can't be made: /run is not ours") as caught:
        rootless.check_runtime_dir("/run/no-such-user/nixlet")
    assert "loginctl enable-linger" in caught.value.hint
