"""A client of an API server, for threads that may wait. For the event loop there is ``asynchronous``.

Objects are passed through as they are, as dicts; who looks into one converts it into a type of its own (``msgspec.convert``). Every request
has its time, every answer its limit, and all that can go wrong its sentence. No proxy is used and no redirect followed.
"""

import threading
import urllib.parse
from collections.abc import Generator, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import msgspec

from nixlet.encoding import unreadable
from nixlet.kubeclient import failures
from nixlet.kubeclient.calls import Call
from nixlet.kubeclient.endpoint import Endpoint
from nixlet.kubeclient.resources import Resource

if TYPE_CHECKING:
    from nixlet.kubeclient import connections

Object = dict[str, Any]

#: How many objects are asked for at once, and how large all of a list may be (bytes).
_PAGE = 500
_MAX_LIST = 256 << 20

#: How large one event of a watch may be (bytes). Objects have at most 1.5 MB in etcd, and more as text.
_MAX_EVENT = 16 << 20

#: How long the server goes on with one watch (seconds), and how much later we give up by ourselves.
_WATCH, _WATCH_MORE = 300, 30

#: What a server calls events.
ADDED, MODIFIED, DELETED, BOOKMARK = "ADDED", "MODIFIED", "DELETED", "BOOKMARK"

_JSON = "application/json"
_MERGE_PATCH = "application/merge-patch+json"
#: JSON is YAML.
_APPLY_PATCH = "application/apply-patch+yaml"


class Listing(NamedTuple):
    """Objects as they were at one moment.

    Attributes:
        items: The objects, without ``kind`` and ``apiVersion``, as servers list them.
        version: The ``resourceVersion`` to watch from.
    """

    items: list[Object]
    version: str


class Event(NamedTuple):
    """What has happened to an object; a bookmark says only up to where nothing else has.

    Attributes:
        kind: ``ADDED``, ``MODIFIED``, ``DELETED`` or ``BOOKMARK``.
        object: The object as it is then, or was last.
    """

    kind: str
    object: Object

    @property
    def version(self) -> str:
        """The ``resourceVersion`` to go on from; empty where the object has none."""
        return version_of(self.object)


class _Event(msgspec.Struct):
    type: str
    object: Object


class _ListMeta(msgspec.Struct, rename="camel"):
    resource_version: str = ""
    continue_: str = msgspec.field(default="", name="continue")


class _List(msgspec.Struct):
    items: list[Object] | None = None
    metadata: _ListMeta = msgspec.field(default_factory=_ListMeta)


def version_of(found: Object) -> str:
    """An object's ``resourceVersion``; empty where it has none."""
    metadata = found.get("metadata")
    version = metadata.get("resourceVersion") if isinstance(metadata, dict) else None
    return version if isinstance(version, str) else ""


class Client:
    """A client of a server. A context manager, whose end closes the connections that are kept.

    All methods may be called by several threads at once, and raise:

        UnavailableError, DeadlineExceededError: The server can't be reached, isn't ready, or doesn't answer in time.
        StrangerError: Its certificate isn't good.
        UnauthenticatedError, PermissionDeniedError: It doesn't know us, or we may not.
        NotFoundError, AlreadyExistsError, ConflictError, ExpiredError, InvalidArgumentError: What it says of the request.
        CallCancelledError: The call was given up.
    """

    def __init__(self, endpoint: Endpoint, *, seconds: float = 10.0) -> None:
        """A client of a server, which connects with the first request.

        Args:
            endpoint: The server.
            seconds: How long a request may take.
        """
        self.endpoint = endpoint
        self.seconds = seconds
        self._connections: connections.Connections | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        """Use it."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections that are kept; the next request makes new ones."""
        with self._lock:
            made, self._connections = self._connections, None
        if made is not None:
            made.close()

    @property
    def _reached(self) -> "connections.Connections":
        from nixlet.kubeclient import connections  # noqa: PLC0415 (TLS and HTTP are for those who ask)

        with self._lock:
            if self._connections is None:
                self._connections = connections.Connections(self.endpoint)
            return self._connections

    def get(self, resource: Resource, name: str, *, namespace: str = "", call: Call | None = None) -> Object:
        """An object."""
        return self._object("GET", resource.path(namespace, name), call=call)

    def list(
        self,
        resource: Resource,
        *,
        namespace: str = "",
        labels: str = "",
        fields: str = "",
        page: int = _PAGE,
        call: Call | None = None,
    ) -> Listing:
        """All objects, asked for page by page.

        Args:
            resource: Of which kind.
            namespace: In which namespace; empty: in all.
            labels: A selector by labels.
            fields: A selector by fields.
            page: How many at once.
            call: By which it may be given up.
        """
        path = resource.path(namespace)
        query = {"labelSelector": labels, "fieldSelector": fields, "limit": str(page)}
        items: list[Object] = []
        size, rest = 0, ""
        while True:
            try:
                body = self._body("GET", path, {**query, "continue": rest}, call=call)
            except failures.ExpiredError:
                if not rest:
                    raise
                # The server has forgotten this moment: all of another one, in one piece.
                query["limit"], rest, items, size = "", "", [], 0
                continue
            size += len(body)
            if size > _MAX_LIST:
                raise failures.too_large(self.endpoint, _MAX_LIST)
            try:
                found = msgspec.json.decode(body, type=_List)
            except unreadable.JSON as error:
                raise failures.no_object(self.endpoint) from error
            items += found.items or ()
            rest = found.metadata.continue_
            if not rest:
                return Listing(items, found.metadata.resource_version)

    def create(self, resource: Resource, new: Object, *, namespace: str = "", call: Call | None = None) -> Object:
        """Make an object; as it is then."""
        body = msgspec.json.encode(new)
        return self._object("POST", resource.path(namespace), body, _JSON, repeatable=False, call=call)

    def delete(
        self,
        resource: Resource,
        name: str,
        *,
        namespace: str = "",
        uid: str = "",
        propagation: str = "",
        grace: int | None = None,
        call: Call | None = None,
    ) -> None:
        """Have an object removed, which may take longer than the answer.

        Args:
            resource: Of which kind.
            name: Its name.
            namespace: Its namespace.
            uid: Only if it is that very one; empty: whichever.
            propagation: What happens to its dependents: ``Background``, ``Foreground`` or ``Orphan``; empty: as the kind has it.
            grace: Seconds that it has to end; None: as it says itself.
            call: By which it may be given up.
        """
        options: Object = {"kind": "DeleteOptions", "apiVersion": "v1"}
        if uid:
            options["preconditions"] = {"uid": uid}
        if propagation:
            options["propagationPolicy"] = propagation
        if grace is not None:
            options["gracePeriodSeconds"] = grace
        body = msgspec.json.encode(options)
        # (twice would say of the first time that there was none)
        self._object("DELETE", resource.path(namespace, name), body, _JSON, repeatable=False, call=call)

    def patch(
        self,
        resource: Resource,
        name: str,
        change: Object,
        *,
        namespace: str = "",
        subresource: str = "",
        call: Call | None = None,
    ) -> Object:
        """Change an object by a merge patch (RFC 7386); as it is then. A ``resourceVersion`` in it makes it conditional."""
        # (twice, the second would be told of a conflict with the first)
        body, repeatable = msgspec.json.encode(change), not version_of(change)
        path = resource.path(namespace, name, subresource)
        return self._object("PATCH", path, body, _MERGE_PATCH, repeatable=repeatable, call=call)

    def apply(
        self,
        resource: Resource,
        name: str,
        wanted: Object,
        *,
        namespace: str = "",
        subresource: str = "",
        manager: str = "nixlet",
        force: bool = True,
        call: Call | None = None,
    ) -> Object:
        """Have an object be as it is wanted, by server-side apply: made, or changed in the fields that are named; as it is then.

        Args:
            resource: Of which kind.
            name: Its name.
            wanted: The fields that are ours, with ``apiVersion`` and ``kind``.
            namespace: Its namespace.
            subresource: ``status``, for instance.
            manager: As whom.
            force: Take fields that others own; otherwise that is a conflict.
            call: By which it may be given up.
        """
        query = {"fieldManager": manager, "force": "true" if force else "false"}
        path = resource.path(namespace, name, subresource)
        body, repeatable = msgspec.json.encode(wanted), not version_of(wanted)
        return self._object("PATCH", path, body, _APPLY_PATCH, query, repeatable=repeatable, call=call)

    def watch(
        self,
        resource: Resource,
        *,
        version: str,
        namespace: str = "",
        labels: str = "",
        fields: str = "",
        seconds: int = _WATCH,
        call: Call | None = None,
    ) -> Generator[Event, None, None]:
        """What happens to objects from a moment on, bookmarks among it, until the server ends the watch.

        Whoever lets go of the iterator before its end closes it.

        Args:
            resource: Of which kind.
            version: From when on: a ``Listing``'s version, or that of the last event.
            namespace: In which namespace; empty: in all.
            labels: A selector by labels.
            fields: A selector by fields.
            seconds: How long.
            call: By which it may be given up.

        Raises:
            ExpiredError: The server doesn't remember that moment: list anew.
            NixletError: As for all methods.
        """
        from nixlet.kubeclient import connections  # noqa: PLC0415 (see ``_reached``)

        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "labelSelector": labels,
            "fieldSelector": fields,
            "timeoutSeconds": str(seconds),
        }
        request = connections.Request("GET", _target(resource.path(namespace), query), seconds=seconds + _WATCH_MORE)
        with self._reached.streaming(request, call or Call()) as pieces:
            for line in self._lines(pieces):
                yield self._event(line)

    def _lines(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        rest = bytearray()
        for piece in pieces:
            seen = len(rest)
            rest += piece
            while (end := rest.find(b"\n", seen)) >= 0:
                line = bytes(rest[:end])
                del rest[: end + 1]
                seen = 0
                if line.strip():
                    yield line
            if len(rest) > _MAX_EVENT:
                raise failures.too_large(self.endpoint, _MAX_EVENT)

    def _event(self, line: bytes) -> Event:
        try:
            found = msgspec.json.decode(line, type=_Event)
            status = msgspec.convert(found.object, failures.Status) if found.type == "ERROR" else None
        except unreadable.JSON as error:
            raise failures.no_object(self.endpoint) from error
        if status is not None:
            said = failures.words(status.message)
            raise failures.of_status(self.endpoint, status.code or 500, status.reason, said)
        return Event(found.type, found.object)

    def check(self, path: str = "/readyz", *, call: Call | None = None) -> None:
        """Check that a program is well, by what it says of itself: see ``health``.

        Raises:
            UnavailableError: It isn't; the sentence says what of it.
            NixletError: As for all methods.
        """
        from nixlet.kubeclient import connections, health  # noqa: PLC0415 (see ``_reached``)

        request = connections.Request("GET", path, seconds=self.seconds, most=health.MAX_ANSWER)
        answer = self._reached.ask(request, call or Call())
        health.judge(self.endpoint, answer.status, answer.body)

    def raw(self, path: str, *, call: Call | None = None) -> bytes:
        """What is at a path, as it is: ``/version`` for one."""
        return self._body("GET", path, {}, call=call)

    def _object(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        content_type: str = "",
        query: Mapping[str, str] | None = None,
        *,
        repeatable: bool = True,
        call: Call | None,
    ) -> Object:
        answer = self._body(method, path, query or {}, body, content_type, repeatable=repeatable, call=call)
        try:
            return msgspec.json.decode(answer, type=Object)
        except unreadable.JSON as error:
            raise failures.no_object(self.endpoint) from error

    def _body(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: bytes = b"",
        content_type: str = "",
        *,
        repeatable: bool = True,
        call: Call | None,
    ) -> bytes:
        from nixlet.kubeclient import connections  # noqa: PLC0415 (see ``_reached``)

        request = connections.Request(
            method, _target(path, query), body, content_type, self.seconds, repeatable=repeatable
        )
        answer = self._reached.ask(request, call or Call())
        if not 200 <= answer.status < 300:
            raise failures.of_answer(self.endpoint, answer.status, answer.body)
        return answer.body


def _target(path: str, query: Mapping[str, str]) -> str:
    given = urllib.parse.urlencode({key: value for key, value in query.items() if value})
    return f"{path}?{given}" if given else path
