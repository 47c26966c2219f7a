"""The ports of a cluster's programs."""

import asyncio
import socket
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.host import unixsocket
from nixlet.node.cluster import ports
from support import clusters


def test_each_program_has_its_own(tmp_path: Path) -> None:
    cluster = clusters.settings(tmp_path, https_listen_port=7443)
    programs = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy")
    found = list(ports.wanted(cluster, programs))
    assert len({(port.host, port.number) for port in found}) == len(found) == 11
    assert {port.program for port in found} == set(programs)
    assert {port.host for port in found} == {"127.0.0.1", "192.0.2.7"}
    moved = clusters.settings(tmp_path, kube_apiserver_args=("v=2", "secure-port=8443"), kubelet_args=("v=2",))
    assert {port.program for port in ports.wanted(moved, ["kube-apiserver", "kubelet"])} == {"kubelet"}
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
    with pytest.raises(errors.FailedPreconditionError, match="Cannot assign requested address"):
        ports.check([ports.Port("kubelet", "192.0.2.1", 0)])


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
