"""Which cgroup driver a node's containerd and kubelet get."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from nixlet.containerd import config as containerd_config
from nixlet.node.children import cgroupdriver, rendering
from nixlet.node.settings import config, kubeletfiles

CRI = "io.containerd.grpc.v1.cri"
RUNTIME = "io.containerd.cri.v1.runtime"

#: As kubelets have them made by the two drivers, and as nixlet has.
BY_CGROUPFS = "/kubepods/burstable/pod1-2/abc"
BY_SYSTEMD = "kubepods-burstable-pod1_2.slice:cri-containerd:abc"
OURS = "/k8s.io/abc"


@pytest.fixture
def layout(tmp_path: Path) -> config.Layout:
    return config.Layout(f"{tmp_path}/data", f"{tmp_path}/state")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A service of systemd's; what is taken away of that, a test says."""
    booted = tmp_path / "systemd"
    booted.mkdir()
    monkeypatch.setenv("INVOCATION_ID", "1")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("nixlet.host.cgroups.systemd_runs", booted.is_dir)
    monkeypatch.setattr("nixlet.host.cgroups.controllers", lambda **_: frozenset({"cpuset", "cpu", "pids"}))
    monkeypatch.setattr("nixlet.host.userns.is_inside", lambda: False)
    return booted


def container(layout: config.Layout, name: str, place: object) -> None:
    bundle = Path(layout.containerd_state, "io.containerd.runtime.v2.task", "k8s.io", name)
    bundle.mkdir(parents=True)
    (bundle / "config.json").write_text(json.dumps({"linux": {"cgroupsPath": place}}))


def write(layout: config.Layout, version: int = 3, **settings: Any) -> None:
    program = containerd_config.ContainerdProgram("/usr/bin/containerd", "9", version)
    said = config.Settings(**settings)
    rendering.write(said, layout, program=program, runc="/usr/sbin/runc", cni_bin_dir="/cni")


def drop_in(layout: config.Layout, text: str) -> None:
    directory = Path(layout.dropin_dir(3))
    directory.mkdir(parents=True)
    (directory / "a.toml").write_text(f"version = 3\n{text}\n")


@pytest.mark.parametrize("version", [2, 3, 4])
def test_containerd_is_told_what_kubelets_are(layout: config.Layout, machine: Path, version: int) -> None:
    assert cgroupdriver.written(layout) == ""
    write(layout, version)
    assert cgroupdriver.written(layout) == "systemd"
    machine.rmdir()
    write(layout, version)
    assert cgroupdriver.written(layout) == "cgroupfs"


def test_a_machine_that_systemd_does_not_run(
    monkeypatch: pytest.MonkeyPatch, machine: Path, layout: config.Layout
) -> None:
    """What was started by a service, in a container for one, has the variable of that service."""
    assert cgroupdriver.of_machine() == "systemd"
    machine.rmdir()
    assert cgroupdriver.of_machine() == "cgroupfs"
    machine.mkdir()
    monkeypatch.setattr("nixlet.host.userns.is_inside", lambda: True)
    assert cgroupdriver.wanted(config.Settings(), layout) == "cgroupfs"


@pytest.mark.parametrize(
    ("places", "wanted"),
    [
        ([BY_CGROUPFS], "cgroupfs"),
        ([f"/mine{BY_CGROUPFS}", OURS], "cgroupfs"),
        ([BY_SYSTEMD], "systemd"),
        ([f"mine-{BY_SYSTEMD}"], "systemd"),
        # What goes on whatever the driver is holds nobody back.
        ([OURS, "system.slice:cri-containerd:abc", "", None], "systemd"),
        # Of two kinds one has to go.
        ([BY_CGROUPFS, BY_SYSTEMD], "systemd"),
    ],
)
def test_pods_of_a_kubelet_keep_their_driver(layout: config.Layout, places: list[object], wanted: str) -> None:
    for number, place in enumerate(places):
        container(layout, str(number), place)
    (Path(layout.containerd_state, "io.containerd.runtime.v2.task", "k8s.io", "going")).mkdir()
    write(layout)
    assert cgroupdriver.written(layout) == wanted


def test_pods_that_keep_the_node_back_are_told(layout: config.Layout, caplog: pytest.LogCaptureFixture) -> None:
    container(layout, "a", BY_CGROUPFS)
    with caplog.at_level(logging.INFO):
        write(layout)
    (said,) = (record for record in caplog.records if "driver" in record.getMessage())
    assert (said.levelno, "stay with the cgroup driver cgroupfs" in said.getMessage()) == (logging.INFO, True)


def test_who_says_otherwise_is_obeyed_and_warned(layout: config.Layout, caplog: pytest.LogCaptureFixture) -> None:
    container(layout, "a", BY_SYSTEMD)
    write(layout, kubelet_arg=("cgroup-driver=cgroupfs",))
    assert cgroupdriver.written(layout) == "cgroupfs"
    (said,) = caplog.records
    assert (said.levelno, "starts them anew" in said.getMessage()) == (logging.WARNING, True)


def test_a_drop_in_is_the_kubelets_word_too(layout: config.Layout, caplog: pytest.LogCaptureFixture) -> None:
    drop_in(layout, f"[plugins.'{RUNTIME}'.containerd.runtimes.runc.options]\nSystemdCgroup = false")
    write(layout)
    assert cgroupdriver.written(layout) == "cgroupfs"
    assert caplog.records == []
    write(layout, kubelet_arg=("cgroup-driver=systemd",))
    (said,) = caplog.messages
    assert said.endswith(
        "told the cgroup driver systemd, and containerd has cgroupfs, which counts for kubelets from 1.34 on"
    )


def test_a_kubelet_that_can_not_ask_its_containerd(layout: config.Layout, caplog: pytest.LogCaptureFixture) -> None:
    """That of containerd 1, whose configuration has version 2."""
    directory = Path(layout.dropin_dir(2))
    directory.mkdir(parents=True)
    (directory / "a.toml").write_text(f"[plugins.'{CRI}'.containerd.runtimes.runc.options]\nSystemdCgroup = false\n")
    write(layout, 2, kubelet_arg=("cgroup-driver=systemd",))
    (said,) = caplog.messages
    assert said.endswith("told the cgroup driver systemd, and containerd has cgroupfs, so that no pod will start")


@pytest.mark.parametrize("version", [2, 3])
def test_what_a_file_of_the_kubelet_says_is_containerd_s_too(
    layout: config.Layout, caplog: pytest.LogCaptureFixture, version: int
) -> None:
    file = Path(kubeletfiles.directory(layout), "50-mine.conf")
    file.parent.mkdir(parents=True)
    file.write_text("cgroupDriver: cgroupfs\n")
    write(layout, version)
    assert cgroupdriver.written(layout) == "cgroupfs"
    write(layout, version, kubelet_arg=("cgroup-driver=systemd",))
    assert cgroupdriver.written(layout) == "systemd"
    assert caplog.messages == []


@pytest.mark.parametrize("version", [2, 3, 4])
def test_who_looks_from_a_shell_sees_what_the_service_has(
    layout: config.Layout, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    def shown() -> list[str]:
        where = {"version": version, "cni_bin_dir": "/cni"}
        ours = rendering.render(config.Settings(), layout, runc="/runc", looked_at=True, **where)  # type: ignore[arg-type]
        theirs = rendering.render_for_k3s(config.Settings(), layout, **{**where, "version": min(version, 3)})  # type: ignore[arg-type]
        return [cgroupdriver.of_containerd(each.table) for each in (ours, theirs)]

    write(layout, version)
    monkeypatch.delenv("INVOCATION_ID")
    assert shown() == ["systemd", "systemd"]
    # What is there by now counts more, and a service that is started from here would have none of it.
    container(layout, "a", BY_CGROUPFS)
    assert shown() == ["cgroupfs", "systemd"]
    Path(layout.containerd_config).write_text("[")
    assert shown() == ["cgroupfs", "cgroupfs"]
    write(layout, version)
    assert cgroupdriver.written(layout) == "cgroupfs"


def test_the_default_runtime_speaks_for_all(layout: config.Layout) -> None:
    runtimes = f"plugins.'{RUNTIME}'.containerd.runtimes"
    drop_in(
        layout,
        f"[plugins.'{RUNTIME}'.containerd]\ndefault_runtime_name = 'mine'\n"
        f"[{runtimes}.mine]\nruntime_type = 'io.containerd.runc.v2'\n",
    )
    write(layout)
    assert cgroupdriver.written(layout) == "cgroupfs"


def test_where_no_runtime_says_containerd_looks_by_itself(machine: Path) -> None:
    table = {"version": 3, "plugins": {RUNTIME: {"containerd": {"runtimes": {"kata": {"runtime_type": "io.containerd.kata.v2"}}}}}}  # fmt: skip
    assert cgroupdriver.of_containerd(table) == "systemd"
    machine.rmdir()
    assert cgroupdriver.of_containerd(table) == "cgroupfs"
