"""The files that a cluster's programs find."""

from pathlib import Path

import pytest
import yaml

from nixlet import errors
from nixlet.cluster import programs, tokens
from nixlet.node.cluster.children import preparing
from nixlet.node.cluster.preflight import made
from nixlet.node.settings import config, kubeletfiles
from support import clusters


@pytest.fixture
def layout(tmp_path: Path) -> config.Layout:
    return config.Layout(f"{tmp_path}/data", f"{tmp_path}/run")


def test_a_start_changes_nothing_of_the_last_one_s(tmp_path: Path, layout: config.Layout) -> None:
    settings = config.Settings(data_dir=layout.data_dir, state_dir=layout.state_dir)
    preparing.prepare_server(settings, clusters.settings(tmp_path))
    before = clusters.content(tmp_path)
    assert tokens.read(f"{layout.data_dir}/server/token").user == "server"
    preparing.prepare_server(settings, clusters.settings(tmp_path))
    assert clusters.content(tmp_path) == before
    for secret in ("kubeconfig.yaml", "server/token", "server/cred/admin.kubeconfig", "agent/kubelet.kubeconfig"):
        assert Path(layout.data_dir, secret).stat().st_mode & 0o777 == 0o600
    assert Path(layout.data_dir, "server/db").stat().st_mode & 0o777 == 0o700


def test_what_a_killed_start_left_goes(tmp_path: Path, layout: config.Layout) -> None:
    """Keys are in some of it, and an uninstallation would take it for somebody's."""
    settings = config.Settings(data_dir=layout.data_dir, state_dir=layout.state_dir)
    cluster = clusters.settings(tmp_path, secrets_encryption=True)
    preparing.prepare_server(settings, cluster)
    before = clusters.content(tmp_path)
    names = (
        "server/.made.json", "server/.token", "server/tls/.server-ca.key", "server/cred/.admin.kubeconfig", ".kubeconfig.yaml",
        "server/cred/.encryption-config.json", "agent/.kubelet.kubeconfig", "agent/.client-ca.crt", "agent/.client-kubelet.key",
    )  # fmt: skip
    for name in names:
        (tmp_path / "data" / f"{name}.abcdefgh").write_text("half")
    preparing.prepare_server(settings, cluster)
    assert clusters.content(tmp_path) == before


@pytest.mark.parametrize("lost", ["server/tls", "server/tls/service.key", "server/cred"])
def test_what_a_cluster_was_made_with_is_not_made_anew(tmp_path: Path, layout: config.Layout, lost: str) -> None:
    """A directory that isn't mounted, for one: with other keys it would be another cluster, and its secrets unreadable."""
    settings = config.Settings(data_dir=layout.data_dir, state_dir=layout.state_dir)
    cluster = clusters.settings(tmp_path, secrets_encryption=True)
    preparing.prepare_server(settings, cluster)
    made.remember(settings, made.ETCD, cluster)
    preparing.prepare_server(settings, cluster)
    path = tmp_path / "data" / lost
    path.rename(tmp_path / "away")
    before = clusters.content(tmp_path)
    with pytest.raises(errors.FailedPreconditionError, match=f"^{path}.* is missing, which the cluster in") as caught:
        preparing.prepare_server(settings, cluster)
    assert clusters.content(tmp_path) == before
    assert f"or remove {made.memory(layout)} to have a new one made" in caught.value.hint
    if lost == "server/cred":
        Path(made.memory(layout)).unlink()
        preparing.prepare_server(settings, cluster)


def test_another_token_is_refused(tmp_path: Path, layout: config.Layout) -> None:
    preparing.prepare_server(config.Settings(data_dir=layout.data_dir, token="one"), clusters.settings(tmp_path))
    with pytest.raises(errors.FailedPreconditionError, match="was made with another token"):
        preparing.prepare_server(config.Settings(data_dir=layout.data_dir, token="two"), clusters.settings(tmp_path))


def test_who_may_read_the_kubeconfig(tmp_path: Path, layout: config.Layout) -> None:
    path = tmp_path / "k.yaml"
    settings = config.Settings(
        data_dir=layout.data_dir, write_kubeconfig=str(path), write_kubeconfig_mode="0640", write_kubeconfig_group="1"
    )
    preparing.prepare_server(settings, clusters.settings(tmp_path))
    assert (path.stat().st_mode & 0o777, path.stat().st_gid) == (0o640, 1)
    server = yaml.safe_load(path.read_text())["clusters"][0]["cluster"]["server"]
    assert server == "https://192.0.2.7:6443"


def test_the_kubelet_s_configuration(tmp_path: Path, layout: config.Layout) -> None:
    """A file that is named comes after ours, and goes with the argument that names it; a person's drop-ins are theirs."""
    directory = Path(kubeletfiles.directory(layout))
    named, node = tmp_path / "kubelet.yaml", programs.Node("/c", root_dir=f"{tmp_path}/k", static_pods=f"{tmp_path}/s")
    named.write_text("apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\nmaxPods: 7\n")
    preparing.prepare_agent(config.Settings(kubelet_arg=(f"config={named}",)), clusters.settings(tmp_path), node)
    (directory / "50-mine.conf").write_text("mine")
    assert sorted(path.name for path in directory.iterdir()) == [
        "00-nixlet-defaults.conf",
        "10-cli-config.conf",
        "50-mine.conf",
    ]
    assert (directory / "10-cli-config.conf").read_text() == named.read_text()
    assert yaml.safe_load((directory / "00-nixlet-defaults.conf").read_text())["kind"] == "KubeletConfiguration"
    preparing.prepare_agent(config.Settings(), clusters.settings(tmp_path), node)
    assert sorted(path.name for path in directory.iterdir()) == ["00-nixlet-defaults.conf", "50-mine.conf"]
    named.chmod(0o666)
    with pytest.raises(errors.PermissionDeniedError):
        preparing.prepare_agent(config.Settings(kubelet_arg=(f"config={named}",)), clusters.settings(tmp_path), node)
