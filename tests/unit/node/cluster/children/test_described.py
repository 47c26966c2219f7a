"""A cluster's programs as a node's children."""

import dataclasses
import socket
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.cluster import programs
from nixlet.host import supervisor, unixsocket
from nixlet.node.cluster.children import described as children
from nixlet.node.cluster.preflight import finding, ports
from support import clusters

ALL = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy")


def described(directory: Path, datastore: str, *without: str) -> children.Described:
    cluster = dataclasses.replace(clusters.settings(directory), embedded_etcd=datastore == finding.ETCD)
    names = [name for name in (datastore, *ALL) if name and name not in without]
    found = finding.Found({name: f"/bin/{name}" for name in names}, datastore)
    return children.Described(found, cluster)


def agents(made: children.Described, *others: str) -> list[supervisor.Program]:
    return made.of_agent(programs.Node("/run/c.sock"), others)


@pytest.mark.parametrize("datastore", [finding.ETCD, finding.KINE])
def test_who_waits_for_whom(tmp_path: Path, datastore: str) -> None:
    made = described(tmp_path, datastore)
    server = made.of_server()
    waits = {
        each.name: each.waits_for for each in (*server, *agents(made, "containerd", *(one.name for one in server)))
    }
    assert waits == {
        datastore: (),
        "kube-apiserver": (datastore,),
        "kube-controller-manager": ("kube-apiserver",),
        "kube-scheduler": ("kube-apiserver",),
        "kubelet": ("containerd", "kube-apiserver"),
        "kube-proxy": ("kube-apiserver",),
    }
    assert all(each.argv[0] == f"/bin/{each.name}" for each in server)
    assert {each.log_path for each in server} == {f"{tmp_path}/data/agent/logs/{each.name}.log" for each in server}


@pytest.mark.parametrize(("endpoint", "told"), [("", True), ("sqlite://", True), ("mysql://db/k", False)])
def test_of_a_database_elsewhere_no_disk_here_is_to_blame(tmp_path: Path, endpoint: str, told: bool) -> None:
    made = described(tmp_path, finding.KINE)
    made._cluster = dataclasses.replace(made._cluster, datastore_endpoint=endpoint)
    kine = made.of_server()[0]
    assert kine.name == finding.KINE
    assert bool(kine.cause("could not extend file: no space left on device")) is told


def test_none_of_them_ends_the_node_and_each_is_tried_for_ever(tmp_path: Path) -> None:
    made = described(tmp_path, finding.ETCD)
    for each in (*made.of_server(), *agents(made)):
        assert not each.essential
        assert max(each.restart.pause_after(times) for times in range(1, 100)) <= 120


def test_what_is_left_out(tmp_path: Path) -> None:
    made = described(tmp_path, finding.ELSEWHERE, "kube-scheduler", "kube-proxy")
    assert [(each.name, each.waits_for) for each in made.of_server()] == [
        ("kube-apiserver", ()),
        ("kube-controller-manager", ("kube-apiserver",)),
    ]
    # Beside somebody else's containerd.
    assert [(each.name, each.waits_for) for each in agents(made, "kube-apiserver")] == [
        ("kubelet", ("kube-apiserver",))
    ]


async def test_flannel_is_ready_when_it_says_what_it_has_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLANNELD_IP_MASQ", "false")
    made = described(tmp_path, finding.ETCD, "kubelet")
    made._found = dataclasses.replace(made._found, programs={**made._found.programs, "flanneld": "/bin/flanneld"})
    child = made.of_flannel(["--x=y"], ["kube-apiserver"])
    assert (child.name, child.argv, child.waits_for) == ("flanneld", ["/bin/flanneld", "--x=y"], ("kube-apiserver",))
    assert child.env["NODE_NAME"] == "node-1"
    assert "FLANNELD_IP_MASQ" not in child.env
    assert not child.essential
    # What an earlier one has said counts for nothing.
    said = tmp_path / "run/flannel/subnet.env"
    said.parent.mkdir(parents=True)
    said.write_text("FLANNEL_MTU=1450\n")
    monkeypatch.setattr(ports, "check", lambda _: None)
    child.may_start()
    assert not said.exists()


def test_their_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/systemd/notify")
    monkeypatch.setenv("CONTAINERD_HTTP_PROXY", "http://p")
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    (etcd, *_) = described(tmp_path, finding.ETCD).of_server()
    assert not {"NOTIFY_SOCKET", "CONTAINERD_HTTP_PROXY", "NO_PROXY"} & set(etcd.env)
    assert etcd.env["PATH"].endswith(":/usr/sbin:/sbin")
    monkeypatch.setenv("https_proxy", "http://p")
    monkeypatch.setenv("NO_PROXY", "example.com")
    (etcd, *_) = described(tmp_path, finding.ETCD).of_server()
    inside = "127.0.0.1,192.0.2.7,10.42.0.0/16,10.43.0.0/16,.svc,.cluster.local"
    assert (etcd.env["NO_PROXY"], etcd.env["no_proxy"]) == (f"example.com,{inside}", inside)


def test_none_starts_where_a_stranger_would_answer_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        number = stranger.getsockname()[1]
        monkeypatch.setattr(ports, "wanted", lambda _, names: [ports.Port(name, "127.0.0.1", number) for name in names])
        made = described(tmp_path, finding.ETCD)
        for each in (*made.of_server(), *agents(made)):
            with pytest.raises(
                errors.FailedPreconditionError, match=f"^{each.name} can't listen at 127.0.0.1 port {number}: "
            ):
                each.may_start()
    for each in (*made.of_server(), *agents(made)):
        each.may_start()


def test_kine_doesnt_start_where_a_stranger_would_answer_for_it(tmp_path: Path) -> None:
    (kine, *_) = described(tmp_path, finding.KINE).of_server()
    path = clusters.settings(tmp_path).layout.kine_socket
    with (
        unixsocket.listen(path),
        pytest.raises(errors.FailedPreconditionError, match="another process serves that socket"),
    ):
        kine.may_start()
    kine.may_start()


def test_what_etcd_would_not_start_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes each argument from the environment as well, and ends where both say it; a file of settings it takes alone."""
    monkeypatch.setenv("ETCD_NAME", "somebody")
    monkeypatch.setenv("ETCD_CONFIG_FILE", "/etc/etcd.yaml")
    monkeypatch.setenv("ETCD_UNSUPPORTED_ARCH", "arm64")
    etcd, server, *_ = described(tmp_path, finding.ETCD).of_server()
    assert {name for name in etcd.env if name.startswith("ETCD_")} == {"ETCD_UNSUPPORTED_ARCH"}
    assert server.env["ETCD_NAME"] == "somebody"


def test_a_database_s_password_is_in_no_command_line(tmp_path: Path) -> None:
    made = described(tmp_path, finding.KINE)
    made._cluster = dataclasses.replace(made._cluster, datastore_endpoint="mysql://u:se-cret@tcp(db)/k")
    kine, *others = made.of_server(hidden=True)
    assert kine.env["KINE_ENDPOINT"] == "mysql://u:se-cret@tcp(db)/k"
    assert "se-cret" not in "".join(kine.argv)
    assert "se-cret" not in "".join(f"{each.argv}{each.env}" for each in others)
    # One of old takes it by an argument only.
    kine, *_ = made.of_server()
    assert "--endpoint=mysql://u:se-cret@tcp(db)/k" in kine.argv
    assert "KINE_ENDPOINT" not in kine.env
