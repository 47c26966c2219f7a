"""How a node with a bootstrap token finds out about anybody's cluster: kubeadm's way ("kubeadm join", discovery by token).

The cluster says to everybody where it is and what its authority is (ConfigMap ``cluster-info`` in kube-public), signed with each token that is for
signing: a detached JWS (RFC 7515, appendix F) by HMAC and SHA-256 with the token's secret. Whoever can't know the secret can't sign.
"""

import base64
import binascii
import dataclasses
import hashlib
import hmac
import ipaddress
from typing import NamedTuple

import msgspec

from nixlet import errors
from nixlet.cluster import names
from nixlet.cluster import settings as model
from nixlet.cluster.kubeconfigs import Credentials, Kubeconfig
from nixlet.cluster.tokens import Token
from nixlet.encoding import unreadable, yamlread
from nixlet.kubeclient import resources
from nixlet.kubeclient.calls import Call
from nixlet.kubeclient.client import Client, Object
from nixlet.kubeclient.endpoint import Endpoint

#: Where a cluster says what it is, and what kubelets are to be configured as.
_PUBLIC, _INFO = "kube-public", "cluster-info"
_SYSTEM, _KUBELETS = "kube-system", "kubelet-config"


class KubeletFacts(NamedTuple):
    """What a cluster wants of its kubelets, as far as a node's pods depend on it."""

    cluster_dns: tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, ...]
    cluster_domain: str


class _Header(msgspec.Struct):
    alg: str
    kid: str


def discover(server: str, token: Token, *, call: Call | None = None) -> Kubeconfig:
    """The way to a cluster, for a node that has a bootstrap token: checked by that token, and with it as the credentials.

    Args:
        server: A URL of the API server.
        token: A bootstrap token.
        call: By which it may be given up.

    Raises:
        PermissionDeniedError: The cluster doesn't know the token, or isn't the one that it is for.
        NotFoundError: The cluster doesn't say what it is.
        NixletError: It can't be reached, as in ``Client``.
    """
    if not token.bootstrap:
        raise errors.InvalidArgumentError(
            "a cluster that isn't nixlet's is joined by a bootstrap token", hint="kubeadm token create prints one"
        )
    there = Endpoint.of(server)
    with Client(there.as_stranger()) as client:
        try:
            found = client.get(resources.CONFIG_MAPS, _INFO, namespace=_PUBLIC, call=call)
        except (errors.NotFoundError, errors.PermissionDeniedError) as error:
            raise errors.NotFoundError(
                f"{there.shown} doesn't say to everybody what cluster it is ({_PUBLIC}/{_INFO})",
                hint="join it by a kubeconfig file: --kubeconfig FILE",
            ) from error
    data = _data(found)
    text = data.get("kubeconfig", "").encode()
    _check_signature(text, data.get(f"jws-kubeconfig-{token.user}", ""), token)
    config = _read(text)
    if not config.authority_data:
        raise errors.FailedPreconditionError(f"what {there.shown} says of itself lacks its authority")
    token.check_authority(config.authority_data)
    return dataclasses.replace(config, credentials=Credentials(token=token.credentials()))


def kubelet_facts(config: Kubeconfig, *, call: Call | None = None) -> KubeletFacts | None:
    """What a cluster that kubeadm made wants of its kubelets; None: it doesn't say, or not to us.

    Raises:
        NixletError: It can't be reached, as in ``Client``; or it says what makes no sense.
    """
    with Client(Endpoint.of_kubeconfig(config)) as client:
        try:
            found = client.get(resources.CONFIG_MAPS, _KUBELETS, namespace=_SYSTEM, call=call)
        except (errors.NotFoundError, errors.PermissionDeniedError):
            return None
    documents = list(yamlread.documents(_data(found).get("kubelet", "").encode(), f"{_SYSTEM}/{_KUBELETS}"))
    if len(documents) != 1:
        return None
    addresses = ",".join(documents[0].texts("clusterDNS") or ())
    domain = documents[0].text("clusterDomain", "cluster.local")
    if not names.is_name(domain):
        raise errors.FailedPreconditionError(f"the cluster's clusterDomain {domain[:80]!r} is no domain name")
    return KubeletFacts(model.addresses(addresses, what="the cluster's clusterDNS"), domain)


def _data(config_map: Object) -> dict[str, str]:
    try:
        return msgspec.convert(config_map.get("data") or {}, dict[str, str])
    except msgspec.ValidationError as error:
        raise errors.FailedPreconditionError("a ConfigMap of the cluster's holds no texts") from error


def _check_signature(text: bytes, signature: str, token: Token) -> None:
    """Check that somebody who knows a token's secret has signed a text."""
    unknown = errors.PermissionDeniedError(
        f"the cluster doesn't know the token {token.user}, or it has ended, or it isn't the cluster that the token is for",
        hint="kubeadm token create prints a new one",
    )
    header, _, rest = signature.partition(".")
    payload, separator, mac = rest.partition(".")
    try:
        said = msgspec.json.decode(_decoded(header), type=_Header)
        shown = _decoded(mac)
    except (*unreadable.JSON, ValueError) as error:
        raise unknown from error
    if not separator or payload or said.alg != "HS256" or said.kid != token.user:
        raise unknown
    signed = header.encode() + b"." + base64.urlsafe_b64encode(text).rstrip(b"=")
    should = hmac.digest(token.password.encode(), signed, hashlib.sha256)
    if not hmac.compare_digest(should, shown):
        raise unknown


def _decoded(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)


def _read(text: bytes) -> Kubeconfig:
    """The one cluster of a kubeconfig file that has neither users nor contexts.

    Raises:
        UsageError: It is none.
    """
    source = f"{_PUBLIC}/{_INFO}"
    documents = list(yamlread.documents(text, source))
    clusters = documents[0].mappings("clusters") if len(documents) == 1 else []
    cluster = clusters[0].mapping("cluster") if len(clusters) == 1 else None
    if cluster is None:
        raise errors.UsageError(f"{source} names no cluster")
    try:
        authority = binascii.a2b_base64(cluster.text("certificate-authority-data"), strict_mode=True)
    except ValueError:
        raise cluster.error("certificate-authority-data", "is no base64") from None
    return Kubeconfig(cluster.required_text("server"), authority_data=authority)
