"""The ports of a cluster's programs."""

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest

from nixlet import errors
from nixlet.host import unixsocket
from nixlet.node.cluster.preflight import ports
from support import clusters


def test_each_program_has_its_own(tmp_path: Path) -> None:
    cluster = clusters.settings(tmp_path, https_listen_port=7443)
    programs = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy")
    found = list(ports.wanted(cluster, programs))
    assert len({(port.host, port.number) for port in found}) == len(found) == 11
    assert {port.program for port in found} == set(programs)
    assert {port.host for port in found} == {"127.0.0.1", "192.0.2.7"}
    assert list(ports.wanted(cluster, ["kube-apiserver"])) == [("kube-apiserver", "192.0.2.7", 7443, "")]


def test_where_nodes_join_is_a_server_s_own(tmp_path: Path) -> None:
    cluster = clusters.settings(tmp_path, https_listen_port=7443)
    assert ports.of_node(cluster, ["kubelet"]) == list(ports.wanted(cluster, ["kubelet"]))
    (port,) = set(ports.of_node(cluster, ["kube-apiserver"])) - set(ports.wanted(cluster, ["kube-apiserver"]))
    assert (port.host, port.number) == ("192.0.2.7", 7444)
    with socket.create_server(("127.0.0.1", 0)) as somebody:
        taken = port._replace(host="127.0.0.1", number=somebody.getsockname()[1])
        with pytest.raises(errors.FailedPreconditionError) as caught:
            ports.check([taken])
    assert caught.value.message == (
        f"nixlet can't listen at 127.0.0.1 port {taken.number}, where nodes join (one above --https-listen-port): "
        "Address already in use"
    )


#: What k3s's users say for their monitoring, and what else moves a program: where it listens then, and where it is asked.
MOVED = [
    ("kubelet", {}, {("192.0.2.7", 10250), ("127.0.0.1", 10248)}, "http://127.0.0.1:10248"),
    (
        "kubelet",
        {"kubelet_args": ("port=10260", "healthz-port=10300", "healthz-bind-address=::")},
        {("192.0.2.7", 10260), ("::", 10300)},
        "http://127.0.0.1:10300",
    ),
    (
        "kubelet",
        {"kubelet_files": ("healthz-port=10300", "port=10260"), "kubelet_args": ("healthz-port=10301",)},
        {("192.0.2.7", 10260), ("127.0.0.1", 10301)},
        "http://127.0.0.1:10301",
    ),
    (
        "kube-scheduler",
        {"kube_scheduler_args": ("--bind-address=0.0.0.0", "secure-port=1", "secure-port=10400")},
        {("0.0.0.0", 10400)},
        "https://127.0.0.1:10400",
    ),
    (
        "kube-controller-manager",
        {"kube_controller_manager_args": ("bind-address=::1",)},
        {("::1", 10257)},
        "https://[::1]:10257",
    ),
    (
        "kube-proxy",
        {"kube_proxy_args": ("metrics-bind-address=0.0.0.0", "healthz-bind-address=[::]:10300", "nodeport-addresses=x")},
        {("0.0.0.0", 10249), ("::", 10300)},
        "http://127.0.0.1:10300",
    ),
    (
        "etcd",
        {"etcd_args": ("listen-metrics-urls=http://192.0.2.7:2381,http://localhost:2399/", "quota-backend-bytes=1")},
        {("127.0.0.1", 2379), ("192.0.2.7", 2379), ("192.0.2.7", 2380), ("192.0.2.7", 2381), ("127.0.0.1", 2399)},
        "http://127.0.0.1:2399",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("program", "changes", "places", "url"), MOVED)
def test_a_program_that_a_person_moves_is_asked_there(
    tmp_path: Path, program: str, changes: dict[str, Any], places: set[tuple[str, int]], url: str
) -> None:
    cluster = clusters.settings(tmp_path, **changes)
    assert {(port.host, port.number) for port in ports.wanted(cluster, [program])} == places
    assert ports.asked(cluster, program) == url


@pytest.mark.parametrize(
    ("program", "changes", "sentence"),
    [
        ("kubelet", {"kubelet_args": ("healthz-port=0",)}, "kubelet doesn't answer for its health on the loopback"),
        ("kube-scheduler", {"kube_scheduler_args": ("bind-address=192.0.2.7",)}, "kube-scheduler doesn't answer for"),
        ("kube-scheduler", {"kube_scheduler_args": ("secure-port=x",)}, "secure-port of kube-scheduler names no port"),
        ("kube-proxy", {"kube_proxy_args": ("healthz-bind-address=:1",)}, "of kube-proxy names no address"),
        ("etcd", {"etcd_args": ("listen-metrics-urls=x",)}, "listen-metrics-urls of etcd names no address"),
    ],
)
def test_a_program_that_could_not_be_asked_is_refused(
    tmp_path: Path, program: str, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(errors.InvalidArgumentError, match=sentence):
        ports.asked(clusters.settings(tmp_path, **changes), program)


async def test_somebody_else_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "_GONE_TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as somebody:
        port = ports.Port("kubelet", "127.0.0.1", somebody.getsockname()[1])
        with pytest.raises(
            errors.FailedPreconditionError, match=f"kubelet can't listen at 127.0.0.1 port {port.number}"
        ):
            await ports.free([port])
    await ports.free([port])
    # The machine hasn't that address (RFC 5737).
    with pytest.raises(errors.FailedPreconditionError, match="Cannot assign requested address") as caught:
        ports.check([ports.Port("kubelet", "192.0.2.1", 0)])
    assert "--node-ip" in caught.value.hint


async def test_a_socket_of_somebody_else_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "_GONE_TIMEOUT", 0.3)
    cluster = clusters.settings(tmp_path)
    (port,) = ports.wanted(cluster, ["kine"])
    assert port == ports.Port("kine", cluster.layout.kine_socket)
    with unixsocket.listen(port.host):
        said = f"^kine can't listen at {port.host}: another process serves that socket$"
        with pytest.raises(errors.FailedPreconditionError, match=said):
            await ports.free([port])
    # What was left behind.
    assert Path(port.host).is_socket()
    await ports.free([port])


async def test_who_is_going_is_waited_for() -> None:
    somebody = socket.create_server(("127.0.0.1", 0))
    port = ports.Port("kubelet", "127.0.0.1", somebody.getsockname()[1])
    waiting = asyncio.create_task(ports.free([port]))
    await asyncio.sleep(0.3)
    assert not waiting.done()
    somebody.close()
    await asyncio.wait_for(waiting, 4)


def test_a_kubelet_without_a_cluster_serves_nobody(tmp_path: Path) -> None:
    alone = clusters.settings(tmp_path, is_standalone=True)
    assert [(port.host, port.number) for port in ports.wanted(alone, ["kubelet"])] == [("127.0.0.1", 10248)]
