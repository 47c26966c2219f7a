"""How a cluster is recognised by a bootstrap token. What kubeadm and the real signer write: system/test_kubeclient.py."""

import base64
import hashlib
import hmac
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.cluster import tokens
from nixlet.cluster.kubeconfigs import Credentials, Kubeconfig
from nixlet.cluster.settings import ClusterSettings
from nixlet.cluster.tokens import Token
from nixlet.kubeclient import discovery
from support import apiservers
from support.apiservers import Asked, Reply

TOKEN = tokens.parse("abcdef.0123456789abcdef")


def authority(cluster: ClusterSettings) -> bytes:
    return Path(cluster.layout.tls("server-ca.crt")).read_bytes()


def kubeconfig(cluster: ClusterSettings) -> str:
    # As kubeadm writes it.
    data = base64.b64encode(authority(cluster)).decode()
    return (
        f"apiVersion: v1\nclusters:\n- cluster:\n    certificate-authority-data: {data}\n    server: https://192.0.2.7:6443\n"
        '  name: ""\ncontexts: null\ncurrent-context: ""\nkind: Config\npreferences: {}\nusers: null\n'
    )


def encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def signed(text: str, token: Token = TOKEN, **changes: str) -> str:
    header = encoded(json.dumps({"alg": "HS256", "kid": token.user, **changes}).encode())
    mac = hmac.digest(token.password.encode(), f"{header}.{encoded(text.encode())}".encode(), hashlib.sha256)
    return f"{header}..{encoded(mac)}"


def answering(data: dict[str, str]) -> Callable[[Asked], Reply]:
    return lambda _: Reply(body=json.dumps({"data": data}).encode())


def test_a_cluster_is_recognised_by_the_token(cluster: ClusterSettings) -> None:
    text = kubeconfig(cluster)
    data = {"kubeconfig": text, "jws-kubeconfig-abcdef": signed(text)}
    with apiservers.serving(answering(data), apiservers.context(cluster)) as server:
        found = discovery.discover(server.url(), TOKEN)
        again = discovery.discover(server.url(), tokens.parse(TOKEN.full(authority(cluster))))
    assert (found.server, found.authority_data) == ("https://192.0.2.7:6443", authority(cluster))
    assert found.credentials.token == "abcdef.0123456789abcdef"
    assert again == found
    assert [(each.path, "Authorization" in each.headers) for each in server.asked] == [
        ("/api/v1/namespaces/kube-public/configmaps/cluster-info", False)
    ] * 2


OTHER = Token("abcdef", "fedcba9876543210", bootstrap=True)


@pytest.mark.parametrize(
    "sign",
    [
        lambda text: "",
        lambda text: "..",
        lambda text: "x.y.z",
        lambda text: encoded(b'{"x":' + b"[" * 100_000) + "..z",
        lambda text: signed(text, OTHER),
        lambda text: signed(f"{text} "),
        lambda text: signed(text, alg="none"),
        lambda text: signed(text, kid="fedcba"),
        lambda text: signed(text).replace("..", f".{encoded(text.encode())}."),
        lambda text: signed(text)[:-2],
        lambda text: signed(text).partition("..")[0] + "..",
    ],
)
def test_what_isn_t_signed_by_the_token_is_not_believed(cluster: ClusterSettings, sign: Callable[[str], str]) -> None:
    text = kubeconfig(cluster)
    data = {"kubeconfig": text, "jws-kubeconfig-abcdef": sign(text)}
    with (
        apiservers.serving(answering(data), apiservers.context(cluster)) as server,
        pytest.raises(errors.PermissionDeniedError, match="doesn't know the token abcdef") as caught,
    ):
        discovery.discover(server.url(), TOKEN)
    assert TOKEN.password not in str(caught.value)


def test_a_cluster_that_the_token_isn_t_for(cluster: ClusterSettings) -> None:
    text = kubeconfig(cluster)
    data = {"kubeconfig": text, "jws-kubeconfig-abcdef": signed(text)}
    with (
        apiservers.serving(answering(data), apiservers.context(cluster)) as server,
        pytest.raises(errors.PermissionDeniedError, match="another certificate authority"),
    ):
        discovery.discover(server.url(), tokens.parse(f"K10{'0' * 64}::abcdef.0123456789abcdef"))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "clusters: null\n", "clusters: [{cluster: {server: x, certificate-authority-data: '!'}}]\n"],
)
def test_what_names_no_cluster(cluster: ClusterSettings, text: str) -> None:
    data = {"kubeconfig": text, "jws-kubeconfig-abcdef": signed(text)}
    with apiservers.serving(answering(data), apiservers.context(cluster)) as server, pytest.raises(errors.UsageError):
        discovery.discover(server.url(), TOKEN)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_cluster_that_says_nothing_to_everybody(cluster: ClusterSettings, status: int) -> None:
    with (
        apiservers.serving(lambda _: Reply(status), apiservers.context(cluster)) as server,
        pytest.raises(errors.NotFoundError, match="doesn't say to everybody what cluster it is"),
    ):
        discovery.discover(server.url(), TOKEN)


def test_another_token_is_none_for_this() -> None:
    with pytest.raises(errors.InvalidArgumentError, match="is joined by a bootstrap token"):
        discovery.discover("https://192.0.2.7:6443", tokens.parse("password"))


@pytest.mark.parametrize(
    ("reply", "facts"),
    [
        (
            {
                "kubelet": "kind: KubeletConfiguration\nclusterDNS: [10.96.0.10]\nclusterDomain: example.org\nother: {a: 1}\n"
            },
            (["10.96.0.10"], "example.org"),
        ),
        ({"kubelet": "clusterDNS:\n- 10.96.0.10\n"}, (["10.96.0.10"], "cluster.local")),
        ({"kubelet": ""}, None),
        ({}, None),
        (None, None),
    ],
)
def test_what_a_cluster_wants_of_its_kubelets(
    cluster: ClusterSettings, reply: dict[str, str] | None, facts: tuple[list[str], str] | None
) -> None:
    answer = answering(reply) if reply is not None else lambda _: Reply(403, b"{}")
    with apiservers.serving(answer, apiservers.context(cluster)) as server:
        config = Kubeconfig(server.url(), authority_data=authority(cluster), credentials=Credentials(token="a.b"))
        found = discovery.kubelet_facts(config)
    assert server.asked[0].path == "/api/v1/namespaces/kube-system/configmaps/kubelet-config"
    assert (found and ([str(each) for each in found.cluster_dns], found.cluster_domain)) == facts
