"""What people's files say of a kubelet's configuration."""

from pathlib import Path
from typing import Any

import pytest

from nixlet import errors
from nixlet.node.settings import config, kubeletfiles


@pytest.fixture
def layout(tmp_path: Path) -> config.Layout:
    return config.Layout(str(tmp_path / "data"), str(tmp_path / "run"))


def said(layout: config.Layout, **more: Any) -> dict[str, str]:
    return kubeletfiles.said(config.Settings(**more), layout)


def write(layout: config.Layout, name: str, text: str) -> Path:
    path = Path(kubeletfiles.directory(layout), name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n{text}\n")
    return path


def test_files_count_in_the_kubelet_s_own_order(layout: config.Layout) -> None:
    assert said(layout) == {}
    # (ours, and a copy of what another start was told)
    write(layout, "00-nixlet-defaults.conf", "healthzPort: 1\ncgroupDriver: cgroupfs")
    write(layout, "10-cli-config.conf", "healthzPort: 2")
    write(layout, "50-mine.yaml", "healthzPort: 3")
    assert said(layout) == {}
    write(layout, "50-mine.conf", "healthzPort: 4\nmaxPods: 7\nauthentication: {anonymous: {enabled: false}}")
    write(layout, "50-mine/a.conf", "healthzPort: 5\nhealthzBindAddress: 0.0.0.0")
    assert said(layout) == {"healthz-port": "4", "healthz-bind-address": "0.0.0.0"}
    more = '{"healthzBindAddress": null, "cgroupDriver": "systemd", "cgroupRoot": "/mine"}'
    write(layout, "60-more.conf", "").write_text(more)
    assert said(layout) == {"healthz-port": "4", "cgroup-driver": "systemd", "cgroup-root": "/mine"}


def test_the_file_that_is_named_comes_after_ours_and_before_others(layout: config.Layout, tmp_path: Path) -> None:
    named = tmp_path / "kubelet.yaml"
    named.write_text("port: 10260\naddress: 192.0.2.1\n")
    write(layout, "05-early.conf", "port: 1\ncgroupRoot: /a")
    write(layout, "10-cli-config.conf", "port: 2")
    write(layout, "50-mine.conf", "address: 192.0.2.2")
    more = config.Settings(kubelet_arg=(f"config={named}",))
    assert kubeletfiles.said(more, layout) == {"port": "10260", "cgroup-root": "/a", "address": "192.0.2.2"}
    assert kubeletfiles.argument(more, layout, "cgroup-root") == "/a"
    # Arguments count more, and a node without a kubelet has none of it.
    more = config.Settings(kubelet_arg=("cgroup-root=/b",))
    assert kubeletfiles.argument(more, layout, "cgroup-root") == "/b"
    assert said(layout, kubernetes="no") == said(layout, disable_agent=True) == {}


def test_files_that_can_not_be_obeyed(layout: config.Layout) -> None:
    path = write(layout, "50-mine.conf", "healthzPort: [")
    with pytest.raises(errors.UsageError, match=f"^{path}"):
        said(layout)
    write(layout, "50-mine.conf", "healthzPort: {}")
    with pytest.raises(errors.UsageError, match=f"^{path}, line 3: healthzPort must be a string"):
        said(layout)
    write(layout, "50-mine.conf", "healthzPort: 1").chmod(0o666)
    with pytest.raises(errors.PermissionDeniedError, match="can be written by everyone"):
        said(layout)
