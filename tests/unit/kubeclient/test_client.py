"""What the client asks an API server, and what it makes of the answers."""

import concurrent.futures
import json
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from nixlet import errors
from nixlet.cluster import kubeconfigs
from nixlet.cluster.settings import ClusterSettings
from nixlet.kubeclient import etcd, failures, resources
from nixlet.kubeclient.calls import Call
from nixlet.kubeclient.client import Client
from nixlet.kubeclient.endpoint import Endpoint
from support import apiservers
from support.apiservers import Asked, Reply


def encoded(value: object) -> bytes:
    return json.dumps(value).encode()


def status(code: int, message: str, reason: str = "") -> Reply:
    said = {"kind": "Status", "status": "Failure", "message": message, "reason": reason, "code": code}
    return Reply(code, encoded(said))


POD = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "namespace": "default", "resourceVersion": "7"}}


def test_an_object_is_asked_for_with_our_certificate_and_the_connection_is_kept(cluster: ClusterSettings) -> None:
    with (
        apiservers.serving(lambda _: Reply(body=encoded(POD)), apiservers.context(cluster)) as server,
        Client(apiservers.endpoint(cluster, server)) as client,
    ):
        for _ in range(3):
            assert client.get(resources.PODS, "a", namespace="default") == POD
    assert [(each.method, each.path, each.client, each.connection) for each in server.asked] == [
        ("GET", "/api/v1/namespaces/default/pods/a", "system:admin", 0)
    ] * 3
    assert server.asked[0].headers["Accept"] == "application/json"
    assert server.asked[0].headers["User-Agent"].startswith("nixlet/")
    assert "Authorization" not in server.asked[0].headers


def test_a_kubeconfig_of_paths_and_one_of_data_lead_to_the_server(cluster: ClusterSettings) -> None:
    with apiservers.serving(lambda _: Reply(), apiservers.context(cluster)) as server:
        for config in (
            kubeconfigs.read(cluster.layout.cred("admin.kubeconfig")),
            kubeconfigs.for_people(cluster),
        ):
            there = Endpoint.of_kubeconfig(config)
            assert there.shown == "the API server at https://192.0.2.7:6443"
            at_loopback = Endpoint.of(
                server.url(),
                authority=there.authority,
                authority_data=there.authority_data,
                credentials=there.credentials,
            )
            with Client(at_loopback) as client:
                client.get(resources.NODES, "n")
    assert [each.client for each in server.asked] == ["system:admin", "system:admin"]


def test_a_token_is_shown_and_never_said(cluster: ClusterSettings) -> None:
    token = "s3cret-token"
    with apiservers.serving(lambda _: status(401, "Unauthorized"), apiservers.context(cluster)) as server:
        there = apiservers.endpoint(cluster, server, credentials=kubeconfigs.Credentials(token=token))
        with Client(there) as client, pytest.raises(failures.UnauthenticatedError) as caught:
            client.get(resources.NODES, "n")
    assert server.asked[0].headers["Authorization"] == f"Bearer {token}"
    assert "doesn't know us" in caught.value.message
    assert token not in f"{caught.value}{caught.value.hint}{there!r}"


def test_threads_that_come_first_together_share_the_connections(cluster: ClusterSettings) -> None:
    """Those of another set would be closed by nobody."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(50):
            with Client(Endpoint.of(cluster.server_url)) as client, concurrent.futures.ThreadPoolExecutor(8) as threads:
                together = threading.Barrier(8)

                def reach(client: Client = client, together: threading.Barrier = together) -> object:
                    together.wait()
                    return client._reached

                reached = [each.result() for each in [threads.submit(reach) for _ in range(8)]]
                assert all(each is reached[0] for each in reached)
    finally:
        sys.setswitchinterval(interval)


def test_a_token_that_is_none_is_refused_and_not_said() -> None:
    there = Endpoint.of("https://192.0.2.7:6443", credentials=kubeconfigs.Credentials(token="a\r\nX: b"))
    with Client(there) as client, pytest.raises(errors.InvalidArgumentError) as caught:
        client.get(resources.NODES, "n")
    assert "X: b" not in str(caught.value)


def test_proxies_of_the_environment_are_passed_over(cluster: ClusterSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with (
        apiservers.serving(lambda _: Reply(), apiservers.context(cluster)) as server,
        Client(apiservers.endpoint(cluster, server)) as client,
    ):
        client.get(resources.NODES, "n")
    assert len(server.asked) == 1


def pages(asked: Asked) -> Reply:
    rest = "2" if "continue" not in asked.path else ""
    items = [{"metadata": {"name": "b" if "continue=2" in asked.path else "a"}}]
    return Reply(body=encoded({"items": items, "metadata": {"resourceVersion": "12", "continue": rest}}))


def test_a_list_is_read_page_by_page(cluster: ClusterSettings) -> None:
    with (
        apiservers.serving(pages, apiservers.context(cluster)) as server,
        Client(apiservers.endpoint(cluster, server)) as client,
    ):
        found = client.list(resources.PODS, labels="app in (a,b)", fields="spec.nodeName=n", page=1)
    assert [each["metadata"]["name"] for each in found.items] == ["a", "b"]
    assert found.version == "12"
    first = "/api/v1/pods?labelSelector=app+in+%28a%2Cb%29&fieldSelector=spec.nodeName%3Dn&limit=1"
    assert [each.path for each in server.asked] == [first, f"{first}&continue=2"]


def test_a_list_whose_rest_is_forgotten_is_read_in_one_piece(cluster: ClusterSettings) -> None:
    def answer(asked: Asked) -> Reply:
        if "continue" in asked.path:
            return status(410, "The provided continue parameter is too old", "Expired")
        if "limit" in asked.path:
            return pages(asked)
        items = [{"metadata": {"name": name}} for name in "xyz"]
        return Reply(body=encoded({"items": items, "metadata": {"resourceVersion": "20"}}))

    with (
        apiservers.serving(answer, apiservers.context(cluster)) as server,
        Client(apiservers.endpoint(cluster, server)) as client,
    ):
        found = client.list(resources.PODS)
    assert ([each["metadata"]["name"] for each in found.items], found.version) == (["x", "y", "z"], "20")
    assert len(server.asked) == 3


def test_an_empty_list_has_null_for_its_items(cluster: ClusterSettings) -> None:
    body = encoded({"items": None, "metadata": {"resourceVersion": "1"}})
    with (
        apiservers.serving(lambda _: Reply(body=body), apiservers.context(cluster)) as server,
        Client(apiservers.endpoint(cluster, server)) as client,
    ):
        assert client.list(resources.PODS, namespace="x").items == []


@pytest.mark.parametrize(
    ("change", "method", "path", "content_type", "body"),
    [
        (
            lambda client: client.create(resources.SECRETS, {"a": 1}, namespace="kube-system"),
            "POST", "/api/v1/namespaces/kube-system/secrets", "application/json", {"a": 1},
        ),
        (
            lambda client: client.delete(resources.PODS, "a", namespace="b", uid="u", propagation="Foreground", grace=0),
            "DELETE", "/api/v1/namespaces/b/pods/a", "application/json",
            {
                "kind": "DeleteOptions", "apiVersion": "v1", "preconditions": {"uid": "u"}, "propagationPolicy": "Foreground",
                "gracePeriodSeconds": 0,
            },
        ),
        (
            lambda client: client.patch(resources.NODES, "n", {"metadata": {}}, subresource="status"),
            "PATCH", "/api/v1/nodes/n/status", "application/merge-patch+json", {"metadata": {}},
        ),
        (
            lambda client: client.apply(resources.CLUSTER_ROLES, "nixlet:x", {"kind": "ClusterRole"}),
            "PATCH", "/apis/rbac.authorization.k8s.io/v1/clusterroles/nixlet:x?fieldManager=nixlet&force=true",
            "application/apply-patch+yaml", {"kind": "ClusterRole"},
        ),
    ],
)  # fmt: skip
def test_changes_are_asked_for_as_the_api_has_them(
    cluster: ClusterSettings,
    change: Callable[[Client], object],
    method: str,
    path: str,
    content_type: str,
    body: dict[str, Any],
) -> None:
    with (
        apiservers.serving(lambda _: Reply(201), apiservers.context(cluster)) as server,
        Client(apiservers.endpoint(cluster, server)) as client,
    ):
        change(client)
    asked = server.asked[0]
    assert (asked.method, asked.path, asked.headers["Content-Type"]) == (method, path, content_type)
    assert json.loads(asked.body) == body


@pytest.mark.parametrize(
    ("reply", "kind", "message"),
    [
        (status(403, 'pods is forbidden: User "u" cannot'), errors.PermissionDeniedError, 'pods is forbidden: User "u" cannot'),
        (status(404, 'pods "a" not found', "NotFound"), errors.NotFoundError, 'pods "a" not found'),
        (status(409, 'pods "a" already exists', "AlreadyExists"), errors.AlreadyExistsError, 'pods "a" already exists'),
        (status(409, "the object has been modified", "Conflict"), failures.ConflictError, "the object has been modified"),
        (status(410, "too old resource version", "Expired"), failures.ExpiredError, "too old resource version"),
        (status(422, "spec: Required value", "Invalid"), errors.InvalidArgumentError, "spec: Required value"),
        (status(429, "too many requests"), errors.UnavailableError, "too many requests"),
        (status(500, "etcdserver: no leader"), errors.UnavailableError, "etcdserver: no leader"),
        (Reply(503, b"<html>\x1b[31mno\x07\r\nbackend</html>"), errors.UnavailableError, "<html> [31mno backend</html>"),
        (Reply(502, b""), errors.UnavailableError, "status 502"),
        (Reply(418, b"short"), errors.FailedPreconditionError, "short"),
    ],
)  # fmt: skip
def test_what_a_server_refuses_is_told_in_its_words(
    cluster: ClusterSettings, reply: Reply, kind: type[errors.NixletError], message: str
) -> None:
    with (
        apiservers.serving(lambda _: reply, apiservers.context(cluster)) as server,
        Client(apiservers.endpoint(cluster, server)) as client,
        pytest.raises(errors.NixletError) as caught,
    ):
        client.get(resources.PODS, "a", namespace="b")
    assert type(caught.value) is kind
    assert (caught.value.message, caught.value.said_by) == (message, "the API server")


def test_a_server_s_words_are_cut(cluster: ClusterSettings) -> None:
    with (
        apiservers.serving(lambda _: status(422, "x" * 100_000), apiservers.context(cluster)) as server,
        Client(apiservers.endpoint(cluster, server)) as client,
        pytest.raises(errors.InvalidArgumentError) as caught,
    ):
        client.get(resources.PODS, "a", namespace="b")
    assert caught.value.message == "x" * 400 + "…"


def test_redirects_are_not_followed(cluster: ClusterSettings) -> None:
    with (
        apiservers.serving(lambda _: Reply(302), apiservers.context(cluster)) as server,
        Client(apiservers.endpoint(cluster, server)) as client,
        pytest.raises(errors.UnavailableError, match=r"sends us elsewhere \(302\)"),
    ):
        client.get(resources.NODES, "n")
    assert len(server.asked) == 1


#: Nested deeper than anybody can read.
DEEP = b'{"x":' + b"[" * 100_000 + b"\n"


@pytest.mark.parametrize("body", [b"", b"[]", b"<html>", b'"text"', b"\xff", b'{"items": 7}', DEEP])
def test_an_answer_that_is_no_object_is_told(cluster: ClusterSettings, body: bytes) -> None:
    with (
        apiservers.serving(lambda _: Reply(body=body), apiservers.context(cluster)) as server,
        Client(apiservers.endpoint(cluster, server)) as client,
        pytest.raises(errors.UnavailableError, match="something that is no object of Kubernetes'"),
    ):
        client.list(resources.PODS)


def test_what_is_nested_too_deep_is_told(cluster: ClusterSettings) -> None:
    with (
        apiservers.serving(lambda asked: Reply(500 if asked.path.endswith("/pods") else 200, DEEP), None) as server,
        Client(Endpoint.of(server.url("http"))) as client,
    ):
        with pytest.raises(errors.UnavailableError, match="something that is no object of Kubernetes'"):
            client.get(resources.NODES, "n")
        with pytest.raises(errors.UnavailableError, match="something that is no object of Kubernetes'"):
            list(client.watch(resources.NODES, version="1"))
        # An error of the server's, in words that are none.
        with pytest.raises(errors.UnavailableError, match="x"):
            client.create(resources.PODS, {}, namespace="n")
        # What a program says of its health.
        client.check("/healthz")
        with pytest.raises(errors.FailedPreconditionError, match="none of etcd's answers"):
            etcd.full(client.endpoint, Call())


@pytest.mark.parametrize(
    ("resource", "namespace", "name"),
    [
        (resources.PODS, "a", ".."),
        (resources.PODS, "a", "x/../y"),
        (resources.PODS, "..", "x"),
        (resources.PODS, "a", "%2e%2e"),
        (resources.PODS, "", "x"),
        (resources.NODES, "a", "x"),
    ],
)
def test_names_that_lead_elsewhere_are_refused(resource: resources.Resource, namespace: str, name: str) -> None:
    with pytest.raises(errors.InvalidArgumentError):
        resource.path(namespace, name)


@pytest.mark.parametrize(
    "url",
    [
        "", "192.0.2.7:6443", "ftp://192.0.2.7", "https://", "https://user:pw@192.0.2.7", "https://192.0.2.7:0", "https://192.0.2.7:x",
        "https://192.0.2.7/?a", "https://192.0.2.7/#a", "http://192.0.2.7", "http://example.org", "https://a b", "https://[::1", "https://ä",
        "https://a..b", "https://.x", "https://a.b..", "https://" + "a" * 64 + ".x", "https://" + "a." * 127, "https://a,b",
    ],
)  # fmt: skip
def test_urls_that_are_no_server_s_are_refused(url: str) -> None:
    with pytest.raises(errors.InvalidArgumentError) as caught:
        Endpoint.of(url)
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize("host", ["[2001:db8::7]", "192.0.2.7", "a", "a-b.Example.org", "a.b.", "a" * 63 + ".x", "a_b"])
def test_hosts(host: str) -> None:
    assert Endpoint.of(f"https://{host}:6443").address == f"{host.lower()}:6443"


def test_a_server_that_is_not_verified_is_at_home_and_is_shown_nothing() -> None:
    assert Endpoint.of("https://127.0.0.1:10257", verified=False).shown == "the API server at https://127.0.0.1:10257"
    with pytest.raises(errors.InvalidArgumentError, match="another machine's"):
        Endpoint.of("https://192.0.2.7:10257", verified=False)
    with pytest.raises(errors.InvalidArgumentError, match="is shown no credentials"):
        Endpoint.of("https://127.0.0.1:10257", verified=False, credentials=kubeconfigs.Credentials(token="x"))
