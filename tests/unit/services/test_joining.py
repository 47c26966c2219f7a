"""How nodes join: a server with a cluster's own certificates, the client's part as a node does it, and those who shouldn't get in.

Only the API server behind it is made up; with a real one: system/test_kubeclient.py.
"""

import asyncio
import base64
import contextlib
import dataclasses
import datetime
import ipaddress
import os
import shutil
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest

from nixlet import errors
from nixlet.cluster import certificates, kubeconfigs, signing, standing, tokens
from nixlet.cluster.findings import State
from nixlet.cluster.layout import Layout
from nixlet.cluster.settings import ClusterSettings
from nixlet.cluster.tokens import Token
from nixlet.kubeclient import bootstraptokens, failures, joinforms, joining, membership, nodepasswords
from nixlet.kubeclient.client import Client
from nixlet.services import joining as doors
from nixlet.services import joinserver
from support import apiservers
from support.secretservers import Secrets, refusal

ADDRESSES = (ipaddress.ip_address("192.0.2.9"),)


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


@pytest.fixture(autouse=True)
def _without_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _fd: None)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> ClusterSettings:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _fd: None)
        return apiservers.made(tmp_path_factory.mktemp("cluster"), node_ips=(apiservers.LOOPBACK,))


@pytest.fixture
def cluster(original: ClusterSettings, tmp_path: Path) -> Iterator[ClusterSettings]:
    """A copy for each test, at a port of its own."""
    shutil.copytree(original.data_dir, tmp_path / "data")
    with apiservers.kept_port() as port:
        made = dataclasses.replace(
            original, data_dir=str(tmp_path / "data"), https_listen_port=port - joinforms.PORT_ABOVE
        )
        with open(made.layout.tls("server-ca.crt"), "rb") as file:
            tokens.keep(made.layout, file.read(), agent="agents-only-password")
        yield made


@pytest.fixture
def secrets() -> Secrets:
    return Secrets()


@pytest.fixture
def api(cluster: ClusterSettings, secrets: Secrets) -> Iterator[Client]:
    with (
        apiservers.serving(secrets.answer, apiservers.context(cluster)) as server,
        Client(apiservers.endpoint(cluster, server)) as client,
    ):
        yield client


@pytest.fixture
async def door(cluster: ClusterSettings, api: Client) -> AsyncIterator[None]:
    keeper = doors.Doorkeeper(cluster, api, flannel_backend="host-gw")
    async with joinserver.serve(keeper, cluster):
        yield


def token(cluster: ClusterSettings, name: str = "agent-token") -> Token:
    return tokens.read(os.path.join(cluster.layout.server, name))


class Agent:
    """A node's directory."""

    def __init__(self, directory: Path, name: str = "node-2") -> None:
        self.places = Layout(str(directory / name), "")
        self.name = name

    async def join(self, cluster: ClusterSettings, shown: Token, **changes: str) -> joinforms.ClusterFacts:
        server = changes.get("server", cluster.server_url)
        return await asyncio.to_thread(
            joining.join, self.places, server, shown, changes.get("name", self.name), ADDRESSES
        )

    def files(self) -> set[str]:
        return set(os.listdir(self.places.agent)) if os.path.isdir(self.places.agent) else set()


@pytest.fixture
def agent(tmp_path: Path) -> Agent:
    return Agent(tmp_path)


@pytest.mark.usefixtures("door")
@pytest.mark.parametrize("name", ["token", "node-token", "agent-token"])
async def test_a_node_joins_and_has_all_that_its_programs_need(
    cluster: ClusterSettings, secrets: Secrets, agent: Agent, name: str
) -> None:
    facts = await agent.join(cluster, token(cluster, name))
    assert facts == joinforms.ClusterFacts(
        ("10.42.0.0/16",), ("10.43.0.0/16",), ("10.43.0.10",), "cluster.local", "host-gw", cluster.https_listen_port
    )
    assert agent.files() == {
        "client-ca.crt", "server-ca.crt", "client-kubelet.crt", "client-kubelet.key", "serving-kubelet.crt", "serving-kubelet.key",
        "client-kube-proxy.crt", "client-kube-proxy.key", "kubelet.kubeconfig", "kubeproxy.kubeconfig", "node-password", "cluster.json",
    }  # fmt: skip
    for each in ("client-kubelet.key", "node-password", "cluster.json", "kubelet.kubeconfig"):
        assert os.stat(agent.places.node(each)).st_mode & 0o777 == 0o600
    assert {each.state for each in standing.check(agent.places, now())} == {State.VALID}
    config = kubeconfigs.read(agent.places.node("kubelet.kubeconfig"))
    assert config.server == cluster.server_url
    leaf = signing.read_certificates(config.credentials.certificate)
    assert leaf is not None
    assert signing.subject_of(leaf[0]).common_name == "system:node:node-2"
    # Of the node's password the cluster has a hash.
    kept = secrets.data("node-2.node-password.nixlet")["hash"]
    password = Path(agent.places.node("node-password")).read_text().strip()
    assert password not in kept
    assert nodepasswords.fits(password, kept)


@pytest.mark.usefixtures("door")
async def test_a_node_comes_back_with_its_keys_and_new_certificates(cluster: ClusterSettings, agent: Agent) -> None:
    await agent.join(cluster, token(cluster))
    before = {each: Path(agent.places.node(each)).read_bytes() for each in agent.files()}
    await agent.join(cluster, token(cluster))
    after = {each: Path(agent.places.node(each)).read_bytes() for each in agent.files()}
    changed = {each for each in after if after[each] != before[each]}
    assert changed == {"client-kubelet.crt", "serving-kubelet.crt", "client-kube-proxy.crt"}


@pytest.mark.usefixtures("door")
async def test_what_a_killed_joining_left_goes_and_keys_are_the_node_s_alone(
    cluster: ClusterSettings, agent: Agent
) -> None:
    await agent.join(cluster, token(cluster))
    before = agent.files()
    for name in before:
        Path(agent.places.node(f".{name}.abcdefgh")).write_text("half")
    # (as somebody brings it back from a backup)
    key = Path(agent.places.node("client-kubelet.key"))
    key.chmod(0o644)
    await agent.join(cluster, token(cluster))
    assert agent.files() == before
    assert key.stat().st_mode & 0o777 == 0o600


@pytest.mark.usefixtures("door")
async def test_nobody_takes_a_node_s_name(
    cluster: ClusterSettings, secrets: Secrets, agent: Agent, tmp_path: Path
) -> None:
    other = Agent(tmp_path / "other")
    await agent.join(cluster, token(cluster))
    secrets.nodes.add("node-2")
    with pytest.raises(errors.PermissionDeniedError, match="there is a node node-2 already") as caught:
        await other.join(cluster, token(cluster))
    assert "kubectl delete node node-2" in caught.value.hint
    assert "client-kubelet.crt" not in other.files()
    # When it is gone its name is free; who had it before has to have another one.
    secrets.nodes.clear()
    await other.join(cluster, token(cluster))
    secrets.nodes.add("node-2")
    with pytest.raises(errors.PermissionDeniedError):
        await agent.join(cluster, token(cluster))


@pytest.mark.usefixtures("door")
async def test_a_name_that_was_just_given_is_no_other_s_although_there_is_no_node_yet(
    cluster: ClusterSettings, secrets: Secrets, agent: Agent, tmp_path: Path
) -> None:
    secrets.made_at = now().isoformat()
    await agent.join(cluster, token(cluster))
    with pytest.raises(errors.PermissionDeniedError, match="there is a node node-2 already"):
        await Agent(tmp_path / "other").join(cluster, token(cluster))


SECRET = "node-2.node-password.nixlet"


@pytest.mark.usefixtures("door")
async def test_who_joins_again_after_long_keeps_the_name_until_its_node_is_there(
    cluster: ClusterSettings, secrets: Secrets, agent: Agent, tmp_path: Path
) -> None:
    other = Agent(tmp_path / "other")
    await agent.join(cluster, token(cluster))
    # (its Secret is old, its Node was deleted, and it starts anew)
    await agent.join(cluster, token(cluster))
    with pytest.raises(errors.PermissionDeniedError, match="there is a node node-2 already") as caught:
        await other.join(cluster, token(cluster))
    assert "5 minutes after its last start" in caught.value.hint
    await agent.join(cluster, token(cluster))
    # After a while without its Node the name is free all the same.
    secrets.held[SECRET]["metadata"]["annotations"]["nixlet.io/joined"] = "2026-01-02T00:00:00Z"
    await other.join(cluster, token(cluster))


async def test_two_joinings_of_a_node_at_once_are_one_s(cluster: ClusterSettings) -> None:
    secrets = Secrets()

    def answer(asked: apiservers.Asked) -> apiservers.Reply:
        if asked.method == "PATCH":
            secrets.held[SECRET]["metadata"]["resourceVersion"] = "77"
        return secrets.answer(asked)

    with (
        apiservers.serving(answer, apiservers.context(cluster)) as server,
        Client(apiservers.endpoint(cluster, server)) as client,
    ):
        for _ in range(2):
            nodepasswords.claim(client, "node-2", "0123456789abcdef")
    assert [each.method for each in server.asked] == ["GET", "GET", "POST", "GET", "PATCH", "GET"]


async def test_a_secret_that_goes_while_a_node_joins_is_made_anew(cluster: ClusterSettings) -> None:
    secrets = Secrets()

    def answer(asked: apiservers.Asked) -> apiservers.Reply:
        if asked.method == "PATCH":
            secrets.held.clear()
        return secrets.answer(asked)

    with (
        apiservers.serving(answer, apiservers.context(cluster)) as server,
        Client(apiservers.endpoint(cluster, server)) as client,
    ):
        for _ in range(2):
            nodepasswords.claim(client, "node-2", "0123456789abcdef")
    assert SECRET in secrets.held


@pytest.mark.usefixtures("door")
async def test_another_node_s_address_is_nobody_else_s(
    cluster: ClusterSettings, secrets: Secrets, agent: Agent
) -> None:
    secrets.nodes |= {"worker-1", "worker-2"}
    secrets.addresses = {"worker-1": "192.0.2.9", "worker-2": "192.0.2.8"}
    with pytest.raises(errors.InvalidArgumentError, match=r"the address 192\.0\.2\.9 is that of the node worker-1"):
        await agent.join(cluster, token(cluster))
    assert secrets.held == {}
    # Its own it has.
    secrets.nodes.remove("worker-1")
    await agent.join(cluster, token(cluster))
    secrets.nodes.add("node-2")
    secrets.addresses["node-2"] = "192.0.2.9"
    await agent.join(cluster, token(cluster))


@pytest.mark.usefixtures("door")
async def test_a_node_that_is_there_by_another_way_keeps_its_name(
    cluster: ClusterSettings, secrets: Secrets, agent: Agent
) -> None:
    secrets.nodes.add("node-2")
    with pytest.raises(errors.PermissionDeniedError, match="there is a node node-2 already"):
        await agent.join(cluster, token(cluster))
    assert secrets.held == {}


@pytest.mark.usefixtures("door")
@pytest.mark.parametrize("damaged", [True, False])
async def test_a_node_whose_secret_is_lost_is_told_how_it_comes_in_again(
    cluster: ClusterSettings, secrets: Secrets, agent: Agent, damaged: bool
) -> None:
    await agent.join(cluster, token(cluster))
    secrets.nodes.add("node-2")
    secrets.held[SECRET]["data"] = {"hash": "!!"}
    if not damaged:
        del secrets.held[SECRET]
    with pytest.raises(errors.NixletError, match=f"Secret kube-system/{SECRET}") as caught:
        await agent.join(cluster, token(cluster))
    assert "kubectl delete node node-2" in caught.value.hint
    assert (f"delete secret {SECRET};" in caught.value.hint) is damaged
    # As it is told.
    secrets.nodes.clear()
    secrets.held.clear()
    await agent.join(cluster, token(cluster))


@pytest.mark.usefixtures("door")
@pytest.mark.parametrize("name", ["node-1", "kubernetes", "dns.kube-system.svc", "A", ""])
async def test_names_that_are_no_node_s_are_refused(
    cluster: ClusterSettings, secrets: Secrets, agent: Agent, name: str
) -> None:
    with pytest.raises(errors.InvalidArgumentError, match="doesn't let this node in"):
        await agent.join(cluster, token(cluster), name=name)
    assert secrets.held == {}


@pytest.mark.usefixtures("door")
async def test_a_wrong_token_is_refused_and_told(cluster: ClusterSettings, secrets: Secrets, agent: Agent) -> None:
    good = token(cluster)
    for wrong in (
        dataclasses.replace(good, password="another"),
        dataclasses.replace(good, password=good.password + "x"),
        Token("abcdef", "0123456789abcdef", good.authority, bootstrap=True),
    ):
        with pytest.raises(errors.PermissionDeniedError, match="the token is wrong, or has ended") as caught:
            await agent.join(cluster, wrong)
        assert wrong.password not in f"{caught.value}{caught.value.hint}"
    assert secrets.held == {}
    assert "client-kubelet.crt" not in agent.files()


@pytest.mark.usefixtures("door")
async def test_a_token_for_another_authority_is_shown_to_nobody(
    cluster: ClusterSettings, agent: Agent, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = dataclasses.replace(token(cluster), authority="0" * 64)
    with pytest.raises(errors.PermissionDeniedError, match="another certificate authority than the one that the token"):
        await agent.join(cluster, wrong)
    assert agent.files() == set()
    assert "wrong token" not in caplog.text


@pytest.mark.usefixtures("door")
async def test_a_token_without_a_hash_believes_whoever_answers_and_says_so(
    cluster: ClusterSettings, agent: Agent, caplog: pytest.LogCaptureFixture
) -> None:
    await agent.join(cluster, tokens.parse(token(cluster).password))
    assert "the token has no hash of the cluster's authority" in caplog.text


async def test_a_short_token_leads_to_the_cluster_that_the_node_has_joined(
    cluster: ClusterSettings, api: Client, agent: Agent, tmp_path: Path
) -> None:
    short = Token("", token(cluster).password)
    async with joinserver.serve(doors.Doorkeeper(cluster, api), cluster):
        await agent.join(cluster, short)
        await agent.join(cluster, short)
    other = apiservers.made(tmp_path / "other", node_ips=(apiservers.LOOPBACK,))
    other = dataclasses.replace(other, https_listen_port=cluster.https_listen_port)
    authority = Path(other.layout.tls("server-ca.crt")).read_bytes()
    tokens.keep(other.layout, authority, agent="agents-only-password")
    before = {each: Path(agent.places.agent, each).read_bytes() for each in agent.files()}
    async with joinserver.serve(doors.Doorkeeper(other, api), other):
        with pytest.raises(errors.PermissionDeniedError, match="has another certificate authority than the cluster"):
            await agent.join(other, short)
        assert {each: Path(agent.places.agent, each).read_bytes() for each in agent.files()} == before
        Path(agent.places.node("server-ca.crt")).write_text("x")
        with pytest.raises(errors.FailedPreconditionError, match=r"server-ca\.crt holds no certificate"):
            await agent.join(other, short)
        # A whole token says which authority is right.
        await agent.join(other, token(other))
    assert Path(agent.places.node("server-ca.crt")).read_bytes() == authority


async def test_a_welcome_that_isn_t_whole_changes_nothing(cluster: ClusterSettings, api: Client, agent: Agent) -> None:
    class Half(doors.Doorkeeper):
        broken: Callable[[joinforms.Welcome], dict[str, Any]]

        def let_in(self, wish: joinforms.Wish) -> joinforms.Welcome:
            found = super().let_in(wish)
            return msgspec.structs.replace(found, **self.broken(found))

    async with joinserver.serve(doors.Doorkeeper(cluster, api), cluster):
        await agent.join(cluster, token(cluster))
    before = {each: Path(agent.places.agent, each).read_bytes() for each in agent.files()}
    for broken, message in (
        (
            lambda it: {"certificates": {**it.certificates, "client-kube-proxy": ""}},
            "client-kube-proxy.crt holds no certificate",
        ),
        (lambda it: {"authorities": {**it.authorities, "server-ca.crt": ""}}, "sends for server-ca.crt holds no"),
        (lambda it: {"facts": msgspec.structs.replace(it.facts, https_listen_port=-5)}, "port -5 is no port"),
    ):
        keeper = Half(cluster, api)
        keeper.broken = broken
        async with joinserver.serve(keeper, cluster):
            with pytest.raises(errors.FailedPreconditionError, match=message):
                await agent.join(cluster, token(cluster))
        assert {each: Path(agent.places.agent, each).read_bytes() for each in agent.files()} == before


@pytest.mark.parametrize(
    "wrong",
    [
        {"https_listen_port": -5},
        {"https_listen_port": 65536},
        {"cluster_domain": "evil\nx: y"},
        {"flannel_backend": "\x1b[2J"},
        {"cluster_cidrs": ("x",)},
        {"cluster_dns": ("10.43.0.10", "x")},
    ],
)
def test_facts_that_are_none(cluster: ClusterSettings, wrong: dict[str, object]) -> None:
    good = joinforms.ClusterFacts(
        ("10.42.0.0/16",), ("10.43.0.0/16",), ("10.43.0.10",), "cluster.local", "host-gw", 6443
    )
    assert membership.with_facts(cluster, good).https_listen_port == 6443
    with pytest.raises(errors.InvalidArgumentError):
        membership.with_facts(cluster, msgspec.structs.replace(good, **wrong))


@pytest.mark.usefixtures("door")
async def test_a_server_joins_nowhere(cluster: ClusterSettings, agent: Agent) -> None:
    agent.places = cluster.layout
    before = Path(cluster.layout.node("client-kubelet.crt")).read_bytes()
    with pytest.raises(errors.FailedPreconditionError, match="is a server's"):
        await agent.join(cluster, token(cluster))
    assert Path(cluster.layout.node("client-kubelet.crt")).read_bytes() == before


@pytest.mark.usefixtures("door")
async def test_bootstrap_tokens_let_in_as_long_as_they_are_good(
    cluster: ClusterSettings, api: Client, tmp_path: Path
) -> None:
    authority = token(cluster).authority
    # (one that had joined before would be known by its certificate)
    new_agents = (Agent(tmp_path, f"node-{number}") for number in range(2, 9))

    async def join(**changes: Any) -> None:
        agent = next(new_agents)
        made = tokens.new_bootstrap()
        new = bootstraptokens.BootstrapToken(made.user, made.password, **changes)
        await asyncio.to_thread(bootstraptokens.add, api, new)
        await agent.join(cluster, dataclasses.replace(made, authority=authority))

    await join()
    await join(expires=now() + datetime.timedelta(hours=1))
    for changes in (
        {"expires": now() - datetime.timedelta(seconds=10)},
        {"usages": ("signing",), "groups": ()},
        {"groups": ("system:bootstrappers:others",)},
    ):
        with pytest.raises(errors.PermissionDeniedError, match="the token is wrong, or has ended"):
            await join(**changes)


async def ended(cluster: ClusterSettings, api: Client, agent: Agent) -> Token:
    """Have an agent join by a bootstrap token, which ends then; the token."""
    made = tokens.new_bootstrap()
    new = bootstraptokens.BootstrapToken(made.user, made.password)
    await asyncio.to_thread(bootstraptokens.add, api, new)
    shown = dataclasses.replace(made, authority=token(cluster).authority)
    await agent.join(cluster, shown)
    await asyncio.to_thread(bootstraptokens.remove, api, made.user)
    return shown


@pytest.mark.usefixtures("door")
async def test_a_node_stays_when_its_token_has_ended(
    cluster: ClusterSettings, api: Client, secrets: Secrets, agent: Agent, caplog: pytest.LogCaptureFixture
) -> None:
    shown = await ended(cluster, api, agent)
    secrets.nodes.add("node-2")
    before = Path(agent.places.node("client-kubelet.crt")).read_bytes()
    await agent.join(cluster, shown)
    assert "the token isn't good any more" in caplog.text
    assert shown.password not in caplog.text
    assert Path(agent.places.node("client-kubelet.crt")).read_bytes() != before


@pytest.mark.usefixtures("door")
async def test_a_certificate_is_for_its_own_node_and_no_way_past_its_password(
    cluster: ClusterSettings, api: Client, secrets: Secrets, agent: Agent, tmp_path: Path
) -> None:
    shown = await ended(cluster, api, agent)
    secrets.nodes.add("node-2")
    with pytest.raises(errors.PermissionDeniedError, match="the token is wrong, or has ended"):
        await agent.join(cluster, shown, name="node-3")
    # Who has its certificate and key, and not its password.
    Path(agent.places.node("node-password")).write_text("0123456789abcdef0123456789abcdef\n")
    with pytest.raises(errors.PermissionDeniedError, match="there is a node node-2 already"):
        await agent.join(cluster, shown)
    # Another cluster's node.
    other = apiservers.made(tmp_path / "other", node_name="node-2", node_ips=(apiservers.LOOPBACK,))
    for end in ("crt", "key"):
        shutil.copy(other.layout.node(f"client-kubelet.{end}"), agent.places.node(f"client-kubelet.{end}"))
    with pytest.raises(errors.PermissionDeniedError, match="the token is wrong, or has ended"):
        await agent.join(cluster, shown)


@pytest.mark.usefixtures("door")
@pytest.mark.parametrize(
    ("client", "node", "status"),
    [
        ("client-kubelet", "node-2", b"403"),
        ("client-kube-proxy", "node-1", b"401"),
        ("client-admin", "node-1", b"401"),
    ],
)
async def test_whom_a_certificate_is_for_is_looked_at(
    cluster: ClusterSettings, secrets: Secrets, client: str, node: str, status: bytes
) -> None:
    places = cluster.layout
    stem = places.tls(client) if client == "client-admin" else places.node(client)
    wish = joinforms.Wish(node, ("192.0.2.9",), "0123456789abcdef", {})
    text = posted(cluster, msgspec.json.encode(wish), authorization="").replace(b"Authorization: \r\n", b"")
    found = await exchanged(cluster, text, (f"{stem}.crt", f"{stem}.key"))
    assert found.split(b" ", 2)[1] == status
    assert secrets.held == {}


async def test_a_server_of_ours_is_known_also_where_it_lets_nobody_in(cluster: ClusterSettings, api: Client) -> None:
    url = cluster.server_url
    assert not await asyncio.to_thread(joining.is_ours, url)
    async with joinserver.serve(doors.Doorkeeper(cluster, api), cluster):
        assert await asyncio.to_thread(joining.is_ours, url)
        # It is broken.
        os.rename(cluster.layout.tls("server-ca.crt"), cluster.layout.tls("server-ca.away"))
        assert await asyncio.to_thread(joining.is_ours, url)
    # Somebody else's API server, and a proxy that finds nobody.
    for code, body in (
        (503, b'{"message":' + b"[" * 100_000),
        (401, b'{"kind":"Status","message":"no","code":401}'),
        (503, b'{"kind":"Status","message":"no"}'),
        (503, b"<html>"),
    ):
        reply = apiservers.Reply(code, body)
        with apiservers.serving(mock.Mock(return_value=reply), apiservers.context(cluster)) as server:
            url = f"https://127.0.0.1:{server.port - joinforms.PORT_ABOVE}"
            assert not await asyncio.to_thread(joining.is_ours, url)


async def test_who_hangs_up_is_nobody_yet(cluster: ClusterSettings) -> None:
    def hang_up(connection: socket.socket) -> None:
        connection.recv(1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with apiservers.speaking(hang_up) as server, pytest.raises(errors.UnavailableError):
        await asyncio.to_thread(joining.is_ours, f"https://127.0.0.1:{server.port - joinforms.PORT_ABOVE}")


async def test_nothing_answers(cluster: ClusterSettings, agent: Agent) -> None:
    with pytest.raises(errors.UnavailableError, match="nothing listens where the server at"):
        await agent.join(cluster, token(cluster))


async def test_another_server_answers(cluster: ClusterSettings, agent: Agent) -> None:
    with apiservers.serving(lambda _: apiservers.Reply(401), apiservers.context(cluster)) as server:
        url = f"https://127.0.0.1:{server.port - joinforms.PORT_ABOVE}"
        with pytest.raises(errors.UnavailableError, match="is no server of nixlet's that nodes join at"):
            await agent.join(cluster, token(cluster), server=url)


async def test_a_welcome_that_is_nested_too_deep_is_nobody_s(cluster: ClusterSettings, agent: Agent) -> None:
    authority = Path(cluster.layout.tls("server-ca.crt")).read_bytes()

    def answer(asked: apiservers.Asked) -> apiservers.Reply:
        return apiservers.Reply(body=authority if asked.method == "GET" else b'{"x":' + b"[" * 100_000)

    with apiservers.serving(answer, apiservers.context(cluster)) as server:
        url = f"https://127.0.0.1:{server.port - joinforms.PORT_ABOVE}"
        with pytest.raises(joining.NotOursError):
            await agent.join(cluster, token(cluster), server=url)


async def test_who_repeats_the_authority_without_its_key_is_shown_no_token(
    cluster: ClusterSettings, agent: Agent, tmp_path: Path
) -> None:
    """Somebody between us and the server, who hands out the right authority, and has a certificate of another one."""
    other = apiservers.made(tmp_path / "other", node_ips=(apiservers.LOOPBACK,))
    authority = Path(cluster.layout.tls("server-ca.crt")).read_bytes()
    with apiservers.serving(lambda _: apiservers.Reply(body=authority), apiservers.context(other)) as server:
        url = f"https://127.0.0.1:{server.port - joinforms.PORT_ABOVE}"
        with pytest.raises(failures.StrangerError, match="signed by an authority that isn't known here"):
            await agent.join(cluster, token(cluster), server=url)
        assert [(each.method, each.path, "Authorization" in each.headers) for each in server.asked] == [
            ("GET", "/cacerts", False)
        ]


@pytest.mark.parametrize(("days", "message"), [(-400, "has ended"), (3, "isn't valid yet")])
async def test_a_server_s_certificate_outside_of_its_time(
    cluster: ClusterSettings, api: Client, agent: Agent, days: int, message: str
) -> None:
    then = now() + datetime.timedelta(days=days)
    shutil.rmtree(cluster.layout.tls(""))
    shutil.rmtree(cluster.layout.agent)
    certificates.ensure(cluster, min(then, now()))
    if days > 0:
        certificates.rotate(cluster, ["api-server"], then)
    authority = tokens.authority_hash(Path(cluster.layout.tls("server-ca.crt")).read_bytes())
    shown = dataclasses.replace(token(cluster), authority=authority)
    async with joinserver.serve(doors.Doorkeeper(cluster, api), cluster):
        with pytest.raises(failures.StrangerError, match=message):
            await agent.join(cluster, shown)


@pytest.mark.usefixtures("door")
async def test_while_the_api_server_is_away_it_is_told(
    cluster: ClusterSettings, secrets: Secrets, agent: Agent
) -> None:
    secrets.down = True
    with pytest.raises(errors.UnavailableError, match="doesn't let this node in: the API server answered"):
        await agent.join(cluster, token(cluster))


async def test_a_node_starts_with_what_it_has_while_the_server_is_away(
    cluster: ClusterSettings, api: Client, agent: Agent
) -> None:
    assert membership.remembered(agent.places, cluster.server_url, "node-2", now()) is None
    async with joinserver.serve(doors.Doorkeeper(cluster, api), cluster):
        facts = await agent.join(cluster, token(cluster))
    places, server = agent.places, cluster.server_url
    assert membership.remembered(places, server, "node-2", now()) == facts
    assert membership.remembered(places, server, "node-3", now()) is None
    assert membership.remembered(places, "https://192.0.2.1:6443", "node-2", now()) is None
    assert membership.remembered(places, server, "node-2", now() + datetime.timedelta(days=400)) is None
    os.unlink(places.node("client-kubelet.key"))
    assert membership.remembered(places, server, "node-2", now()) is None
    made = membership.with_facts(cluster, dataclasses_changed(facts))
    assert str(made.cluster_cidrs[0]) == "10.99.0.0/16"


def dataclasses_changed(facts: joinforms.ClusterFacts) -> joinforms.ClusterFacts:
    return msgspec.structs.replace(facts, cluster_cidrs=("10.99.0.0/16",))


@pytest.mark.usefixtures("door")
async def test_a_certificate_that_is_renewed_meanwhile_is_shown_to_the_next(
    cluster: ClusterSettings, agent: Agent
) -> None:
    def serial() -> bytes | None:
        address = ("127.0.0.1", joinserver.port(cluster))
        context = ssl.create_default_context(cafile=cluster.layout.tls("server-ca.crt"))
        with socket.create_connection(address) as plain, context.wrap_socket(plain, server_hostname="127.0.0.1") as tls:
            return tls.getpeercert(binary_form=True)

    before = await asyncio.to_thread(serial)
    certificates.rotate(cluster, ["api-server"], now())
    assert await asyncio.to_thread(serial) != before
    await agent.join(cluster, token(cluster))


Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], "asyncio.Future[bytes]"]


async def exchanged(cluster: ClusterSettings, text: bytes, shown: tuple[str, str] | None = None) -> bytes:
    """What a server answers to some bytes, of one who shows a certificate or none."""
    context = ssl.create_default_context(cafile=cluster.layout.node("server-ca.crt"))
    if shown is not None:
        context.load_cert_chain(*shown)
    reader, writer = await asyncio.open_connection("127.0.0.1", joinserver.port(cluster), ssl=context)
    try:
        writer.write(text)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        return await reader.read()
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            await writer.wait_closed()


def posted(cluster: ClusterSettings, body: bytes, *, authorization: str | None = None) -> bytes:
    shown = base64.b64encode(token(cluster).credentials().encode()).decode()
    known = f"Basic {shown}" if authorization is None else authorization
    return f"POST /v1/join HTTP/1.1\r\nAuthorization: {known}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@pytest.mark.usefixtures("door")
@pytest.mark.parametrize(
    ("text", "status"),
    [
        (b"GET /cacerts HTTP/1.1\r\n\r\n", 200),
        (b"GET /cacerts?x HTTP/1.1\r\n\r\n", 404),
        (b"GET /v1/join HTTP/1.1\r\n\r\n", 405),
        (b"POST /cacerts HTTP/1.1\r\n\r\n", 405),
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"GET http://x/ HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/2\r\n\r\n", 400),
        (b"\x00\xff\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nA : b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nA: b\r\nA: c\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 20_000 + b"\r\n\r\n", 431),
        (b"POST /v1/join HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST /v1/join HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /v1/join HTTP/1.1\r\nContent-Length: 65537\r\n\r\n", 413),
        (b"POST /v1/join HTTP/1.1\r\n\r\n", 401),
        (b"POST /v1/join HTTP/1.1\r\nAuthorization: Basic !\r\n\r\n", 401),
        (b"POST /v1/join HTTP/1.1\r\nAuthorization: Bearer server:x\r\n\r\n", 401),
        (b"POST /v1/join HTTP/1.1\r\nAuthorization: Bearer K10\r\n\r\n", 401),
    ],
)  # fmt: skip
async def test_requests_that_are_none(cluster: ClusterSettings, text: bytes, status: int) -> None:
    assert (await exchanged(cluster, text)).split(b" ", 2)[1] == str(status).encode()


@pytest.mark.usefixtures("door")
@pytest.mark.parametrize(
    "wish",
    [
        b"",
        b"[]",
        b'{"node": "node-2"}',
        b'{"node": "node-2", "addresses": ["x"], "password": "0123456789abcdef", "requests": {}}',
        b'{"node": "node-2", "addresses": [], "password": "short", "requests": {}}',
        b'{"node": "node-2", "addresses": [], "password": "0123456789abcdef", "requests": {"client-admin": "x"}}',
        b'{"node": "node-2", "addresses": [], "password": "0123456789abcdef", "requests": {"client-kubelet": "x"}}',
        b'{"node": "node-2", "addresses": [], "password": "0123456789abcdef", "requests": {}, "more": 1}',
        b'{"node": "node-2", "addresses": ["10.43.0.1"], "password": "0123456789abcdef", "requests": {"client-kubelet": "x"}}',
    ],
)
async def test_wishes_that_are_none(cluster: ClusterSettings, secrets: Secrets, wish: bytes) -> None:
    found = await exchanged(cluster, posted(cluster, wish))
    assert found.split(b" ", 2)[1] == b"400"
    assert msgspec.json.decode(found.partition(b"\r\n\r\n")[2], type=joinforms.Refusal).message
    assert secrets.held == {}


@pytest.mark.usefixtures("door")
async def test_who_guesses_is_soon_refused_unseen(cluster: ClusterSettings, agent: Agent) -> None:
    for _ in range(10):
        assert b" 401 " in await exchanged(
            cluster, posted(cluster, b"{}", authorization="Bearer abcdef.0123456789abcdef")
        )
    with pytest.raises(errors.UnavailableError, match="too many wrong tokens came from this address"):
        await agent.join(cluster, token(cluster))
    # What is for everybody still is.
    assert b" 200 " in await exchanged(cluster, b"GET /cacerts HTTP/1.1\r\n\r\n")


@pytest.mark.usefixtures("door")
@pytest.mark.parametrize("shown", ["Basic \xe9\xe9", "Basic !", "Bearer \xe9"])
async def test_what_is_no_token_is_a_guess_and_no_mistake(
    cluster: ClusterSettings, caplog: pytest.LogCaptureFixture, shown: str
) -> None:
    text = f"POST /v1/join HTTP/1.1\r\nAuthorization: {shown}\r\n\r\n".encode("latin-1")
    found = [(await exchanged(cluster, text)).split(b" ", 2)[1] for _ in range(11)]
    assert found == [b"401"] * 10 + [b"429"]
    assert "wrong token" in caplog.text
    assert not [each for each in caplog.records if each.exc_info]


@pytest.mark.usefixtures("door")
async def test_strangers_read_nothing_of_the_server_and_don_t_fill_its_log(
    cluster: ClusterSettings, secrets: Secrets, caplog: pytest.LogCaptureFixture
) -> None:
    secrets.down = True
    stranger = posted(cluster, b"", authorization="Bearer abcdef.0123456789abcdef")
    for _ in range(30):
        found = await exchanged(cluster, stranger)
        assert b" 503 " in found
        assert b'"the server can\'t look tokens up now"' in found
        assert b"127.0.0.1" not in found
    assert len(caplog.records) == 20
    assert "the API server answered: ServiceUnavailable" in caplog.text
    os.rename(cluster.layout.tls("server-ca.crt"), cluster.layout.tls("server-ca.away"))
    found = await exchanged(cluster, b"GET /cacerts HTTP/1.1\r\n\r\n")
    assert b'"the server can\'t show its authority now"' in found
    assert cluster.data_dir.encode() not in found
    Path(cluster.layout.server, "token").write_text("K10zz\n")
    found = await exchanged(cluster, posted(cluster, b"", authorization="Basic bm9kZTp4"))
    assert b'"the server can\'t look tokens up now"' in found
    assert cluster.data_dir.encode() not in found


@pytest.mark.usefixtures("door")
async def test_a_server_that_can_t_show_its_authority_is_away(cluster: ClusterSettings, agent: Agent) -> None:
    shown = token(cluster)
    os.rename(cluster.layout.tls("server-ca.crt"), cluster.layout.tls("server-ca.away"))
    with pytest.raises(errors.UnavailableError, match="in: the server can't show its authority now"):
        await agent.join(cluster, shown)


@pytest.mark.parametrize("code", [400, 401, 403, 409, 422])
async def test_what_the_api_server_has_against_the_server_is_not_the_node_s_fault(
    cluster: ClusterSettings, agent: Agent, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    with (
        apiservers.serving(lambda _: refusal(code, "Because"), apiservers.context(cluster)) as server,
        Client(apiservers.endpoint(cluster, server)) as client,
    ):
        async with joinserver.serve(doors.Doorkeeper(cluster, client), cluster):
            with pytest.raises(errors.UnavailableError, match="doesn't let this node in: "):
                await agent.join(cluster, token(cluster))
    assert "node node-2 at 127.0.0.1 can't join: " in caplog.text


@pytest.mark.usefixtures("door")
async def test_a_broken_authority_is_not_the_node_s_fault(
    cluster: ClusterSettings, agent: Agent, secrets: Secrets, caplog: pytest.LogCaptureFixture
) -> None:
    Path(cluster.layout.tls("client-ca.key")).write_text("x")
    with pytest.raises(errors.UnavailableError, match=r"client-ca\.key"):
        await agent.join(cluster, token(cluster))
    assert "node node-2 at 127.0.0.1 can't join: " in caplog.text
    assert secrets.held == {}


@pytest.mark.usefixtures("door")
async def test_a_name_is_looked_at_also_where_no_certificate_is_wanted(
    cluster: ClusterSettings, secrets: Secrets
) -> None:
    wish = b'{"node": "../x", "addresses": [], "password": "0123456789abcdef", "requests": {}}'
    assert b" 400 " in await exchanged(cluster, posted(cluster, wish))
    assert secrets.held == {}


@pytest.mark.usefixtures("door")
async def test_who_is_silent_holds_no_place_and_who_finds_none_is_told(
    cluster: ClusterSettings, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joinserver, "_MAX_CONNECTIONS", 2)
    monkeypatch.setattr(joinserver, "_REQUEST_TIMEOUT", 3.0)
    # (nobody waits for this where all is well)
    monkeypatch.setattr(joinserver, "_ANSWER_TIMEOUT", 3600.0)
    context = ssl.create_default_context(cafile=cluster.layout.tls("server-ca.crt"))
    with contextlib.ExitStack() as silent:

        def come() -> None:
            plain = silent.enter_context(socket.create_connection(("127.0.0.1", joinserver.port(cluster))))
            silent.enter_context(context.wrap_socket(plain, server_hostname="127.0.0.1"))

        for _ in range(2):
            await asyncio.to_thread(come)
        with pytest.raises(errors.UnavailableError, match="the server has no room for one more connection"):
            await agent.join(cluster, token(cluster))
        async with asyncio.timeout(20):
            while True:
                with contextlib.suppress(errors.UnavailableError):
                    await agent.join(cluster, token(cluster))
                    break
                await asyncio.sleep(0.1)


@pytest.mark.usefixtures("door")
async def test_one_address_has_few_connections_and_slow_ones_end(
    cluster: ClusterSettings, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joinserver, "_HANDSHAKE_TIMEOUT", 1.0)
    before = apiservers.open_files()
    idle = [await asyncio.open_connection("127.0.0.1", joinserver.port(cluster)) for _ in range(20)]
    # Twelve are too many, and are closed at once.
    async with asyncio.timeout(30):
        ended = await asyncio.gather(*(reader.read() for reader, _ in idle), return_exceptions=True)
    assert len(ended) == 20
    for _, writer in idle:
        writer.close()
    async with asyncio.timeout(30):
        while apiservers.open_files() > before:
            await asyncio.sleep(0.01)
    await agent.join(cluster, token(cluster))


@pytest.mark.usefixtures("door")
async def test_a_request_that_takes_too_long_is_told(cluster: ClusterSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joinserver, "_REQUEST_TIMEOUT", 0.2)
    assert b" 408 " in await exchanged(cluster, b"GET /cacerts HTTP/1.1\r\n")


async def test_a_port_that_is_taken_is_told(cluster: ClusterSettings, api: Client) -> None:
    with (
        socket.create_server(("127.0.0.1", joinserver.port(cluster))),
        pytest.raises(errors.FailedPreconditionError, match=r"where nodes join: Address already in use"),
    ):
        async with joinserver.serve(doors.Doorkeeper(cluster, api), cluster):
            pass


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("https://192.0.2.7", "https://192.0.2.7:6443"),
        ("https://192.0.2.7:6443/", "https://192.0.2.7:6443"),
        ("https://[2001:db8::7]", "https://[2001:db8::7]:6443"),
        ("https://server.example:443", "https://server.example:443"),
    ],
)
def test_a_server_is_named_with_or_without_its_port(given: str, url: str) -> None:
    assert joining.server_url(given) == url


@pytest.mark.parametrize(
    "given", ["server", "http://127.0.0.1:6443", "https://a/b", "https://u:p@a", "https://a:65535"]
)
def test_a_server_that_is_none(given: str) -> None:
    with pytest.raises(errors.InvalidArgumentError):
        joining.server_url(given)


def test_a_password_that_is_damaged_is_not_replaced(tmp_path: Path) -> None:
    places = Layout(str(tmp_path), "")
    os.makedirs(places.agent)
    Path(places.node("node-password")).write_text("short\n")
    with pytest.raises(errors.FailedPreconditionError, match="holds no node's password"):
        joining._password(places)
