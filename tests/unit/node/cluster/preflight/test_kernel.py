"""What a cluster needs of the kernel."""

import logging
import os
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.host import process, procfs
from nixlet.node.cluster.preflight import kernel
from nixlet.node.settings import config


async def test_packets_are_handed_on(tmp_path: Path) -> None:
    forward = tmp_path / "net/ipv4/ip_forward"
    bridge = tmp_path / "net/bridge/bridge-nf-call-iptables"
    for path in (forward, bridge):
        path.parent.mkdir(parents=True)
        path.write_text("0\n")
    others = [tmp_path / "net/ipv6/conf/all/forwarding", tmp_path / "net/bridge/bridge-nf-call-ip6tables"]
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("0\n")
    await kernel.prepare(root=str(tmp_path))
    assert (forward.read_text()[0], bridge.read_text()[0]) == ("1", "1")
    assert kernel.switched_on(str(tmp_path)) == ["net.ipv4.ip_forward"]
    assert [path.read_text() for path in others] == ["0\n", "0\n"]
    await kernel.prepare([4, 6], root=str(tmp_path))
    assert [path.read_text()[0] for path in others] == ["1", "1"]
    assert kernel.switched_on(str(tmp_path)) == ["net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"]


async def test_what_can_not_be_switched_on_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(process, "find_program", lambda name: None)
    # A kernel that has neither has nothing that could be switched on; without the one services are lame.
    await kernel.prepare(root=str(tmp_path))
    assert caplog.messages == [
        "this kernel has no br_netfilter: a pod doesn't reach a service whose pod is on the same node"
    ]
    (tmp_path / "net/bridge").mkdir(parents=True)
    caplog.clear()
    await kernel.prepare(root=str(tmp_path))
    assert caplog.messages == []
    (tmp_path / "net/ipv4/ip_forward").mkdir(parents=True)
    await kernel.prepare(root=str(tmp_path))
    assert "net/ipv4/ip_forward can't be set to 1, which services need: Is a directory" in caplog.text


def test_what_becomes_of_old_cgroups_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    kernel.warn_of_cgroups(str(tmp_path))
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "this machine has cgroups of version 1: its kubelet is told to run all the same"
    )
    assert record.getMessage() == kernel.remark_on_cgroups(str(tmp_path))
    assert "systemd.unified_cgroup_hierarchy=1" in record.__dict__["hint"]
    caplog.clear()
    (tmp_path / "cgroup.controllers").touch()
    kernel.warn_of_cgroups(str(tmp_path))
    assert (caplog.records, kernel.remark_on_cgroups(str(tmp_path))) == ([], "")


def test_what_a_kubelet_changes_is_put_back(tmp_path: Path) -> None:
    layout, root = config.Layout(str(tmp_path), str(tmp_path)), tmp_path / "sys"
    os.mkdir(layout.agent)
    panic, overcommit, keys = (
        root / name for name in ("kernel/panic", "vm/overcommit_memory", "kernel/keys/root_maxkeys")
    )
    for path, value in ((panic, "0\n"), (overcommit, "0\n"), (keys, "7\n")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value)
    kernel.put_settings_back(layout, str(root))
    kernel.remember_settings(layout, str(root))
    panic.write_text("10\n")
    overcommit.write_text("1\n")
    keys.write_text("1000000\n")
    # The second start of a kubelet finds what the first one has set.
    kernel.remember_settings(layout, str(root))
    # Somebody has changed one since then.
    keys.write_text("2000000\n")
    kernel.put_settings_back(layout, str(root))
    assert (panic.read_text(), overcommit.read_text(), keys.read_text()) == ("0", "0", "2000000\n")
    Path(kernel.settings_file(layout)).write_text("[")
    kernel.put_settings_back(layout, str(root))


def test_what_a_person_has_set_since_the_last_boot_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As databases want it, which is what kubelets want, too."""
    layout, root = config.Layout(str(tmp_path), str(tmp_path)), tmp_path / "sys"
    os.mkdir(layout.agent)
    overcommit, panic = root / "vm/overcommit_memory", root / "kernel/panic"
    for path in (overcommit, panic):
        path.parent.mkdir(parents=True)
        path.write_text("0\n")
    kernel.remember_settings(layout, str(root))
    monkeypatch.setattr(procfs, "boot_id", lambda: "the next one")
    overcommit.write_text("1\n")
    panic.write_text("10\n")
    # No kubelet has run in it, and so nothing is one's doing.
    kernel.put_settings_back(layout, str(root))
    assert (overcommit.read_text(), panic.read_text()) == ("1\n", "10\n")
    panic.write_text("0\n")
    kernel.remember_settings(layout, str(root))
    panic.write_text("10\n")
    kernel.put_settings_back(layout, str(root))
    assert (overcommit.read_text(), panic.read_text()) == ("1\n", "0")


@pytest.mark.parametrize(
    ("programs", "release", "version", "status", "mode"),
    [
        ({"nft", "iptables"}, "6.1.0-18-amd64", b"nftables v1.0.6 (Lester Gooch #5)\n", 0, "nftables"),
        ({"nft"}, "5.13.0", b"nftables v1.0.1\n", 0, "nftables"),
        ({"nft", "iptables"}, "5.10.0", b"nftables v1.0.6\n", 0, "iptables"),
        ({"nft", "iptables"}, "6.1.0", b"nftables v0.9.8\n", 0, "iptables"),
        ({"nft", "iptables"}, "6.1.0", b"nftables v1.0.6\n", 1, "iptables"),
        ({"nft", "iptables"}, "6.1.0", b"?", 0, "iptables"),
        ({"iptables"}, "6.1.0", b"", 0, "iptables"),
        ({"nft"}, "6.1.0", b"nftables v1.0.6\n", 1, "nft does not work here, and iptables is not installed"),
        (set(), "6.1.0", b"", 0, "neither nft nor iptables is installed"),
    ],
)
async def test_how_services_can_be_made(
    monkeypatch: pytest.MonkeyPatch, programs: set[str], release: str, version: bytes, status: int, mode: str
) -> None:
    class Kernel:
        """uname's answer."""

        def __init__(self) -> None:
            self.release = release

    async def run(argv: list[str], *, stdin: bytes = b"", timeout: float) -> process.Completed:
        if "--version" in argv:
            return process.Completed(tuple(argv), 0, version, b"")
        assert stdin
        return process.Completed(tuple(argv), status, b"", b"")

    monkeypatch.setattr(process, "find_program", lambda name: f"/{name}" if name in programs else None)
    monkeypatch.setattr(process, "run", run)
    monkeypatch.setattr("os.uname", Kernel)
    if " " not in mode:
        assert await kernel.proxy_mode() == mode
        return
    with pytest.raises(errors.UnavailableError, match=mode) as caught:
        await kernel.proxy_mode()
    assert "--disable-kube-proxy" in caught.value.hint
