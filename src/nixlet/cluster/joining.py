"""How a node that joins comes to its certificates: it keeps its keys, and a server signs what it knows of the node.

A request's own words (names, addresses, uses) count for nothing: a server takes its key only, and says itself whom the certificate is for.
"""

import datetime
from typing import NamedTuple

from cryptography import exceptions, x509
from cryptography.hazmat.primitives import hashes, serialization

from nixlet import errors
from nixlet.cluster import certificates, clock, constraints, signing, subjects, validation
from nixlet.cluster.layout import Layout
from nixlet.cluster.settings import Address, ClusterSettings
from nixlet.cluster.subjects import Subject
from nixlet.host import files

#: The certificates of a node, by their files' names (k3s's), and who signs each.
SIGNED_BY = {
    "client-kubelet": certificates.CLIENT,
    "serving-kubelet": certificates.SERVER,
    "client-kube-proxy": certificates.CLIENT,
}


class Node(NamedTuple):
    """A node as a server knows it, after it has shown its token and its password."""

    name: str
    addresses: tuple[Address, ...]


def request(places: Layout, name: str) -> bytes:
    """A request for one of a node's certificates, made with its key, which is made where it is missing.

    Raises:
        NixletError: The file system refuses, as in ``files.refused``.
    """
    path = signing.Pair.at(places.node(name)).key
    signing.keep_private(path)
    try:
        key = signing.read_key(path)
    except signing.Unreadable:
        key = None
    if key is None:
        key = signing.new_key()
        signing.write_key(path, key)
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def answer(settings: ClusterSettings, name: str, request: bytes, node: Node, now: datetime.datetime) -> bytes:
    """A server's answer to such a request: the certificate, and the authority's.

    Raises:
        InvalidArgumentError: The request is none, there is no such certificate, or no node may have that name or such an address: the
            authority of servers would say of it that it is the API server.
        FailedPreconditionError: The authority is broken, or not valid now.
    """
    clock.check_zone(now)
    subject = _subject(name, node)
    check(settings, node)
    key = _requested_key(request)
    authority = signing.read_authority(signing.Pair.at(settings.layout.tls(SIGNED_BY[name])))
    return signing.certificates_text(authority.issue(subject, key, now))


def store(places: Layout, name: str, answer: bytes) -> None:
    """Write down the certificate that a server has answered with.

    Raises:
        FailedPreconditionError: As for ``checked``.
        NixletError: The file system refuses, as in ``files.refused``.
    """
    files.write_atomically(signing.Pair.at(places.node(name)).certificate, checked(places, name, answer))


def checked(places: Layout, name: str, answer: bytes) -> bytes:
    """The certificate that a server has answered with, as it is to be kept.

    Raises:
        FailedPreconditionError: It is none, or is for another key than ours.
        NixletError: The file system refuses, as in ``files.refused``.
    """
    pair = signing.Pair.at(places.node(name))
    try:
        found = signing.parse_certificates(answer)
        key = signing.read_key(pair.key)
    except signing.Unreadable as error:
        raise errors.FailedPreconditionError(f"the server's answer for {pair.certificate} {error}") from error
    if key is None or not signing.is_of(found[0], key):
        raise errors.FailedPreconditionError(
            f"the certificate that the server sent for {pair.certificate} is for another key"
        )
    return signing.certificates_text(found)


def _subject(name: str, node: Node) -> Subject:
    match name:
        case "client-kubelet":
            return subjects.kubelet_client(node.name)
        case "serving-kubelet":
            return subjects.kubelet_serving(node.name, node.addresses)
        case "client-kube-proxy":
            return subjects.kube_proxy()
        case _:
            raise errors.InvalidArgumentError(f"nodes have no certificate {name!r}")


def check(settings: ClusterSettings, node: Node) -> None:
    """Check that a certificate that names a node names nothing else by it.

    Raises:
        InvalidArgumentError: It would.
    """
    if problem := validation.node_name_problem(node.name):
        raise errors.InvalidArgumentError(f"{node.name!r} can't be a node's name: {problem}")
    server = subjects.api_server(settings)
    ends = (".svc", f".{settings.cluster_domain}")
    wild = tuple(name.removeprefix("*") for name in server.dns if name.startswith("*."))
    if node.name in server.dns or node.name.startswith("kubernetes.") or node.name.endswith(ends + wild):
        raise errors.InvalidArgumentError(f"no node may be called {node.name!r}: the API server or a service is")
    for address in node.addresses:
        if problem := validation.address_problem(address):
            raise errors.InvalidArgumentError(f"a node's address can't be {address}: it is {problem}")
        networks = (*settings.service_cidrs, *settings.cluster_cidrs)
        if address in server.addresses or any(address in network for network in networks):
            raise errors.InvalidArgumentError(
                f"no node may have the address {address}: the API server, a service or a pod has it"
            )


def _requested_key(data: bytes) -> signing.PublicKey:
    """The public key of a request whose sender has shown to have the private one.

    Raises:
        InvalidArgumentError: It is no request, isn't signed by that key, or the key is too weak.
    """
    try:
        found = x509.load_pem_x509_csr(data)
        key, valid = found.public_key(), found.is_signature_valid
    except (ValueError, TypeError, exceptions.UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise errors.InvalidArgumentError("this is no request for a certificate") from error
    if not valid:
        raise errors.InvalidArgumentError("the request for a certificate is not signed by its own key")
    if isinstance(key, signing.PublicKey) and constraints.is_strong(key):
        return key
    raise errors.InvalidArgumentError("the request's key is of a kind that is too weak, or unknown")
