"""What an agent must be told; how it joins and runs: system/test_agents.py."""

import asyncio
import contextlib
import dataclasses
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from nixlet import errors
from nixlet.host import children
from nixlet.kubeclient import joinforms, joining, membership
from nixlet.node.cluster.preflight import finding, kernel, ports, versions
from nixlet.node.cluster.roles import agent, guest, member, waiting
from nixlet.node.settings import config
from support import apiservers

FOUND = finding.Found({"kubelet": "/usr/bin/kubelet"}, finding.ELSEWHERE)
PLAIN: dict[str, Any] = {
    "server": "https://192.0.2.7:6443",
    "token": "secret",
    "node_ip": ("192.0.2.9",),
    "node_name": "n",
}


def settings(directory: Path, **changes: Any) -> config.Settings:
    return config.Settings(data_dir=str(directory / "data"), state_dir=str(directory / "run"), **{**PLAIN, **changes})


async def of(directory: Path, *, tell: Callable[[str], None] = lambda _: None, **changes: Any) -> member.Member:
    said = settings(directory, **changes)
    return await agent.of(said, FOUND, tell)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token": ""}, "a node joins a cluster by a token, and there is none"),
        ({"token": "", "agent_token": "x"}, "a node joins a cluster by a token, and there is none"),
        ({"disable_agent": True}, "--disable-agent leaves nothing of an agent"),
        ({"server": "https://192.0.2.7:6443/x"}, "the server's URL has a path"),
        ({"node_name": "A B"}, "'A B' can't be a node's name"),
        ({"node_ip": ("127.0.0.1",)}, "the node's address 127.0.0.1 is a loopback address"),
        ({"token": "", "token_file": "/no/such/file"}, "/no/such/file"),
        ({"server": "", "kubeconfig": "/k", "disable_agent": True}, "--disable-agent leaves nothing of an agent"),
    ],
)
async def test_what_keeps_an_agent_from_joining_is_told_before_anything_is_done(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(errors.NixletError) as caught:
        await of(tmp_path, **changes)
    assert message in caught.value.message
    assert list(tmp_path.iterdir()) == []


async def test_an_agent_needs_a_kubelet_and_a_proxy_and_nothing_of_a_server(tmp_path: Path) -> None:
    said = settings(tmp_path, kubernetes_bin_dir=str(tmp_path / "bin"))
    with pytest.raises(
        errors.UnavailableError, match="--server asks for a cluster, and kubelet, kube-proxy are not in"
    ):
        finding.find(said)
    (tmp_path / "bin").mkdir()
    for name in ("kubelet", "kube-proxy"):
        (tmp_path / "bin" / name).touch(mode=0o755)
    found = finding.find(said)
    assert found is not None
    assert (set(found.programs), found.datastore) == ({"kubelet", "kube-proxy"}, finding.ELSEWHERE)
    assert isinstance(await agent.of(said, FOUND), agent.Agent)


BOOTSTRAP = "abcdef.0123456789abcdef"


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    return apiservers.context(apiservers.made(tmp_path_factory.mktemp("cluster")))


@contextlib.contextmanager
def at(api: int, joining_port: int) -> Iterator[str]:
    """The URL of a server that lets nodes in at another port than usual: any two ports can't be had that follow each other."""
    with mock.patch.object(joinforms, "PORT_ABOVE", joining_port - api):
        yield f"https://127.0.0.1:{api}"


def refused(_: apiservers.Asked) -> apiservers.Reply:
    return apiservers.Reply(401, b'{"kind":"Status","message":"Unauthorized"}')


async def test_anybody_s_cluster_is_joined_by_a_kubeconfig_or_a_bootstrap_token_where_nobody_of_ours_answers(
    tmp_path: Path, tls: ssl.SSLContext
) -> None:
    assert isinstance(await of(tmp_path, server="", token="", kubeconfig="/k"), guest.Guest)
    ours = apiservers.Reply(body=b"x")
    full = apiservers.Reply(503, b'{"message":"the server has no room for one more connection","hint":"try it again"}')
    with apiservers.serving(refused, tls) as api, apiservers.kept_port() as closed:
        with at(api.port, closed) as server:
            assert isinstance(await of(tmp_path, server=server, token=BOOTSTRAP), guest.Guest)
            assert isinstance(await of(tmp_path, server=server, token="password"), agent.Agent)
        with apiservers.serving(refused, tls) as there, at(api.port, there.port) as server:
            assert isinstance(await of(tmp_path, server=server, token=BOOTSTRAP), guest.Guest)
        for reply in (ours, full):
            with (
                apiservers.serving(mock.Mock(return_value=reply), tls) as there,
                at(api.port, there.port) as server,
            ):
                assert isinstance(await of(tmp_path, server=server, token=BOOTSTRAP), agent.Agent)


async def test_who_hangs_up_where_nodes_join_is_asked_again(
    tmp_path: Path, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "_PAUSE", 0.01)
    came = []

    def busy(connection: socket.socket) -> None:
        came.append(1)
        if len(came) < 4:
            # (it has too many already)
            return
        with tls.wrap_socket(connection, server_side=True) as talking:
            talking.recv(4096)
            talking.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nConnection: close\r\n\r\nx")

    with (
        apiservers.serving(refused, tls) as api,
        apiservers.speaking(busy) as there,
        at(api.port, there.port) as server,
    ):
        assert isinstance(await of(tmp_path, server=server, token=BOOTSTRAP), agent.Agent)
        assert len(came) == 4
        came.clear()
        monkeypatch.setattr(agent, "_TRIES", 2)
        assert isinstance(await of(tmp_path, server=server, token=BOOTSTRAP), guest.Guest)


async def test_whose_a_cluster_is_is_waited_for(
    tmp_path: Path, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(waiting, "_PAUSE", 0.01)
    with apiservers.kept_port() as closed, at(closed, closed) as server:
        told: list[str] = []
        going = asyncio.create_task(of(tmp_path, tell=told.append, server=server, token=BOOTSTRAP))
        await said(caplog, "the node waits for its server, which is asked again and again: nothing listens")
        assert not going.done()
        going.cancel()
        assert isinstance((await asyncio.gather(going, return_exceptions=True))[0], asyncio.CancelledError)
        assert "the node waits for its server: nothing listens" in told[0]


async def said(caplog: pytest.LogCaptureFixture, text: str) -> None:
    async with asyncio.timeout(60):
        while text not in caplog.text:
            await asyncio.sleep(0.01)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked of the machine."""
    monkeypatch.setattr(waiting, "_PAUSE", 0.01)
    monkeypatch.setattr(kernel, "prepare", mock.AsyncMock())
    monkeypatch.setattr(versions, "ask", mock.AsyncMock(return_value={"kubelet": "1.36.3"}))
    monkeypatch.setattr(ports, "free", mock.AsyncMock())


@pytest.mark.usefixtures("alone")
async def test_a_server_that_is_not_up_yet_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    facts = joinforms.ClusterFacts(("10.99.0.0/16",), ("10.43.0.0/16",), ("10.43.0.10",), "cluster.local", "none", 6443)
    nobody = errors.UnavailableError("nothing listens there")
    busy = errors.DeadlineExceededError("it hasn't answered")
    join = mock.Mock(side_effect=[nobody, nobody, busy, nobody, facts])
    monkeypatch.setattr(joining, "join", join)
    told: list[str] = []
    node = await of(tmp_path, tell=told.append)
    async with contextlib.AsyncExitStack() as stack, children.kept_running() as kept:
        await node.begin(stack, kept)
    assert join.call_count == 5
    # The service manager's line is for the last who has said something: each time anew.
    assert [each.partition(": ")[2] for each in told] == [each.message for each in (nobody, nobody, busy, nobody)]
    assert str(node._cluster.cluster_cidrs[0]) == "10.99.0.0/16"
    # Each time that something else is wrong.
    lines = [each.getMessage() for each in caplog.records if "asked again" in each.getMessage()]
    assert [line.rpartition(": ")[2] for line in lines] == [nobody.message, busy.message, nobody.message]


@pytest.mark.usefixtures("alone")
async def test_the_kernel_hands_on_packets_of_the_version_that_the_cluster_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = joinforms.ClusterFacts(
        ("fd00:42::/56",), ("fd00:43::/112",), ("fd00:43::a",), "cluster.local", "none", 6443
    )
    monkeypatch.setattr(joining, "join", mock.Mock(return_value=facts))
    node = await of(tmp_path, node_ip=("fd00::9",), server="https://[fd00::7]:6443")
    async with contextlib.AsyncExitStack() as stack, children.kept_running() as kept:
        await node.begin(stack, kept)
    prepare = kernel.prepare
    assert isinstance(prepare, mock.AsyncMock)
    prepare.assert_awaited_once_with({6})


@pytest.mark.usefixtures("alone")
async def test_a_full_disk_keeps_no_node_from_starting_that_has_joined_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    facts = joinforms.ClusterFacts(("10.99.0.0/16",), ("10.43.0.0/16",), ("10.43.0.10",), "cluster.local", "none", 6443)
    full = errors.ResourceExhaustedError("client-kubelet.crt can't be written: No space left on device")
    monkeypatch.setattr(joining, "join", mock.Mock(side_effect=full))
    node = await of(tmp_path)
    async with contextlib.AsyncExitStack() as stack, children.kept_running() as kept:
        with pytest.raises(errors.ResourceExhaustedError):
            await node.begin(stack, kept)
        monkeypatch.setattr(membership, "remembered", mock.Mock(return_value=facts))
        await node.begin(stack, kept)
    assert str(node._cluster.cluster_cidrs[0]) == "10.99.0.0/16"
    assert "starts with what it has from before: client-kubelet.crt can't be written" in caplog.text


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    "error",
    [
        errors.PermissionDeniedError("the token is wrong"),
        errors.FailedPreconditionError("its certificate isn't good"),
        joining.NotOursError("it is somebody else's"),
    ],
)
async def test_what_waiting_doesn_t_mend_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: errors.NixletError
) -> None:
    monkeypatch.setattr(joining, "join", mock.Mock(side_effect=error))
    node = await of(tmp_path)
    async with contextlib.AsyncExitStack() as stack, children.kept_running() as kept:
        with pytest.raises(type(error)):
            await node.begin(stack, kept)


@pytest.mark.usefixtures("alone")
async def test_what_the_machine_lacks_is_told_while_the_server_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "join", mock.Mock(side_effect=errors.UnavailableError("nothing listens there")))
    monkeypatch.setattr(versions, "ask", mock.AsyncMock(side_effect=errors.CommandFailedError("no", returncode=1)))
    node = await of(tmp_path)
    async with contextlib.AsyncExitStack() as stack, children.kept_running() as kept:
        with pytest.raises(errors.CommandFailedError):
            await asyncio.wait_for(node.begin(stack, kept), 60)


@pytest.mark.usefixtures("alone")
async def test_a_node_renews_its_certificates_by_the_token_that_its_file_has_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    join = mock.Mock(return_value=None)
    monkeypatch.setattr(joining, "join", join)
    file = tmp_path / "token"
    file.write_text("before\n")
    node = await of(tmp_path, token="", token_file=str(file))
    file.write_text("after\n")
    assert isinstance(node, agent.Agent)
    await node._asked()
    assert [each.args[2].password for each in join.call_args_list] == ["after"]


@pytest.mark.parametrize(("cluster", "said"), [("none", ""), ("vxlan", ""), ("vxlan", "host-gw"), ("host-gw", "none")])
async def test_how_packets_get_to_other_nodes_is_the_cluster_s_affair(
    tmp_path: Path, cluster: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    facts = joinforms.ClusterFacts((), (), (), "cluster.local", cluster, 6443)
    made = await of(tmp_path, flannel_backend=said)
    assert isinstance(made, agent.Agent)
    if cluster != "none":
        with pytest.raises(
            errors.UnavailableError, match=f"reach each other by flannel \\({cluster}\\), and flanneld is"
        ):
            made._cluster_s_backend(facts)
    made._found = dataclasses.replace(FOUND, programs={**FOUND.programs, "flanneld": "/bin/flanneld"})
    assert made._cluster_s_backend(facts) == cluster
    passed_over = f"flannel-backend {said} is passed over: the cluster's is {cluster}"
    assert (passed_over in caplog.text) == bool(said)
    # Pods of somebody else's containerd are that one's affair.
    other = await of(tmp_path, container_runtime_endpoint="/run/c.sock")
    assert isinstance(other, agent.Agent)
    assert other._cluster_s_backend(facts) == "none"


async def test_such_a_cluster_brings_its_own_proxy(tmp_path: Path) -> None:
    said = settings(tmp_path, server="", kubeconfig="/k", kubernetes_bin_dir=str(tmp_path))
    (tmp_path / "kubelet").touch(mode=0o755)
    found = finding.find(said)
    assert found is not None
    assert set(found.programs) == {"kubelet"}
