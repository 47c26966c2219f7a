"""The client against a real API server on a real etcd."""

import asyncio
import base64
import contextlib
import dataclasses
import datetime
import ipaddress
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.cli import app
from nixlet.cluster import kubeconfigs, tokens
from nixlet.cluster import settings as model
from nixlet.cluster.layout import Layout
from nixlet.kubeclient import (
    asynchronous,
    bootstraptokens,
    discovery,
    failures,
    following,
    joining,
    nodepasswords,
    resources,
)
from nixlet.kubeclient.client import Client, Object
from nixlet.kubeclient.endpoint import Endpoint
from nixlet.node.cluster.controlplane import bootstrap, nodenames
from nixlet.services import joining as doors
from nixlet.services import joinserver
from support import certifiedplanes, parts
from support.certifiedplanes import ControlPlane


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    # As kubeadm's clusters have it: what a cluster is is told to everybody, signed by each token.
    more = {
        "kube_apiserver_args": ("anonymous-auth=true",),
        "kube_controller_manager_args": ("controllers=*,bootstrapsigner,tokencleaner",),
    }
    with certifiedplanes.running(tmp_path_factory.mktemp("plane"), **more) as made:
        yield made


@pytest.fixture
def client(plane: ControlPlane) -> Iterator[Client]:
    with Client(certifiedplanes.endpoint(plane.settings)) as made:
        yield made


WEBHOOKS = resources.Resource("admissionregistration.k8s.io/v1", "validatingwebhookconfigurations", namespaced=False)


def config_map(name: str, **data: str) -> Object:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


def test_objects_are_made_changed_listed_and_removed(client: Client) -> None:
    made = client.create(resources.CONFIG_MAPS, config_map("a", x="1"), namespace="default")
    assert made["data"] == {"x": "1"}
    with pytest.raises(errors.AlreadyExistsError, match='configmaps "a" already exists'):
        client.create(resources.CONFIG_MAPS, config_map("a"), namespace="default")
    changed = client.patch(resources.CONFIG_MAPS, "a", {"data": {"y": "2", "x": None}}, namespace="default")
    assert changed["data"] == {"y": "2"}
    stale = {"metadata": {"resourceVersion": made["metadata"]["resourceVersion"]}, "data": {"z": "3"}}
    with pytest.raises(failures.ConflictError):
        client.patch(resources.CONFIG_MAPS, "a", stale, namespace="default")
    applied = client.apply(resources.CONFIG_MAPS, "a", config_map("a", y="3"), namespace="default")
    assert applied["data"] == {"y": "3"}
    with pytest.raises(failures.ConflictError, match="conflict"):
        client.apply(
            resources.CONFIG_MAPS, "a", config_map("a", y="4"), namespace="default", manager="other", force=False
        )
    names = [f"page-{number}" for number in range(7)]
    for name in names:
        client.apply(resources.CONFIG_MAPS, name, config_map(name), namespace="default")
    found = client.list(resources.CONFIG_MAPS, namespace="default", page=2)
    assert {each["metadata"]["name"] for each in found.items} >= {"a", *names}
    with pytest.raises(failures.ConflictError):
        client.delete(resources.CONFIG_MAPS, "a", namespace="default", uid="another")
    for name in ("a", *names):
        client.delete(resources.CONFIG_MAPS, name, namespace="default")
    with pytest.raises(errors.NotFoundError, match='configmaps "a" not found'):
        client.get(resources.CONFIG_MAPS, "a", namespace="default")
    with pytest.raises(errors.InvalidArgumentError, match="Invalid value"):
        client.create(resources.CONFIG_MAPS, config_map("Not A Name"), namespace="default")


def test_a_watch_tells_what_happens_and_ends_when_it_is_to(client: Client) -> None:
    version = client.list(resources.CONFIG_MAPS, namespace="default").version
    client.create(resources.CONFIG_MAPS, config_map("w"), namespace="default")
    client.patch(resources.CONFIG_MAPS, "w", {"data": {"x": "1"}}, namespace="default")
    client.delete(resources.CONFIG_MAPS, "w", namespace="default")
    events = client.watch(resources.CONFIG_MAPS, version=version, namespace="default", seconds=2)
    seen = [(each.kind, each.object["metadata"].get("name")) for each in events]
    # (the namespace's certificate of the authority may come in between, and bookmarks)
    assert [kind for kind, name in seen if name == "w"] == ["ADDED", "MODIFIED", "DELETED"]


def test_a_version_that_is_none_is_told(client: Client) -> None:
    with pytest.raises(errors.UnavailableError, match="Invalid value"):
        list(client.watch(resources.CONFIG_MAPS, version="no-number", seconds=1))


async def test_objects_are_followed_while_the_server_goes_and_comes_back(
    tmp_path_factory: pytest.TempPathFactory, plane: ControlPlane
) -> None:
    """The same etcd, so nothing is lost; what happened meanwhile is told, as a list or as events."""
    client = asynchronous.AsyncClient(Client(certifiedplanes.endpoint(plane.settings)))
    known: set[str] = set()
    grown = asyncio.Event()

    async def follow() -> None:
        changes = following.follow(client, resources.CONFIG_MAPS, namespace="default")
        async with contextlib.aclosing(changes):
            async for change in changes:
                names = {each["metadata"]["name"] for each in change.objects}
                if change.kind == following.LISTED:
                    known.clear()
                known.update(names) if change.kind != "DELETED" else known.difference_update(names)
                grown.set()

    async def until(name: str, *, there: bool) -> None:
        while (name in known) != there:
            grown.clear()
            await asyncio.wait_for(grown.wait(), 90)

    async with client:
        task = asyncio.create_task(follow())
        await client.create(resources.CONFIG_MAPS, config_map("before"), namespace="default")
        await until("before", there=True)
        await asyncio.to_thread(plane.stop, "kube-apiserver")
        with pytest.raises(errors.UnavailableError):
            await client.check()
        plane.start("kube-apiserver")
        await asyncio.to_thread(plane.wait)
        await client.delete(resources.CONFIG_MAPS, "before", namespace="default")
        await client.create(resources.CONFIG_MAPS, config_map("after"), namespace="default")
        await until("after", there=True)
        await until("before", there=False)
        await client.delete(resources.CONFIG_MAPS, "after", namespace="default")
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_the_dns_s_configuration_names_the_nodes(plane: ControlPlane, client: Client) -> None:
    """Whatever comes first, and whoever else writes there."""

    def node(name: str, *addresses: str) -> Object:
        found = [{"type": "InternalIP", "address": each} for each in addresses]
        metadata = {"name": name}
        return {"apiVersion": "v1", "kind": "Node", "metadata": metadata, "status": {"addresses": found}}

    def hosts() -> object:
        with contextlib.suppress(errors.NotFoundError):
            return client.get(resources.CONFIG_MAPS, "coredns", namespace="kube-system")["data"].get("NodeHosts")
        return None

    async def until(text: str) -> None:
        async with asyncio.timeout(90):
            while (found := await asyncio.to_thread(hosts)) != text:
                assert found is None or isinstance(found, str)
                await asyncio.sleep(0.1)

    def write(**data: str) -> None:
        """As a manifest does it, and not as who sets the names."""
        client.apply(
            resources.CONFIG_MAPS, "coredns", config_map("coredns", **data), namespace="kube-system", manager="people"
        )

    client.create(resources.NODES, node("named-1", "192.0.2.1", "fd00::1"))
    async with asynchronous.AsyncClient(Client(certifiedplanes.endpoint(plane.settings))) as asked:
        task = asyncio.create_task(nodenames.keep(asked))
        await asyncio.sleep(1)
        assert hosts() is None, "nobody wants a DNS"
        write(Corefile="x")
        first = "192.0.2.1 named-1 # node\nfd00::1 named-1 # node\n"
        await until(first)
        client.create(resources.NODES, node("named-2", "192.0.2.2"))
        await until(f"{first}192.0.2.2 named-2 # node\n")
        client.delete(resources.NODES, "named-1")
        await until("192.0.2.2 named-2 # node\n")
        # What a manifest says anew takes nothing of it, and people's own lines are theirs.
        write(Corefile="y")
        own = "192.0.2.9 printer printer.example\n"
        client.patch(resources.CONFIG_MAPS, "coredns", {"data": {"NodeHosts": own}}, namespace="kube-system")
        await until(f"{own}192.0.2.2 named-2 # node\n")
        client.delete(resources.CONFIG_MAPS, "coredns", namespace="kube-system")
        write(Corefile="z")
        await until("192.0.2.2 named-2 # node\n")
        client.delete(resources.NODES, "named-2")
        await until("")
        assert not task.done()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    client.delete(resources.CONFIG_MAPS, "coredns", namespace="kube-system")


async def refused(client: asynchronous.AsyncClient) -> str:
    """Why an object isn't taken; empty: it is."""
    try:
        await client.apply(resources.CONFIG_MAPS, "shut", config_map("shut"), namespace="default")
    except errors.NixletError as error:
        return error.message
    return ""


async def test_a_webhook_that_lets_nobody_write_keeps_no_later_start(plane: ControlPlane) -> None:
    """Its own pods aren't there before the node is."""
    rule = {"apiGroups": ["*"], "apiVersions": ["*"], "operations": ["*"], "resources": ["*/*"]}
    hook = {
        "name": "closed.nixlet.test",
        "clientConfig": {"url": "https://127.0.0.1:1/"},
        "rules": [rule],
        "failurePolicy": "Fail",
        "sideEffects": "None",
        "admissionReviewVersions": ["v1"],
    }
    kind = {"apiVersion": WEBHOOKS.version, "kind": "ValidatingWebhookConfiguration"}
    closed = {**kind, "metadata": {"name": "closed"}, "webhooks": [hook]}
    async with asynchronous.AsyncClient(Client(certifiedplanes.endpoint(plane.settings))) as client:
        await bootstrap.apply(client, flannel=True)
        await client.create(WEBHOOKS, closed)
        try:
            async with asyncio.timeout(60):
                while not await refused(client):
                    # (the API server hears of it a moment later)
                    await asyncio.sleep(0.1)
                assert 'failed calling webhook "closed.nixlet.test"' in await refused(client)
                await bootstrap.apply(client, flannel=True)
        finally:
            await client.delete(WEBHOOKS, "closed")


def test_who_may_not_and_who_is_unknown(plane: ControlPlane) -> None:
    scheduler = Endpoint.of_kubeconfig(kubeconfigs.read(plane.settings.layout.cred("scheduler.kubeconfig")))
    with Client(scheduler) as client, pytest.raises(errors.PermissionDeniedError, match="system:kube-scheduler"):
        client.list(resources.SECRETS, namespace="kube-system")
    authority = plane.settings.layout.tls("server-ca.crt")
    wrong = kubeconfigs.Credentials(token="wrong")
    nobody = Endpoint.of(plane.settings.server_url, authority=authority, credentials=wrong)
    with Client(nobody) as client, pytest.raises(failures.UnauthenticatedError):
        client.get(resources.NODES, "n")


def test_another_cluster_s_authority(plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = ControlPlane(tmp_path_factory.mktemp("other"))
    there = certifiedplanes.endpoint(plane.settings)
    with (
        Client(dataclasses.replace(there, authority=other.settings.layout.tls("server-ca.crt"))) as client,
        pytest.raises(failures.StrangerError, match="isn't known here"),
    ):
        client.check()


def test_etcd_and_the_api_server_say_how_they_are(plane: ControlPlane, client: Client) -> None:
    for path in ("/livez", "/readyz", "/healthz"):
        client.check(path)
    etcd = Endpoint.of(f"http://127.0.0.1:{model.ETCD_METRICS_PORT}", what="etcd")
    with Client(etcd) as asked:
        asked.check("/health")
    assert json.loads(client.raw("/version"))["minor"] == "36"


def test_many_threads_at_once(client: Client) -> None:
    wrong: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(10):
                name = f"thread-{number}-{turn}"
                client.create(resources.CONFIG_MAPS, config_map(name), namespace="default")
                client.get(resources.CONFIG_MAPS, name, namespace="default")
                client.delete(resources.CONFIG_MAPS, name, namespace="default")
        except errors.NixletError as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert wrong == []


def test_tokens_are_made_by_the_command_line_and_let_in_until_they_are_deleted(
    plane: ControlPlane, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = plane.settings

    def token(*arguments: str) -> str:
        assert app.run(["token", *arguments, "--data-dir", settings.data_dir]) == 0
        return capsys.readouterr().out.strip()

    full = token("create", "--description", "a node")
    made = tokens.parse(full)
    with open(settings.layout.tls("server-ca.crt"), "rb") as file:
        made.check_authority(file.read())
    assert made.user in token("list")
    credentials = kubeconfigs.Credentials(token=made.credentials())
    there = Endpoint.of(settings.server_url, authority=settings.layout.tls("server-ca.crt"), credentials=credentials)
    with Client(there) as client:
        # It is known who that is, and that they may not.
        with pytest.raises(errors.PermissionDeniedError, match=f'User "system:bootstrap:{made.user}"'):
            client.get(resources.NODES, "n")
        token("delete", made.user)
        end = time.monotonic() + 60
        while True:
            try:
                client.get(resources.NODES, "n")
            except failures.UnauthenticatedError:
                break
            except errors.PermissionDeniedError:
                assert time.monotonic() < end
                time.sleep(0.1)
    assert json.loads(token("list", "-o", "json")) == []


class Agents:
    """Nodes that join at a server of ours, each with a directory of its own."""

    def __init__(self, plane: ControlPlane, directory: Path) -> None:
        self._plane, self._directory = plane, directory

    async def join(self, name: str, token: str, directory: str = "") -> Endpoint:
        """Join; the API server as the node's kubelet sees it."""
        places = Layout(str(self._directory / (directory or name)), "")
        address = ipaddress.ip_address("192.0.2.78")
        server = joining.server_url(self._plane.settings.server_url)
        await asyncio.to_thread(joining.join, places, server, tokens.parse(token), name, [address])
        return Endpoint.of_kubeconfig(kubeconfigs.read(places.node("kubelet.kubeconfig")))


@pytest.fixture
async def agents(plane: ControlPlane, client: Client, tmp_path: Path) -> AsyncIterator[Agents]:
    async with joinserver.serve(doors.Doorkeeper(plane.settings, client), plane.settings):
        yield Agents(plane, tmp_path)


def node(name: str) -> Object:
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}}


async def test_a_node_joins_by_the_token_and_is_that_node_and_no_other(
    plane: ControlPlane, client: Client, agents: Agents, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(plane.settings.layout.server + "/node-token", encoding="ascii") as file:
        token = file.read()
    kubelet = await agents.join("joined", token)
    with Client(kubelet) as as_kubelet:
        made = as_kubelet.create(resources.NODES, node("joined"))
        assert made["metadata"]["name"] == "joined"
        with pytest.raises(errors.PermissionDeniedError, match=r"is not allowed|cannot"):
            as_kubelet.create(resources.NODES, node("another"))
        with pytest.raises(errors.PermissionDeniedError):
            as_kubelet.list(resources.SECRETS, namespace="kube-system")
        addresses = [{"type": "InternalIP", "address": "192.0.2.78"}]
        as_kubelet.patch(resources.NODES, "joined", {"status": {"addresses": addresses}}, subresource="status")
    # Once more, as after a restart; and somebody else by that name, or with its address.
    await agents.join("joined", token)
    secret = client.get(resources.SECRETS, "joined.node-password.nixlet", namespace="kube-system")
    assert "nixlet.io/joined" in secret["metadata"]["annotations"]
    with pytest.raises(errors.InvalidArgumentError, match="is that of the node joined"):
        await agents.join("another", token)
    with pytest.raises(errors.PermissionDeniedError, match="there is a node joined already"):
        await agents.join("joined", token, "elsewhere")
    client.delete(resources.NODES, "joined")
    monkeypatch.setattr(nodepasswords, "_COMING", datetime.timedelta(0))
    await agents.join("joined", token, "elsewhere")
    client.delete(resources.SECRETS, "joined.node-password.nixlet", namespace="kube-system")


async def test_a_node_joins_by_a_bootstrap_token_until_that_is_deleted(
    plane: ControlPlane, client: Client, agents: Agents
) -> None:
    new = tokens.new_bootstrap()
    kept = bootstraptokens.BootstrapToken(new.user, new.password)
    await asyncio.to_thread(bootstraptokens.add, client, kept)
    with open(plane.settings.layout.tls("server-ca.crt"), "rb") as file:
        token = new.full(file.read())
    await agents.join("for-a-while", token)
    assert bootstraptokens.remove(client, token) == new.user
    with pytest.raises(errors.PermissionDeniedError, match="the token is wrong, or has ended"):
        await agents.join("too-late", token)
    client.delete(resources.SECRETS, "for-a-while.node-password.nixlet", namespace="kube-system")


def test_a_cluster_is_discovered_by_a_token_as_kubeadm_does_it(plane: ControlPlane, client: Client) -> None:
    with open(plane.settings.layout.tls("server-ca.crt"), "rb") as file:
        authority = file.read()
    data = base64.b64encode(authority).decode()
    cluster = {"server": plane.settings.server_url, "certificate-authority-data": data}
    info = json.dumps({"apiVersion": "v1", "kind": "Config", "clusters": [{"name": "", "cluster": cluster}]})
    rule = {"apiGroups": [""], "resources": ["configmaps"], "resourceNames": ["cluster-info"], "verbs": ["get"]}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "info"}
    group = {"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "system:anonymous"}
    rbac = "rbac.authorization.k8s.io/v1"
    for resource, name, wanted in (
        (resources.CONFIG_MAPS, "cluster-info", config_map("cluster-info", kubeconfig=info)),
        (resources.ROLES, "info", {"apiVersion": rbac, "kind": "Role", "metadata": {"name": "info"}, "rules": [rule]}),
        (
            resources.ROLE_BINDINGS,
            "info",
            {
                "apiVersion": rbac,
                "kind": "RoleBinding",
                "metadata": {"name": "info"},
                "roleRef": role,
                "subjects": [group],
            },
        ),
    ):
        client.apply(resource, name, wanted, namespace="kube-public")
    new = tokens.new_bootstrap()
    with pytest.raises(errors.PermissionDeniedError, match="doesn't know the token"):
        discovery.discover(plane.settings.server_url, new)
    bootstraptokens.add(client, bootstraptokens.BootstrapToken(new.user, new.password))
    # (it would end with an API server that is stopped while it starts)
    plane.start("kube-controller-manager")
    end, found = time.monotonic() + 90, None
    while found is None:
        try:
            found = discovery.discover(plane.settings.server_url, new)
        except errors.PermissionDeniedError:
            # The controller that signs has yet to start, perhaps, and to see it.
            assert time.monotonic() < end
            time.sleep(0.2)
    assert (found.server, found.authority_data) == (plane.settings.server_url, authority)
    who = f"system:bootstrap:{new.user}"
    with Client(Endpoint.of_kubeconfig(found)) as known, pytest.raises(errors.PermissionDeniedError, match=who):
        known.get(resources.NODES, "n")
    assert discovery.kubelet_facts(found) is None
    plane.stop("kube-controller-manager")
    bootstraptokens.remove(client, new.user)


def test_the_real_kubectl_takes_our_place(plane: ControlPlane) -> None:
    argv = [sys.executable, "-P", "-m", "nixlet", "kubectl", "--data-dir", plane.settings.data_dir]
    directory = str(parts.kubernetes())
    environment = {**os.environ, "NIXLET_KUBERNETES_BIN_DIR": directory, "KUBECONFIG": "/another"}

    def kubectl(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*argv, *arguments], env=environment, capture_output=True, text=True, check=False)

    assert kubectl("get", "--raw", "/readyz").stdout == "ok"
    done = kubectl("get", "namespace", "no-such-namespace")
    assert (done.returncode, done.stderr) == (
        1,
        'Error from server (NotFound): namespaces "no-such-namespace" not found\n',
    )
