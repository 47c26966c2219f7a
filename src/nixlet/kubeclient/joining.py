"""How a node joins: it asks a server for its certificates and for what it has to know of the cluster (``joinforms``), and writes it down.

First the authority of servers is fetched from whoever answers, and believed where its hash is that of the token. Then the server has to show a
certificate of that authority, and only then it is shown the token. What a node has got it keeps: it can start while the server is away.
"""

import base64
import dataclasses
import datetime
import logging
import os
import re
import urllib.parse
from collections.abc import Sequence

import msgspec

from nixlet import errors
from nixlet.cluster import joining, kubeconfigs, names, signing, standing, subjects, tokens
from nixlet.cluster import settings as model
from nixlet.cluster.findings import State
from nixlet.cluster.layout import Layout
from nixlet.cluster.settings import ClusterSettings
from nixlet.cluster.tokens import Token
from nixlet.host import files
from nixlet.kubeclient import connections, failures, joinforms, nodepasswords
from nixlet.kubeclient.calls import Call
from nixlet.kubeclient.endpoint import Endpoint

#: Where API servers listen, as k3s and kubeadm have it.
_PORT = 6443

#: Seconds for a question; a server takes a while to let somebody in.
_SECONDS, _JOINING_SECONDS = 10.0, 75.0

#: Files of ``agent/``: what a node shows so that nobody else takes its name, and what it knows of its cluster.
_PASSWORD, _FACTS = "node-password", "cluster.json"

#: The file of ``agent/`` with the authority of servers.
_AUTHORITY = "server-ca.crt"

#: What routes pods' packets has a name like this.
_BACKEND = re.compile(r"[a-z0-9-]{1,40}")

_log = logging.getLogger("nixlet.joining")


class _Known(msgspec.Struct, frozen=True):
    """What a node keeps of its cluster."""

    server: str
    facts: joinforms.ClusterFacts


def server_url(text: str) -> str:
    """The API server's URL as a person names it, with its port.

    Raises:
        InvalidArgumentError: It is none.
    """
    there = Endpoint.of(text, what="the server")
    if there.scheme != "https":
        raise errors.InvalidArgumentError("the server's URL must begin with https://")
    given = urllib.parse.urlsplit(text).port
    if there.path:
        raise errors.InvalidArgumentError("the server's URL has a path", hint="it is https://HOST:6443")
    if given == (1 << 16) - 1:
        raise errors.InvalidArgumentError(f"the server's port {given} is the last one: nodes join at the one above")
    return f"https://{dataclasses.replace(there, port=given or _PORT).address}"


def join(
    places: Layout,
    server: str,
    token: Token,
    name: str,
    addresses: Sequence[model.Address],
    *,
    call: Call | None = None,
) -> joinforms.ClusterFacts:
    """Join a cluster, anew at each start, and write down what the node has from it; what it has to know.

    Args:
        places: Where.
        server: The API server's URL, as ``server_url`` gives it.
        token: The cluster's.
        name: The node's name.
        addresses: The node's addresses.
        call: By which it may be given up.

    Raises:
        UnavailableError: The server can't be reached.
        PermissionDeniedError: It is another one than the token is for; or it doesn't let us in.
        FailedPreconditionError: Its certificate isn't good, or what it sends isn't; or the directory is a server's.
        InvalidArgumentError: It takes the node's name or addresses for none.
        NixletError: The file system refuses, as in ``files.refused``.
    """
    call = call or Call()
    if standing.is_server(places):
        raise errors.FailedPreconditionError(
            f"{places.data_dir} is a server's, and its node belongs to that cluster",
            hint="--data-dir names another directory for the node that joins",
        )
    files.make_directory(places.agent)
    there = _joining_endpoint(server)
    authority = _authority(there, places, token, call)
    wish = joinforms.Wish(
        name,
        tuple(map(str, addresses)),
        _password(places),
        {each: joining.request(places, each).decode() for each in joining.SIGNED_BY},
    )
    welcome = _welcome(dataclasses.replace(there, authority_data=authority), token, wish, call)
    _keep(places, server, welcome)
    return welcome.facts


def is_ours(server: str) -> bool:
    """Whether somebody answers where nodes join a server of nixlet's. Nothing is believed yet.

    Args:
        server: The API server's URL, as ``server_url`` gives it.
    """
    with connections.Connections(_joining_endpoint(server).as_stranger()) as asked:
        request = connections.Request("GET", joinforms.AUTHORITY, seconds=_SECONDS, most=joinforms.MAX_AUTHORITY)
        try:
            return asked.ask(request, Call()).status == 200
        except (errors.UnavailableError, errors.DeadlineExceededError):
            return False


def _joining_endpoint(server: str) -> Endpoint:
    there = Endpoint.of(server, what="the server")
    return dataclasses.replace(there, port=there.port + joinforms.PORT_ABOVE)


def _authority(there: Endpoint, places: Layout, token: Token, call: Call) -> bytes:
    """The certificates of the authority of servers, checked."""
    with connections.Connections(there.as_stranger()) as asked:
        request = connections.Request("GET", joinforms.AUTHORITY, seconds=_SECONDS, most=joinforms.MAX_AUTHORITY)
        answer = asked.ask(request, call)
    if answer.status >= 500:
        raise _refused(there, answer)
    if answer.status != 200:
        raise _not_ours(there)
    try:
        signing.parse_certificates(answer.body)
    except signing.Unreadable as error:
        raise _not_ours(there) from error
    token.check_authority(answer.body)
    if not token.authority:
        _check_same(there, places.node(_AUTHORITY), answer.body)
    return answer.body


def _check_same(there: Endpoint, path: str, found: bytes) -> None:
    """Check that an authority is the one that the node knows already; the token doesn't say which is right."""
    hint = f"give the whole token, K10…; to have the node join another cluster by a short one, remove {path}"
    try:
        known = signing.read_certificates(path)
    except signing.Unreadable as error:
        raise errors.FailedPreconditionError(f"{path} {error}", hint=hint) from error
    if known is None:
        _log.warning("the token has no hash of the cluster's authority: whoever answers at %s is believed", there.shown)
    elif set(signing.parse_certificates(found)) != set(known):
        raise errors.PermissionDeniedError(
            f"{there.shown} has another certificate authority than the cluster that this node has joined", hint=hint
        )


def _not_ours(there: Endpoint) -> errors.NixletError:
    return errors.UnavailableError(
        f"{there.shown} is no server of nixlet's that nodes join at",
        hint="--server is the API server's URL, https://HOST:6443; nodes join at the port above",
    )


def _welcome(there: Endpoint, token: Token, wish: joinforms.Wish, call: Call) -> joinforms.Welcome:
    with connections.Connections(there) as asked:
        request = connections.Request(
            "POST",
            joinforms.JOIN,
            msgspec.json.encode(wish),
            "application/json",
            _JOINING_SECONDS,
            joinforms.MAX_WELCOME,
            authorization=_authorization(token),
        )
        answer = asked.ask(request, call)
    if answer.status != 200:
        raise _refused(there, answer)
    try:
        return msgspec.json.decode(answer.body, type=joinforms.Welcome)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _not_ours(there) from error


def _refused(there: Endpoint, answer: connections.Answer) -> errors.NixletError:
    try:
        refusal = msgspec.json.decode(answer.body, type=joinforms.Refusal)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return _not_ours(there)
    message = f"{there.shown} doesn't let this node in: {failures.words(refusal.message)}"
    hint = failures.words(refusal.hint)
    match answer.status:
        case 400 | 409 | 413:
            return errors.InvalidArgumentError(message, hint=hint)
        case 401 | 403:
            return errors.PermissionDeniedError(message, hint=hint)
        case _:
            # (429 as well: in a while it may let us in)
            return errors.UnavailableError(message, hint=hint)


def _authorization(token: Token) -> str:
    if token.bootstrap:
        return f"Bearer {token.credentials()}"
    # A short token doesn't say whom it is for; a node is what we are.
    shown = token.credentials() if token.user else f"{tokens.NODE}:{token.password}"
    return f"Basic {base64.b64encode(shown.encode()).decode()}"


def _password(places: Layout) -> str:
    """What this node shows so that nobody else takes its name, made the first time."""
    path = places.node(_PASSWORD)
    try:
        with open(path, encoding="ascii") as file:
            found = file.read(1024).strip()
        nodepasswords.check(found)
        return found
    except FileNotFoundError:
        pass
    except (UnicodeDecodeError, errors.InvalidArgumentError) as error:
        raise errors.FailedPreconditionError(
            f"{path} holds no node's password",
            hint="bring it back, or remove it and have the node join by another name",
        ) from error
    except OSError as error:
        raise files.refused(f"{path} can't be read", error) from error
    password = nodepasswords.new()
    # On the disk before anybody is told.
    files.write_atomically(path, f"{password}\n", mode=0o600)
    return password


def _keep(places: Layout, server: str, welcome: joinforms.Welcome) -> None:
    """Write down what we have got, where all of it is good: with half of it a node couldn't start while the server is away.

    Raises:
        FailedPreconditionError: It isn't.
        NixletError: The file system refuses, as in ``files.refused``.
    """
    found = {}
    for name in ("client-ca.crt", _AUTHORITY):
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
    except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    except OSError as error:
        raise files.refused(f"{path} can't be read", error) from error
    if known.server != server or any(not os.path.exists(each) for each in kubeconfigs.of_node(places, server)):
        return None
    good = {State.VALID, State.ENDING}
    if any(each.state not in good for each in standing.check(places, now)):
        return None
    return known.facts if _joined_as(places) == subjects.kubelet_client(name).common_name else None


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
