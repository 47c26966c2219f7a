"""What a node has of the cluster that it has joined: written down whole, and enough to start by while the server is away."""

import dataclasses
import datetime
import os
import re

import msgspec

from nixlet import errors
from nixlet.cluster import joining, kubeconfigs, names, signing, standing, subjects
from nixlet.cluster import settings as model
from nixlet.cluster.findings import State
from nixlet.cluster.kubeconfigs import Credentials
from nixlet.cluster.layout import Layout
from nixlet.cluster.settings import ClusterSettings
from nixlet.encoding import unreadable
from nixlet.host import files
from nixlet.kubeclient import joinforms

#: The files of ``agent/`` with the authority of servers, and with what a node knows of its cluster.
AUTHORITY, _FACTS = "server-ca.crt", "cluster.json"

#: What routes pods' packets has a name like this.
_BACKEND = re.compile(r"[a-z0-9-]{1,40}")


class _Known(msgspec.Struct, frozen=True):
    """What a node keeps of its cluster."""

    server: str
    facts: joinforms.ClusterFacts


def written(places: Layout, server: str) -> list[str]:
    """The files of ``agent/`` that a node has when it has joined, but for its password."""
    stems = [f"{name}.{end}" for name in joining.SIGNED_BY for end in ("crt", "key")]
    return ["client-ca.crt", AUTHORITY, *stems, *map(os.path.basename, kubeconfigs.of_node(places, server)), _FACTS]


def keep(places: Layout, server: str, welcome: joinforms.Welcome) -> None:
    """Write down what we have got, where all of it is good: with half of it a node couldn't start while the server is away.

    Raises:
        FailedPreconditionError: It isn't.
        NixletError: The file system refuses, as in ``files.refused``.
    """
    found = {}
    for name in ("client-ca.crt", AUTHORITY):
        found[name] = welcome.authorities.get(name, "").encode()
        try:
            signing.parse_certificates(found[name])
        except signing.Unreadable as error:
            raise errors.FailedPreconditionError(f"what the server sends for {name} {error}") from error
    for name in joining.SIGNED_BY:
        found[f"{name}.crt"] = joining.checked(places, name, welcome.certificates.get(name, "").encode())
    try:
        _check_facts(welcome.facts)
    except errors.InvalidArgumentError as error:
        raise errors.FailedPreconditionError(f"what the server sends is no cluster's: {error.message}") from error
    for name, text in found.items():
        files.write_atomically(places.node(name), text)
    for path, config in kubeconfigs.of_node(places, server).items():
        kubeconfigs.write(path, config)
    known = msgspec.json.format(msgspec.json.encode(_Known(server, welcome.facts)))
    files.write_atomically(places.node(_FACTS), known + b"\n", mode=0o600)


def remembered(places: Layout, server: str, name: str, now: datetime.datetime) -> joinforms.ClusterFacts | None:
    """What a node knows of its cluster from before, where that is enough to start while the server is away; else None.

    Args:
        places: Where.
        server: The API server's URL, as ``server_url`` gives it.
        name: The node's name: with certificates for another one it is nobody.
        now: The time, for certificates.

    Raises:
        NixletError: The file system refuses, as in ``files.refused``.
    """
    path = places.node(_FACTS)
    try:
        with open(path, "rb") as file:
            known = msgspec.json.decode(file.read(joinforms.MAX_WELCOME), type=_Known)
    except (FileNotFoundError, *unreadable.JSON):
        return None
    except OSError as error:
        raise files.refused(f"{path} can't be read", error) from error
    if known.server != server or any(not os.path.exists(each) for each in kubeconfigs.of_node(places, server)):
        return None
    good = {State.VALID, State.ENDING}
    if any(each.state not in good for each in standing.check_agent(places, now)):
        return None
    return known.facts if _joined_as(places) == _user(name) else None


def credentials(places: Layout, node: str) -> Credentials | None:
    """What a server knows a node by that has joined before; None: it has nothing that is good."""
    pair = signing.Pair.at(places.node("client-kubelet"))
    now = datetime.datetime.now(datetime.UTC)
    try:
        found, key = signing.read_certificates(pair.certificate), signing.read_key(pair.key)
    except signing.Unreadable:
        return None
    if not found or key is None or not signing.is_of(found[0], key):
        return None
    good = found[0].not_valid_before_utc <= now < found[0].not_valid_after_utc
    return Credentials(pair.certificate, pair.key) if good and _joined_as(places) == _user(node) else None


def _user(node: str) -> str:
    return subjects.kubelet_client(node).common_name


def _joined_as(places: Layout) -> str:
    found = signing.read_certificates(signing.Pair.at(places.node("client-kubelet")).certificate)
    return signing.subject_of(found[0]).common_name if found else ""


def _check_facts(facts: joinforms.ClusterFacts) -> None:
    for text, what in ((facts.cluster_cidrs, "cluster-cidr"), (facts.service_cidrs, "service-cidr")):
        model.networks(",".join(text), what=f"the cluster's {what}")
    model.addresses(",".join(facts.cluster_dns), what="the cluster's cluster-dns")
    if not names.is_name(facts.cluster_domain):
        raise errors.InvalidArgumentError(f"the cluster's domain {facts.cluster_domain[:80]!r} is no domain name")
    if not 0 < facts.https_listen_port < 1 << 16:
        raise errors.InvalidArgumentError(f"the API server's port {facts.https_listen_port} is no port")
    if not _BACKEND.fullmatch(facts.flannel_backend):
        raise errors.InvalidArgumentError(f"the cluster's flannel-backend {facts.flannel_backend[:80]!r} is none")


def with_facts(settings: ClusterSettings, facts: joinforms.ClusterFacts) -> ClusterSettings:
    """A node's settings, with what its cluster says of itself.

    Raises:
        InvalidArgumentError: The cluster says what is none of it.
    """
    _check_facts(facts)
    return dataclasses.replace(
        settings,
        cluster_cidrs=model.networks(",".join(facts.cluster_cidrs), what="the cluster's cluster-cidr"),
        service_cidrs=model.networks(",".join(facts.service_cidrs), what="the cluster's service-cidr"),
        cluster_dns=model.addresses(",".join(facts.cluster_dns), what="the cluster's cluster-dns"),
        cluster_domain=facts.cluster_domain,
        https_listen_port=facts.https_listen_port,
    )
