"""What a cluster has on its machine: what is its own is known, and nothing else."""

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest

from nixlet.cluster import certificates, kubeconfigs, tokens
from nixlet.host import mounts
from nixlet.node.cluster import traces
from nixlet.node.cluster.children import preparing
from nixlet.node.cluster.preflight import kernel, mapping, others
from nixlet.node.settings import config, kubeletfiles
from nixlet.pods import resolvconf
from support import clusters


def settings_at(directory: Path, **said: Any) -> config.Settings:
    data_dir, state_dir = str(directory / "data"), str(directory / "run")
    return config.Settings(data_dir=data_dir, state_dir=state_dir, node_ip=("192.0.2.7",), node_name="node-1", **said)


def test_all_that_is_prepared_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolvconf, "for_pods", lambda *_: "/etc/resolv.conf")
    settings = settings_at(tmp_path, secrets_encryption=True, token="se-cret")
    cluster = clusters.settings(tmp_path, secrets_encryption=True)
    preparing.prepare_server(settings, cluster)
    preparing.prepare_agent(settings, cluster, preparing.node_of(settings, "cgroupfs"))
    # (an agent's: of how it joined)
    for name in ("bootstrap.kubeconfig", "node-password", "cluster.json"):
        (tmp_path / "data/agent" / name).write_text("se-cret")
    trees = list(traces.trees(settings, [settings.layout]))
    made = [str(path) for path in tmp_path.rglob("*") if not path.is_dir()]
    assert len(made) > 40
    assert [path for path in made if not any(f"{path}/".startswith(f"{tree}/") for tree in trees)] == []
    # What a person put beside ours is theirs.
    for mine in (
        "agent/etc/kubelet.conf.d/50-mine.conf",
        "agent/pod-manifests/a.yaml",
        "server/manifests/a.yaml",
        "agent/images/a.tar",
    ):
        path = tmp_path / "data" / mine
        assert not any(f"{path}/".startswith(f"{tree}/") for tree in trees), mine
    assert tokens.read(str(tmp_path / "data/server/token")).password == "se-cret"


def test_where_a_person_has_put_the_kubelet_s_directory_only_what_it_made_goes(tmp_path: Path) -> None:
    """It may be a directory with all sorts of things in it."""
    root = tmp_path / "srv"
    settings = settings_at(tmp_path, kubelet_arg=(f"root-dir={root}",))
    trees = list(traces.trees(settings, [settings.layout]))
    assert str(root) not in trees
    assert {f"{root}/pods", f"{root}/pki", f"{root}/cpu_manager_state"} <= set(trees)
    assert f"{root}/database" not in trees
    settings = settings_at(tmp_path)
    assert f"{tmp_path}/data/agent/kubelet" in traces.trees(settings, [settings.layout])


@pytest.mark.parametrize("name", ["kube-proxy", "/usr/local/bin/k3s server"])
async def test_another_kube_proxy_keeps_its_services(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """Its rules have the same names, also where it is a part of k3s."""
    settings = settings_at(tmp_path, kubernetes_bin_dir=str(tmp_path))
    (tmp_path / "data/agent").mkdir(parents=True)
    (tmp_path / "data/agent/kubeproxy.kubeconfig").write_text("")
    program, called = tmp_path / "kube-proxy", tmp_path / "called"
    program.write_text(f"#!/bin/sh\ntouch {called}\n")
    program.chmod(0o755)
    other = await asyncio.create_subprocess_exec(name, "60", executable=shutil.which("sleep"))
    try:
        await traces.remove_rules(settings)
    finally:
        other.kill()
        await other.wait()
    assert "another kube-proxy runs on this machine" in caplog.text
    assert not called.exists()


def test_another_cluster_s_kubeconfig_stays(tmp_path: Path) -> None:
    settings = settings_at(tmp_path, write_kubeconfig=str(tmp_path / "k.yaml"))
    certificates.ensure(clusters.settings(tmp_path), clusters.NOW)
    path = mapping.kubeconfig_path(settings)
    assert path not in traces.trees(settings, [settings.layout])
    kubeconfigs.write(path, kubeconfigs.for_people(clusters.settings(tmp_path)))
    assert path in traces.trees(settings, [settings.layout])
    other = clusters.settings(tmp_path / "other")
    certificates.ensure(other, clusters.NOW)
    kubeconfigs.write(path, kubeconfigs.for_people(other))
    assert path not in traces.trees(settings, [settings.layout])


def test_what_pods_left_in_shared_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_at(tmp_path)
    assert traces.pods(settings) == frozenset()
    (tmp_path / "data/agent/kubelet/pods/1-2").mkdir(parents=True)
    uids = traces.pods(settings)
    assert uids == {"1-2"}
    logs, links = tmp_path / "pods", tmp_path / "containers"
    monkeypatch.setattr(traces, "_POD_LOGS", str(logs))
    monkeypatch.setattr(traces, "_CONTAINER_LOGS", str(links))
    monkeypatch.setattr(traces, "_DEVICE_PLUGINS", str(tmp_path / "plugins"))
    assert traces.shared(uids) == []
    for name in ("ns_ours_1-2", "ns_theirs_1-3", "1-2"):
        (logs / name / "main").mkdir(parents=True)
    links.mkdir()
    for name, target in (("a", "ns_ours_1-2"), ("b", "ns_theirs_1-3")):
        (links / name).symlink_to(logs / target / "main" / "0.log")
    assert traces.shared(uids) == [str(logs / "ns_ours_1-2"), str(links / "a")]
    assert traces.shared(frozenset()) == []


def test_where_the_kubelet_is(tmp_path: Path) -> None:
    settings = settings_at(tmp_path)
    assert preparing.kubelet_dir(settings) == f"{tmp_path}/data/agent/kubelet"
    settings = settings_at(tmp_path, kubelet_arg=("root-dir=/a", "v=2", "--root-dir=/var/lib/kubelet"))
    assert preparing.kubelet_dir(settings) == "/var/lib/kubelet"
    assert config.kubelet_argument(settings, "cgroup-root") == ""


@pytest.mark.parametrize("another_runs", [False, True])
async def test_cgroups_that_are_empty_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, another_runs: bool) -> None:
    """Directories stand for them here: one that has something in it can't be removed either."""
    settings = settings_at(tmp_path, kubelet_arg=("cgroup-root=/mine",))
    top = tmp_path / "cpu" / "mine" / "kubepods"
    for name in ("burstable/podours/container", "besteffort/podearlier/container", "podours", "podbusy"):
        (top / name).mkdir(parents=True)
    (top / "podbusy" / "process").write_text("")
    (tmp_path / "cpu" / "kubepods" / "podours").mkdir(parents=True)
    table = [mounts.MountPoint(1, 0, "0:1", "/", str(tmp_path / "cpu"), "cgroup", "cgroup", "")]
    monkeypatch.setattr(mounts, "table", lambda: iter(table))
    monkeypatch.setattr(others, "run", lambda _: another_runs)
    await traces.remove_cgroups(settings, {"ours"})
    left = {str(path.relative_to(top)) for path in top.rglob("*") if path.is_dir()}
    theirs = {"burstable", "besteffort", "besteffort/podearlier", "besteffort/podearlier/container"}
    assert left == {"podbusy"} | (theirs if another_runs else set())
    # Another root is somebody else's.
    assert (tmp_path / "cpu" / "kubepods" / "podours").is_dir()


@pytest.mark.parametrize("another_runs", [False, True])
def test_another_kubelet_keeps_the_machine_s_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, another_runs: bool
) -> None:
    settings = settings_at(tmp_path)
    put_back: list[config.Layout] = []
    monkeypatch.setattr(kernel, "put_settings_back", put_back.append)
    monkeypatch.setattr(others, "run", lambda program: another_runs and program == others.KUBELET)
    traces.put_settings_back(settings)
    assert put_back == ([] if another_runs else [settings.layout])


async def test_the_root_of_cgroups_may_stand_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_at(tmp_path)
    file = Path(kubeletfiles.directory(settings.layout), "50-mine.conf")
    file.parent.mkdir(parents=True)
    file.write_text("cgroupRoot: /mine\n")
    pod, other = tmp_path / "cpu/mine/kubepods/podours", tmp_path / "cpu/kubepods/podours"
    table = [mounts.MountPoint(1, 0, "0:1", "/", str(tmp_path / "cpu"), "cgroup", "cgroup", "")]
    monkeypatch.setattr(mounts, "table", lambda: iter(table))
    monkeypatch.setattr(others, "run", lambda _: False)
    for made in (pod, other):
        made.mkdir(parents=True)
    await traces.remove_cgroups(settings, {"ours"})
    assert (pod.exists(), other.exists()) == (False, True)
    # A file that nobody can read keeps nobody from taking the node away.
    file.write_text("cgroupRoot: [")
    await traces.remove_cgroups(settings, {"ours"})
    assert not other.exists()


@pytest.mark.parametrize("another_runs", [False, True])
async def test_slices_are_given_up_by_systemd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, another_runs: bool
) -> None:
    """A program in systemctl's place writes down what it is asked for; the real one is asked where a whole machine is there."""
    settings = settings_at(tmp_path, kubelet_arg=("cgroup-root=/my-own",))
    top = "my_own.slice/my_own-kubepods.slice"
    burstable = f"{top}/my_own-kubepods-burstable.slice"
    first, second = (
        tmp_path / "cpu" / burstable / f"my_own-kubepods-burstable-pod{uid}.slice" for uid in ("1_2", "3_4")
    )
    for made in (first, second):
        made.mkdir(parents=True)
    (second / "cgroup.procs").write_text("")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "systemctl").write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/asked\n')
    (programs / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    table = [mounts.MountPoint(1, 0, "0:1", "/", str(tmp_path / "cpu"), "cgroup", "cgroup", "")]
    monkeypatch.setattr(mounts, "table", lambda: iter(table))
    monkeypatch.setattr(others, "run", lambda _: another_runs)
    await traces.remove_cgroups(settings, {"1-2", "5-6"})
    asked = "my_own-kubepods-burstable-pod1_2.slice" if another_runs else "my_own-kubepods.slice"
    assert (tmp_path / "asked").read_text() == f"stop {asked}\n"
    assert (first.exists(), second.exists()) == (False, True)
    (second / "cgroup.procs").write_text("7\n")
    await traces.remove_cgroups(settings, {"3-4"})
    assert (tmp_path / "asked").read_text() == f"stop {asked}\n"
    assert ["there are processes in it" in record.getMessage() for record in caplog.records] == [True]
