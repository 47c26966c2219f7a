"""A node of anybody's cluster before its kubelet runs; with a real cluster: system/test_agents.py."""

import asyncio
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nixlet import errors
from nixlet.cluster import kubeconfigs
from nixlet.cluster.kubeconfigs import Credentials, Kubeconfig
from nixlet.cluster.settings import ClusterSettings
from nixlet.kubeclient.calls import Call
from nixlet.node.cluster.preflight import finding
from nixlet.node.cluster.roles import guest, waiting
from nixlet.node.settings import config
from support import apiservers, clusters

FOUND = finding.Found({"kubelet": "/usr/bin/kubelet"}, finding.ELSEWHERE)
TOKEN = "abcdef.0123456789abcdef"


class Elsewhere:
    """Somebody's cluster, which says where its DNS is to those whom it knows."""

    def __init__(self) -> None:
        self.known = True
        self.says: dict[str, str] | None = {"kubelet": "clusterDNS: [10.96.0.10]\nclusterDomain: example.org\n"}

    def answer(self, asked: apiservers.Asked) -> apiservers.Reply:
        if not (asked.client or (self.known and asked.headers.get("Authorization") == f"Bearer {TOKEN}")):
            return apiservers.Reply(401, b'{"kind":"Status","message":"Unauthorized","code":401}')
        if self.says is None:
            return apiservers.Reply(404, b'{"kind":"Status","reason":"NotFound","code":404}')
        return apiservers.Reply(body=json.dumps({"data": self.says}).encode())


@pytest.fixture
def made(tmp_path: Path) -> ClusterSettings:
    return apiservers.made(tmp_path / "there", node_ips=(apiservers.LOOPBACK,))


@pytest.fixture
def elsewhere() -> Elsewhere:
    return Elsewhere()


@pytest.fixture
def server(made: ClusterSettings, elsewhere: Elsewhere) -> Iterator[apiservers.Server]:
    with apiservers.serving(elsewhere.answer, apiservers.context(made)) as running:
        yield running


class Node:
    """A node's directory."""

    def __init__(self, directory: Path) -> None:
        self.settings = config.Settings(data_dir=str(directory / "data"), state_dir=str(directory / "run"))
        self.cluster = clusters.settings(directory)
        self.places = self.cluster.layout
        self.file = str(directory / "bootstrap.kubeconfig")

    def told(self, made: ClusterSettings, server: apiservers.Server, **changes: Any) -> None:
        """Write the file that a person has."""
        authority = Path(made.layout.tls("server-ca.crt")).read_bytes()
        said = {"authority_data": authority, "credentials": Credentials(token=TOKEN), **changes}
        kubeconfigs.write(self.file, Kubeconfig(server.url(), **said))

    def joined(self, made: ClusterSettings, server: apiservers.Server) -> None:
        """What a kubelet leaves that has got its certificate."""
        stem = made.layout.node("client-kubelet")
        config_ = Kubeconfig(
            server.url(), made.layout.tls("server-ca.crt"), credentials=Credentials(f"{stem}.crt", f"{stem}.key")
        )
        kubeconfigs.write(self.places.node("kubelet.kubeconfig"), config_)

    def prepare(self) -> ClusterSettings:
        """What the kubelet is told."""
        node = guest.Guest(self.settings, FOUND, self.cluster, self.file, lambda _: guest.read(self.file))
        node._write(Call())
        return node._cluster


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def dns(cluster: ClusterSettings) -> tuple[list[str], str]:
    return [str(each) for each in cluster.dns_addresses], cluster.cluster_domain


def test_pods_ask_the_cluster_s_dns_also_after_the_token_has_ended_and_while_it_is_away(
    made: ClusterSettings, elsewhere: Elsewhere, node: Node
) -> None:
    with apiservers.serving(elsewhere.answer, apiservers.context(made)) as server:
        node.told(made, server)
        assert dns(node.prepare()) == (["10.96.0.10"], "example.org")
        assert os.stat(node.places.node("bootstrap.kubeconfig")).st_mode & 0o777 == 0o600
        node.joined(made, server)
        elsewhere.known = False
        # It asks by its own certificate, and hears what is new.
        elsewhere.says = {"kubelet": "clusterDNS: [10.96.0.11]\n"}
        assert dns(node.prepare()) == (["10.96.0.11"], "cluster.local")
        # What the cluster doesn't say any more is as it was.
        elsewhere.says = None
        assert dns(node.prepare()) == (["10.96.0.11"], "cluster.local")
    assert dns(node.prepare()) == (["10.96.0.11"], "cluster.local")
    # The file was for joining.
    os.unlink(node.file)
    assert dns(node.prepare()) == (["10.96.0.11"], "cluster.local")


def test_what_a_person_says_of_dns_counts_more(made: ClusterSettings, server: apiservers.Server, node: Node) -> None:
    node.told(made, server)
    node.settings = config.Settings(
        data_dir=node.settings.data_dir, state_dir=node.settings.state_dir, cluster_dns=("10.43.0.77",)
    )
    assert dns(node.prepare()) == dns(node.cluster)


def test_a_kubelet_of_another_cluster_is_not_taken_for_one_of_this(
    made: ClusterSettings, server: apiservers.Server, node: Node, tmp_path: Path
) -> None:
    other = apiservers.made(tmp_path / "other", node_ips=(apiservers.LOOPBACK,))
    node.joined(other, server)
    node.told(made, server)
    with pytest.raises(errors.FailedPreconditionError, match="has another certificate authority than that at"):
        node.prepare()
    assert not os.path.exists(node.places.node("client-ca.crt"))
    # As it is told.
    os.unlink(node.places.node("kubelet.kubeconfig"))
    node.prepare()


def test_a_server_s_node_is_nobody_s_guest(made: ClusterSettings, server: apiservers.Server, node: Node) -> None:
    node.told(made, server)
    node.cluster = made
    before = Path(made.layout.node("client-ca.crt")).read_bytes()
    with pytest.raises(errors.FailedPreconditionError, match="is a server's"):
        node.prepare()
    assert Path(made.layout.node("client-ca.crt")).read_bytes() == before


def test_who_has_joined_nothing_needs_to_be_let_in(
    made: ClusterSettings, server: apiservers.Server, elsewhere: Elsewhere, node: Node
) -> None:
    with pytest.raises(errors.NotFoundError, match=r"bootstrap\.kubeconfig is not there"):
        node.prepare()
    node.told(made, server, credentials=Credentials())
    with pytest.raises(errors.FailedPreconditionError, match="the kubeconfig names nobody"):
        node.prepare()
    node.told(made, server, authority_data=b"")
    with pytest.raises(errors.FailedPreconditionError, match="names no certificate authority"):
        node.prepare()
    node.told(made, server)
    elsewhere.says = {"kubelet": 'clusterDNS: [10.96.0.10]\nclusterDomain: "evil x"\n'}
    with pytest.raises(errors.FailedPreconditionError, match="is no domain name"):
        node.prepare()


async def test_a_cluster_that_is_not_up_yet_is_waited_for(
    made: ClusterSettings,
    elsewhere: Elsewhere,
    node: Node,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(waiting, "_PAUSE", 0.01)
    found = guest.Guest(node.settings, FOUND, node.cluster, node.file, lambda _: guest.read(node.file))
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(apiservers.kept_port())
        node.told(made, apiservers.Server(port, []))
        going = asyncio.create_task(found._have_credentials())
        async with asyncio.timeout(60):
            while "the node waits for its cluster" not in caplog.text:
                await asyncio.sleep(0.01)
        assert not going.done()
        with apiservers.serving(elsewhere.answer, apiservers.context(made)) as server:
            node.told(made, server)
            await asyncio.wait_for(going, 60)
    assert caplog.text.count("the node waits for its cluster") == 1
    assert guest.is_one(node.places, node.file)
    assert not guest.is_one(node.places, "https://192.0.2.7:6443")


async def test_a_kubelet_that_nobody_has_let_in_yet_is_waited_for(
    node: Node, made: ClusterSettings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    looked: list[int] = []
    told: list[str] = []
    found = guest.Guest(node.settings, FOUND, node.cluster, node.file, lambda _: guest.read(node.file), told.append)
    pem = Path(node.places.node("kubelet/pki/kubelet-client-current.pem"))
    # A kubelet writes at once where its certificate will be.
    own = Kubeconfig("https://127.0.0.1:6443", authority_data=b"x", credentials=Credentials(str(pem), str(pem)))
    kubeconfigs.write(node.places.node("kubelet.kubeconfig"), own)

    async def sleep(_: float) -> None:
        looked.append(1)
        if len(looked) == 700:
            # (somebody approves it)
            node.joined(made, apiservers.Server(6443, []))

    with monkeypatch.context() as patch:
        patch.setattr(asyncio, "sleep", sleep)
        let_in = await found._let_in()
    assert len(looked) == 700
    assert let_in.credentials.certificate == made.layout.node("client-kubelet.crt")
    assert caplog.text.count("the kubelet waits for its certificate") == 2
    assert [each.partition(":")[0] for each in told] == [
        f"the kubelet waits for its certificate, which the cluster hasn't given it for {seconds} s"
        for seconds in (10, 610)
    ]


@pytest.mark.parametrize("left", ["", "x", "clusters: [", "{}"])
def test_what_a_power_cut_leaves_of_a_kubelet_s_file_is_none(
    made: ClusterSettings, server: apiservers.Server, node: Node, caplog: pytest.LogCaptureFixture, left: str
) -> None:
    node.told(made, server)
    node.joined(made, server)
    path = Path(node.places.node("kubelet.kubeconfig"))
    node.prepare()
    assert "anew" not in caplog.text
    path.write_text(left)
    node.prepare()
    assert f"asks for a certificate anew: what {path} leads to isn't good" in caplog.text
    # As one who has nothing yet it has to be let in.
    node.told(made, server, credentials=Credentials())
    with pytest.raises(errors.FailedPreconditionError, match="the kubeconfig names nobody"):
        node.prepare()
