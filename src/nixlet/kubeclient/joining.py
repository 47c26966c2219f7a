"""How a node joins: it asks a server for its certificates and for what it has to know of the cluster (``joinforms``), and writes it down.

First the authority of servers is fetched from whoever answers, and believed where its hash is that of the token. Then the server has to show a
certificate of that authority, and only then it is shown the token. What a node has got it keeps: it can start while the server is away. Where the
token is no longer good it shows its certificate: tokens end, and are changed, and nodes stay.
"""

import base64
import dataclasses
import http.client
import logging
import ssl
import urllib.parse
from collections.abc import Sequence

import msgspec

from nixlet import errors
from nixlet.cluster import joining, signing, standing, tokens
from nixlet.cluster import settings as model
from nixlet.cluster.layout import Layout
from nixlet.cluster.tokens import Token
from nixlet.encoding import unreadable
from nixlet.host import files
from nixlet.kubeclient import connections, failures, joinforms, membership, nodepasswords
from nixlet.kubeclient.calls import Call
from nixlet.kubeclient.endpoint import Endpoint

#: Where API servers listen, as k3s and kubeadm have it.
_PORT = 6443

#: Seconds for a question; a server takes a while to let somebody in.
_SECONDS, _JOINING_SECONDS = 10.0, 75.0

#: The file of ``agent/`` with what a node shows so that nobody else takes its name.
_PASSWORD = "node-password"  # noqa: S105 (its name)

#: What hanging up looks like in the middle of a connection.
_HUNG_UP = (ConnectionResetError, BrokenPipeError, ssl.SSLEOFError, http.client.RemoteDisconnected)

_log = logging.getLogger("nixlet.joining")


class NotOursError(errors.UnavailableError):
    """Whoever answers is no server of nixlet's that nodes join at."""


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
    """Join a cluster, anew at each start and when certificates end, and write down what the node has from it; what it has to know.

    Args:
        places: Where.
        server: The API server's URL, as ``server_url`` gives it.
        token: The cluster's.
        name: The node's name.
        addresses: The node's addresses.
        call: By which it may be given up.

    Raises:
        NotOursError: Whoever answers is no such server.
        UnavailableError: The server can't be reached, or can't let anybody in now.
        PermissionDeniedError: It is another one than the token is for; or it doesn't let us in.
        FailedPreconditionError: Its certificate isn't good, or what it sends isn't; or the directory is a server's.
        InvalidArgumentError: It takes the node's name or addresses for none.
        NixletError: The file system refuses, as in ``files.refused``.
    """
    call = call or Call()
    standing.check_joins(places)
    files.make_directory(places.agent)
    # What a start left that was killed while it wrote: keys, for instance.
    files.sweep(places.agent, [*membership.written(places, server), _PASSWORD])
    there = _joining_endpoint(server)
    authority = _authority(there, places, token, call)
    wish = joinforms.Wish(
        name,
        tuple(map(str, addresses)),
        _password(places),
        {each: joining.request(places, each).decode() for each in joining.SIGNED_BY},
    )
    welcome = _welcome(dataclasses.replace(there, authority_data=authority), places, token, wish, call)
    membership.keep(places, server, welcome)
    return welcome.facts


def is_ours(server: str, *, call: Call | None = None) -> bool:
    """Whether somebody answers where nodes join a server of nixlet's, also by a refusal of such a server's. Nothing is believed yet.

    Args:
        server: The API server's URL, as ``server_url`` gives it.
        call: By which it may be given up.

    Raises:
        UnavailableError: Whoever it is hangs up, as a server does that has no room.
    """
    with connections.Connections(_joining_endpoint(server).as_stranger()) as asked:
        request = connections.Request("GET", joinforms.AUTHORITY, seconds=_SECONDS, most=joinforms.MAX_AUTHORITY)
        try:
            answer = asked.ask(request, call or Call())
        except errors.CallCancelledError:
            raise
        except errors.NixletError as error:
            if isinstance(error.__cause__, _HUNG_UP):
                raise
            return False
    return answer.status == 200 or (answer.status >= 500 and _refusal(answer) is not None)


def check_answers(server: str, *, call: Call | None = None) -> None:
    """Check that somebody answers where an API server would, whoever that is, and whatever is answered.

    Args:
        server: The API server's URL, as ``server_url`` gives it.
        call: By which it may be given up.

    Raises:
        UnavailableError: Nobody does.
        DeadlineExceededError: Nobody does in time.
        NixletError: As in ``Connections.ask``: somebody is there.
    """
    there = Endpoint.of(server, what="the server").as_stranger()
    with connections.Connections(there) as asked:
        asked.ask(connections.Request("GET", "/version", seconds=_SECONDS, most=joinforms.MAX_WELCOME), call or Call())


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
        _check_same(there, places.node(membership.AUTHORITY), answer.body)
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
    return NotOursError(
        f"{there.shown} is no server of nixlet's that nodes join at",
        hint="--server is the API server's URL, https://HOST:6443; nodes join at the port above",
    )


def _welcome(there: Endpoint, places: Layout, token: Token, wish: joinforms.Wish, call: Call) -> joinforms.Welcome:
    answer = _asked(there, _authorization(token), wish, call)
    if answer.status == 401 and (own := membership.credentials(places, wish.node)) is not None:
        try:
            again = _asked(dataclasses.replace(there, credentials=own), "", wish, call)
        except (failures.UnauthenticatedError, errors.UnavailableError) as error:
            # One that is no authority's of the server's is refused, or it hangs up.
            if isinstance(error, errors.UnavailableError) and not isinstance(error.__cause__, _HUNG_UP):
                raise
            again = answer
        if again.status == 200:
            _log.warning(
                "the token isn't good any more, and %s knows this node by its certificate",
                there.shown,
                extra={"hint": "give it the server's token: it needs one when its certificates have ended"},
            )
        answer = answer if again.status == 401 else again
    if answer.status != 200:
        raise _refused(there, answer)
    try:
        return msgspec.json.decode(answer.body, type=joinforms.Welcome)
    except unreadable.JSON as error:
        raise _not_ours(there) from error


def _asked(there: Endpoint, authorization: str, wish: joinforms.Wish, call: Call) -> connections.Answer:
    request = connections.Request(
        "POST",
        joinforms.JOIN,
        msgspec.json.encode(wish),
        "application/json",
        _JOINING_SECONDS,
        joinforms.MAX_WELCOME,
        authorization=authorization,
    )
    with connections.Connections(there) as asked:
        return asked.ask(request, call)


def _refusal(answer: connections.Answer) -> joinforms.Refusal | None:
    """What a server of nixlet's says where it refuses; None: it is somebody else's answer."""
    try:
        # (an API server's refusals have a message as well, and more)
        if set(msgspec.json.decode(answer.body, type=dict[str, str])) <= {"message", "hint"}:
            return msgspec.json.decode(answer.body, type=joinforms.Refusal)
    except unreadable.JSON:
        pass
    return None


def _refused(there: Endpoint, answer: connections.Answer) -> errors.NixletError:
    refusal = _refusal(answer)
    if refusal is None and answer.status >= 500:
        # Somebody between us and the server, perhaps, who doesn't find it.
        return errors.UnavailableError(
            f"{there.shown} answers with status {answer.status}, and not as a server of nixlet's"
        )
    if refusal is None:
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
