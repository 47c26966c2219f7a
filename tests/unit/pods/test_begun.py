"""Records of pods that were begun, and what is given back of one that stays unfinished."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.host import iptables
from nixlet.pods import begun, directories, leftovers

ID = "ab" * 32
OTHER = "cd" * 32

#: Known to be unfinished, and nothing is there but its rules.
UNHELD = "ef" * 32


def test_only_what_is_not_finished_is_found(tmp_path: Path) -> None:
    begun.begin(str(tmp_path / "default_a_u-1"), "containerd-1")
    begun.begin(str(tmp_path / "default_b_u-2"), "containerd-1")
    begun.begin(str(tmp_path / "default_d_u-4"), "containerd-2")
    (tmp_path / "default_c_u-3").mkdir()
    (tmp_path / "file").touch()
    begun.finish(str(tmp_path / "default_b_u-2"))
    assert list(begun.unfinished(str(tmp_path), "containerd-1")) == [str(tmp_path / "default_a_u-1")]
    assert list(begun.finished(str(tmp_path), "containerd-1")) == [str(tmp_path / "default_b_u-2")]
    assert list(begun.finished(str(tmp_path), "")) == []
    assert begun.uid_of(str(tmp_path / "default_a_u-1")) == "u-1"
    # One that goes is unfinished again, for a next node.
    begun.leave(str(tmp_path / "default_b_u-2"))
    assert len(list(begun.unfinished(str(tmp_path), "containerd-1"))) == 2
    assert list(begun.finished(str(tmp_path), "containerd-1")) == []
    with pytest.raises(errors.FailedPreconditionError, match="can't be changed"):
        begun.leave(str(tmp_path / "default_c_u-3"))


def test_one_containerd_says_nothing_of_the_pods_of_another(tmp_path: Path) -> None:
    """A node may be started now with its own containerd, now with another; each knows its own pods alone."""
    for uid, containerd in (("u-1", "own"), ("u-2", "own"), ("u-3", "other"), ("u-4", "other")):
        begun.begin(str(tmp_path / f"default_pod_{uid}"), containerd)
        begun.finish(str(tmp_path / f"default_pod_{uid}"))
    begun.begin(str(tmp_path / "default_pod_u-5"), "other")
    (tmp_path / "default_pod_u-6").mkdir()
    directories.sweep(str(tmp_path), "other", {"u-3"})
    assert {begun.uid_of(name) for name in os.listdir(tmp_path)} == {"u-1", "u-2", "u-3", "u-5", "u-6"}
    directories.sweep(str(tmp_path), "own", {"u-1"})
    assert {begun.uid_of(name) for name in os.listdir(tmp_path)} == {"u-1", "u-3", "u-5", "u-6"}


def test_a_record_is_on_the_disk_before_anything_relies_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    directory = str(tmp_path / "default_a_u-1")
    begun.begin(directory, "containerd-1")
    assert {f"{directory}/.begun", directory, str(tmp_path)} <= set(synced)
    synced.clear()
    begun.finish(directory)
    assert synced == [directory]


def test_a_record_that_can_not_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(errors.NixletError, match=r"file/pod can't be made: Not a directory"):
        begun.begin(str(tmp_path / "file" / "pod"), "containerd-1")


async def test_what_a_killed_runtime_leaves_is_given_back_by_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "results"
    results.mkdir()
    monkeypatch.setattr(leftovers, "_RESULTS", str(results))
    for container, uid in ((ID, "u-1"), (OTHER, "u-2")):
        known = {"containerId": container, "cniArgs": [["IgnoreUnknown", "1"], ["K8S_POD_UID", uid]], "result": {}}
        (results / f"net-{container}-eth0").write_text(json.dumps(known))
    (results / "broken").write_text("{")
    leases = tmp_path / "cni" / "net"
    leases.mkdir(parents=True)
    (leases / "10.0.0.2").write_text(f"{ID}\r\neth0")
    (leases / "10.0.0.3").write_text(f"{OTHER}\r\neth0")
    assert leftovers.networked("u-1") == {ID}
    filtered: list[str] = []

    async def remove_rules(*, container: str) -> None:
        filtered.append(container)

    monkeypatch.setattr(iptables, "remove_rules", remove_rules)

    sleeper = [sys.executable, "-c", "import time; print(flush=True); time.sleep(1000)"]
    shims = [
        subprocess.Popen(
            ["containerd-shim-test", *sleeper[1:], "-namespace", "k8s.io", "-id", each],
            executable=sys.executable,
            stdout=subprocess.PIPE,
        )
        for each in (ID, OTHER)
    ]
    try:
        for shim in shims:
            assert shim.stdout is not None
            shim.stdout.readline()
        await leftovers.end({ID, UNHELD}, str(tmp_path / "cni"))
        assert shims[0].wait(10) == -9
        assert shims[1].poll() is None
    finally:
        for shim in shims:
            shim.kill()
            shim.communicate()
    assert [path.name for path in leases.iterdir()] == ["10.0.0.3"]
    assert sorted(filtered) == sorted([ID, UNHELD])
    assert sorted(path.name for path in results.iterdir()) == ["broken", f"net-{OTHER}-eth0"]
