"""Whether a node is a cluster: by the programs that are there, and by what a person asks for."""

import logging
from pathlib import Path
from typing import Any

import pytest

from nixlet import errors
from nixlet.host import process
from nixlet.node.cluster.preflight import finding
from nixlet.node.settings import config

KUBERNETES = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy")


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one directory on PATH, empty at first."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", str(directory))
    # The machine may have some of them.
    monkeypatch.setattr(process, "find_program", lambda name: there(directory, name))
    return directory


def there(directory: Path, name: str) -> str | None:
    return str(directory / name) if (directory / name).exists() else None


def have(directory: Path, *names: str) -> None:
    directory.mkdir(exist_ok=True)
    for name in names:
        (directory / name).write_text("")
        (directory / name).chmod(0o755)


def find(tmp_path: Path, **said: Any) -> finding.Found | None:
    settings = config.Settings(data_dir=str(tmp_path / "data"), state_dir=str(tmp_path / "run"), **said)
    return finding.find(settings)


def test_a_node_alone(tmp_path: Path, programs: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    have(programs, "etcd", "kubelet", "kubectl")
    assert find(tmp_path) is None
    (line,) = caplog.messages
    assert line == (
        "the node is alone, without a Kubernetes cluster: "
        "kube-apiserver, kube-controller-manager, kube-scheduler, kube-proxy are not on PATH"
    )
    have(programs, *KUBERNETES)
    caplog.clear()
    assert find(tmp_path, kubernetes="no") is None
    assert caplog.messages == []


def test_a_cluster(tmp_path: Path, programs: Path) -> None:
    have(programs, "etcd", *KUBERNETES)
    found = find(tmp_path)
    assert found is not None
    assert found.programs == {name: str(programs / name) for name in ("etcd", *KUBERNETES)}
    without = find(tmp_path, disable_kube_proxy=True, disable_scheduler=True)
    assert without is not None
    assert set(without.programs) == {"etcd", "kube-apiserver", "kube-controller-manager", "kubelet"}
    server = find(tmp_path, disable_agent=True, disable_controller_manager=True)
    assert server is not None
    assert set(server.programs) == {"etcd", "kube-apiserver", "kube-scheduler"}


def test_programs_in_a_directory(tmp_path: Path, programs: Path) -> None:
    """Kubernetes' programs come from it alone; the datastore's may be the system's."""
    have(programs, *KUBERNETES, "etcd")
    have(tmp_path / "k", *KUBERNETES)
    found = find(tmp_path, kubernetes_bin_dir=str(tmp_path / "k"))
    assert found is not None
    assert found.programs["kubelet"] == str(tmp_path / "k" / "kubelet")
    assert found.programs["etcd"] == str(programs / "etcd")
    (tmp_path / "k" / "kubelet").chmod(0o644)
    with pytest.raises(errors.UnavailableError, match=f"kubelet is not in {tmp_path}/k$"):
        find(tmp_path, kubernetes_bin_dir=str(tmp_path / "k"))


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"kubernetes": "yes"}, "--kubernetes yes asks for a cluster"),
        ({"token": "se-cret"}, "--token asks for a cluster"),
        ({"cluster_init": True}, "--cluster-init asks for a cluster"),
        ({"datastore_endpoint": "http://se-cret"}, "--datastore-endpoint asks for a cluster"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, programs: Path, said: dict[str, Any], reason: str) -> None:
    have(programs, "kubelet", "kube-proxy")
    with pytest.raises(errors.UnavailableError) as caught:
        find(tmp_path, **said)
    assert caught.value.message.startswith(f"{reason}, and ")
    assert "kube-apiserver, kube-controller-manager, kube-scheduler are not on PATH" in caught.value.message
    assert "kubelet" not in caught.value.message
    assert "kubernetes.io/releases/download" in caught.value.hint
    assert "--kubernetes-bin-dir" in caught.value.hint
    assert "se-cret" not in caught.value.message + caught.value.hint


def test_a_cluster_that_is_there_does_not_vanish(tmp_path: Path, programs: Path) -> None:
    have(programs, *KUBERNETES)
    (tmp_path / "data/server/db/etcd/member").mkdir(parents=True)
    with pytest.raises(errors.UnavailableError, match=r"there is a cluster in .*, and etcd is not on PATH") as caught:
        find(tmp_path)
    assert "apt install etcd-server" in caught.value.hint
    assert find(tmp_path, kubernetes="no") is None


def flannel_of(tmp_path: Path, **said: Any) -> tuple[str, bool]:
    """How pods' packets get to other nodes, and whether flannel runs here."""
    found = find(tmp_path, **said)
    assert found is not None
    return found.flannel, "flanneld" in found.programs


def test_flannel_where_it_is_there(tmp_path: Path, programs: Path) -> None:
    have(programs, "etcd", *KUBERNETES)
    assert flannel_of(tmp_path) == ("none", False)
    assert flannel_of(tmp_path, flannel_backend="none") == ("none", False)
    # What its servers say holds for an agent.
    assert flannel_of(tmp_path, server="https://192.0.2.7:6443", token="x", flannel_backend="vxlan") == ("none", False)
    # A server without a node of its own says how, and runs none.
    assert flannel_of(tmp_path, disable_agent=True, flannel_backend="host-gw") == ("host-gw", False)
    have(programs, "flanneld")
    # As k3s has it.
    assert flannel_of(tmp_path) == ("vxlan", True)
    assert flannel_of(tmp_path, flannel_backend="host-gw") == ("host-gw", True)
    assert flannel_of(tmp_path, flannel_backend="none") == ("none", False)
    assert flannel_of(tmp_path, disable_agent=True) == ("vxlan", False)
    assert flannel_of(tmp_path, server="https://192.0.2.7:6443", token="x") == ("none", True)
    # Somebody else's network.
    assert flannel_of(tmp_path, kubeconfig="/k") == ("none", False)
    assert flannel_of(tmp_path, container_runtime_endpoint="/run/c.sock") == ("none", False)


def test_flannel_with_kubernetes_programs_or_with_the_cni_plugins(tmp_path: Path, programs: Path) -> None:
    have(programs, "etcd")
    have(tmp_path / "k", *KUBERNETES)
    have(tmp_path / "cni", "flanneld")

    def path(**said: Any) -> str | None:
        found = find(tmp_path, kubernetes_bin_dir=str(tmp_path / "k"), **said)
        assert found is not None
        return found.programs.get("flanneld")

    assert path() is None
    assert path(cni_bin_dirs=(str(tmp_path / "cni"),)) == str(tmp_path / "cni/flanneld")
    have(programs, "flanneld")
    assert path() == str(programs / "flanneld")
    have(tmp_path / "k", "flanneld")
    assert path() == str(tmp_path / "k/flanneld")


def test_flannel_that_is_asked_for_and_not_there(tmp_path: Path, programs: Path) -> None:
    have(programs, "etcd", *KUBERNETES)
    with pytest.raises(errors.UnavailableError) as caught:
        find(tmp_path, flannel_backend="vxlan")
    assert caught.value.message == (
        "--flannel-backend vxlan asks for flannel, and flanneld is neither in --kubernetes-bin-dir nor on PATH nor with the CNI plugins"
    )
    assert "github.com/flannel-io/flannel/releases" in caught.value.hint
    # Nor does it vanish from a cluster whose pods count on it.
    (tmp_path / "data/agent").mkdir(parents=True)
    (tmp_path / "data/agent/flannel.json").write_text("{}")
    with pytest.raises(
        errors.UnavailableError, match=r"^pods of this cluster reach each other by flannel, and flanneld is"
    ):
        find(tmp_path)
    assert flannel_of(tmp_path, flannel_backend="none") == ("none", False)


@pytest.mark.parametrize(
    ("said", "whose"),
    [({"kubeconfig": "/k"}, "cluster"), ({"container_runtime_endpoint": "/run/c.sock"}, "containerd")],
)
def test_flannel_is_not_for_a_network_that_is_somebody_else_s(
    tmp_path: Path, programs: Path, said: dict[str, Any], whose: str
) -> None:
    have(programs, "etcd", "flanneld", *KUBERNETES)
    with pytest.raises(
        errors.UsageError, match=f"the network of pods is the affair of the {whose} that isn't nixlet's"
    ):
        find(tmp_path, flannel_backend="vxlan", **said)


def test_where_the_state_is(tmp_path: Path, programs: Path) -> None:
    def store(**said: Any) -> str:
        found = find(tmp_path, **said)
        assert found is not None
        return found.datastore

    have(programs, "etcd", *KUBERNETES)
    assert store() == "etcd"
    have(programs, "kine")
    # As k3s has it.
    assert store() == "kine"
    assert store(cluster_init=True) == "etcd"
    assert store(datastore_endpoint="postgres://x") == "kine"
    assert store(datastore_endpoint="https://x:2379") == ""
    # What is there stays, whatever else is installed meanwhile.
    database = tmp_path / "data/server/db"
    (database / "etcd" / "member").mkdir(parents=True)
    assert store() == "etcd"
    (database / "etcd" / "member").rmdir()
    (database / "state.db").write_text("SQLite")
    (programs / "kine").unlink()
    with pytest.raises(errors.UnavailableError, match="kine is not on PATH"):
        store()


def test_a_kubelet_without_a_cluster(tmp_path: Path, programs: Path) -> None:
    """It is asked for: a kubelet on PATH may be one that somebody else starts."""
    with pytest.raises(errors.UnavailableError, match="asks for a kubelet, which is not on PATH"):
        find(tmp_path, kubernetes="kubelet")
    have(programs, "etcd", *KUBERNETES)
    found = find(tmp_path, kubernetes="kubelet")
    assert found is not None
    assert found.programs == {"kubelet": str(programs / "kubelet")}
    for said, flag in (
        ({"server": "https://192.0.2.7:6443"}, "--server"),
        ({"disable_agent": True}, "--disable-agent"),
    ):
        with pytest.raises(errors.UsageError, match=f"and {flag} is about a cluster"):
            find(tmp_path, kubernetes="kubelet", **said)


@pytest.mark.parametrize("trace", ["server/db", "server/made.json", "agent/kubelet.kubeconfig"])
def test_a_kubelet_does_not_leave_its_cluster(tmp_path: Path, programs: Path, trace: str) -> None:
    """To it no pod would be known, and it ends those that it doesn't know."""
    have(programs, "kubelet")
    (tmp_path / "data" / trace).mkdir(parents=True)
    with pytest.raises(errors.FailedPreconditionError, match=f"there is a cluster in .*{trace}"):
        find(tmp_path, kubernetes="kubelet")
