"""What an agent must be told; how it joins and runs: system/test_agents.py."""

from pathlib import Path
from typing import Any

import pytest

from nixlet import errors
from nixlet.node.cluster import finding, guest, joined, running
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


async def of(directory: Path, **changes: Any) -> running.Cluster:
    said = settings(directory, **changes)
    return await joined.of(said, config.Layout(said.data_dir, said.state_dir), FOUND)


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
        finding.find(said, config.Layout(said.data_dir, said.state_dir))
    (tmp_path / "bin").mkdir()
    for name in ("kubelet", "kube-proxy"):
        (tmp_path / "bin" / name).touch(mode=0o755)
    found = finding.find(said, config.Layout(said.data_dir, said.state_dir))
    assert found is not None
    assert (set(found.programs), found.datastore) == ({"kubelet", "kube-proxy"}, finding.ELSEWHERE)
    assert isinstance(await joined.of(said, config.Layout(said.data_dir, said.state_dir), FOUND), joined.Agent)


async def test_anybody_s_cluster_is_joined_by_a_kubeconfig_or_a_bootstrap_token_where_nobody_of_ours_answers(
    tmp_path: Path,
) -> None:
    assert isinstance(await of(tmp_path, server="", token="", kubeconfig="/k"), guest.Guest)
    port = apiservers.closed_port() - 1
    server = f"https://127.0.0.1:{port}"
    assert isinstance(await of(tmp_path, server=server, token="abcdef.0123456789abcdef"), guest.Guest)
    assert isinstance(await of(tmp_path, server=server, token="password"), joined.Agent)
    tls = apiservers.context(apiservers.made(tmp_path / "cluster"))
    with apiservers.serving(lambda _: apiservers.Reply(body=b"x"), tls) as there:
        ours = f"https://127.0.0.1:{there.port - 1}"
        assert isinstance(await of(tmp_path, server=ours, token="abcdef.0123456789abcdef"), joined.Agent)


async def test_such_a_cluster_brings_its_own_proxy(tmp_path: Path) -> None:
    said = settings(tmp_path, server="", kubeconfig="/k", kubernetes_bin_dir=str(tmp_path))
    (tmp_path / "kubelet").touch(mode=0o755)
    found = finding.find(said, config.Layout(said.data_dir, said.state_dir))
    assert found is not None
    assert set(found.programs) == {"kubelet"}
