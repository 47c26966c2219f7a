"""How a node that joins comes to its certificates."""

import ipaddress
import os
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from nixlet import errors
from nixlet.cluster import certificates, joining, signing
from nixlet.cluster.layout import Layout
from nixlet.cluster.settings import ClusterSettings
from support import clusters

NODE = joining.Node("node-2", (ipaddress.ip_address("192.0.2.9"), ipaddress.ip_address("2001:db8::9")))


@pytest.fixture
def server(tmp_path: Path) -> ClusterSettings:
    settings = clusters.settings(tmp_path / "server")
    certificates.ensure(settings, clusters.NOW)
    return settings


@pytest.fixture
def agent(tmp_path: Path) -> Layout:
    (tmp_path / "agent/agent").mkdir(parents=True)
    return Layout(str(tmp_path / "agent"), "/run/nixlet")


@pytest.mark.parametrize(
    ("name", "user", "names"),
    [
        ("client-kubelet", "system:node:node-2", set()),
        ("serving-kubelet", "node-2", {"node-2", "localhost", "127.0.0.1", "::1", "192.0.2.9", "2001:db8::9"}),
        ("client-kube-proxy", "system:kube-proxy", set()),
    ],
)
def test_a_node_keeps_its_key_and_gets_a_certificate(
    server: ClusterSettings, agent: Layout, name: str, user: str, names: set[str]
) -> None:
    request = joining.request(agent, name)
    key = Path(agent.node(f"{name}.key"))
    assert key.stat().st_mode & 0o777 == 0o600
    joining.store(agent, name, joining.answer(server, name, request, NODE, clusters.NOW))
    leaf, authority = x509.load_pem_x509_certificates(Path(agent.node(f"{name}.crt")).read_bytes())
    found = signing.subject_of(leaf)
    assert (found.common_name, set(found.names)) == (user, names)
    leaf.verify_directly_issued_by(authority)
    # The next time the same key is used.
    before = key.read_bytes()
    joining.request(agent, name)
    assert key.read_bytes() == before


def test_what_a_request_says_of_itself_counts_for_nothing(server: ClusterSettings) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    groups = [x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "system:masters")]
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([*groups, x509.NameAttribute(x509.NameOID.COMMON_NAME, "system:admin")]))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("kubernetes")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    answer = joining.answer(server, "client-kubelet", request, NODE, clusters.NOW)
    leaf = signing.parse_certificates(answer)[0]
    found = signing.subject_of(leaf)
    assert (found.common_name, found.organizations, found.names) == ("system:node:node-2", ("system:nodes",), ())
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert (found.client, found.server) == (True, False)


def broken(request: bytes) -> bytes:
    """The same request with another signature."""
    found = x509.load_pem_x509_csr(request).public_bytes(serialization.Encoding.DER)
    changed = x509.load_der_x509_csr(found[:-1] + bytes([found[-1] ^ 1]))
    return changed.public_bytes(serialization.Encoding.PEM)


def signed_by(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, algorithm)
    return request.public_bytes(serialization.Encoding.PEM)


def test_bad_requests_are_refused(server: ClusterSettings, agent: Layout) -> None:
    good = joining.request(agent, "client-kubelet")
    for request, message in (
        (b"", "this is no request for a certificate"),
        (good[:200], "this is no request for a certificate"),
        (broken(good), "the request for a certificate is not signed by its own key"),
        (
            signed_by(rsa.generate_private_key(65537, 1024)),
            "the request's key is of a kind that is too weak, or unknown",
        ),
        (
            signed_by(ed25519.Ed25519PrivateKey.generate()),
            "the request's key is of a kind that is too weak, or unknown",
        ),
    ):
        with pytest.raises(errors.InvalidArgumentError) as caught:
            joining.answer(server, "client-kubelet", request, NODE, clusters.NOW)
        assert caught.value.message == message
    with pytest.raises(errors.InvalidArgumentError, match="nodes have no certificate 'client-admin'"):
        joining.answer(server, "client-admin", good, NODE, clusters.NOW)
    assert joining.answer(
        server, "client-kubelet", signed_by(rsa.generate_private_key(65537, 2048)), NODE, clusters.NOW
    )


def test_an_answer_for_another_key_is_not_stored(server: ClusterSettings, agent: Layout) -> None:
    joining.request(agent, "client-kubelet")
    foreign = joining.answer(
        server, "client-kubelet", signed_by(ec.generate_private_key(ec.SECP256R1())), NODE, clusters.NOW
    )
    with pytest.raises(errors.FailedPreconditionError, match=r"is for another key$"):
        joining.store(agent, "client-kubelet", foreign)
    with pytest.raises(errors.FailedPreconditionError, match=r"holds no certificate$"):
        joining.store(agent, "client-kubelet", b"<html>")
    assert os.listdir(agent.agent) == ["client-kubelet.key"]


@pytest.mark.parametrize(
    "node",
    [
        *(
            joining.Node(name, NODE.addresses)
            for name in (
                "kubernetes", "kubernetes.default.svc", "kubernetes.elsewhere", "localhost", "node-1", "api.example.org", "a.wild.example",
                "dns.kube-system.svc", "dns.kube-system.svc.cluster.local", "", "a" * 53, "\xe4", "A b", "*.svc", "a\nb", "a:b",
            )
        ),
        *(
            joining.Node("node-2", (ipaddress.ip_address(address),))
            for address in (
                "192.0.2.7", "10.43.0.1", "10.43.7.7", "10.42.0.3", "198.51.100.4", "127.0.0.1", "0.0.0.0", "224.0.0.1", "169.254.1.1",
                "fe80::1%eth0", "::ffff:192.0.2.7", "255.255.255.255",
            )
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", joining.SIGNED_BY)
def test_no_node_is_given_what_is_the_api_server_s(
    tmp_path: Path, agent: Layout, name: str, node: joining.Node
) -> None:
    """Nor what is no node's name or address; and nothing is read for it, not even the authority."""
    settings = clusters.settings(tmp_path / "server", tls_sans=("api.example.org", "*.wild.example", "198.51.100.4"))
    with pytest.raises(
        errors.InvalidArgumentError, match=r"^(no node may|a node's address can't be|.* can't be a node's name)"
    ):
        joining.answer(settings, name, joining.request(agent, name), node, clusters.NOW)
