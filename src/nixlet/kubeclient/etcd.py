"""etcd's own upkeep, by its JSON gateway (etcd: api/etcdserverpb/rpc.proto, of which each call is a POST at the path that stands there).

A database that has reached its quota (``--quota-backend-bytes``) has etcd raise an alarm, NOSPACE: from then on it takes deletions only,
also after a restart and where there is room again, until somebody takes the alarm away (etcd's operations guide, "Maintenance").
"""

import contextlib
from collections.abc import Iterable
from typing import TypeVar

import msgspec

from nixlet import errors
from nixlet.encoding import unreadable
from nixlet.kubeclient import connections, failures
from nixlet.kubeclient.calls import Call
from nixlet.kubeclient.endpoint import Endpoint

#: The alarm of a database that has reached its quota.
_NO_SPACE = "NOSPACE"

#: Seconds for an answer; and for the database to be written anew, of which there may be 8 GiB.
_ANSWER, _REWRITTEN = 10.0, 300.0

#: An answer is no longer than this (bytes).
_MAX_ANSWER = 1 << 20

T = TypeVar("T")


class _Alarm(msgspec.Struct, rename={"member": "memberID"}):
    alarm: str = ""
    member: str = ""


class _Alarms(msgspec.Struct):
    alarms: list[_Alarm] = []


class _Header(msgspec.Struct):
    revision: str = "0"


class _Status(msgspec.Struct):
    header: _Header
    #: Its size in bytes, a number in a string.
    dbSize: str = "0"  # noqa: N815 (etcd's name)


class _Empty(msgspec.Struct):
    pass


def _no_answer(endpoint: Endpoint) -> errors.NixletError:
    return errors.FailedPreconditionError(f"{endpoint.shown} answers with something that is none of etcd's answers")


class _Gateway:
    """etcd's, for one call."""

    def __init__(self, endpoint: Endpoint, wire: connections.Connections, call: Call) -> None:
        self._endpoint, self._wire, self._call = endpoint, wire, call

    def ask(self, path: str, body: object, kind: type[T], seconds: float = _ANSWER) -> T:
        said = msgspec.json.encode(body)
        request = connections.Request("POST", path, said, "application/json", seconds, most=_MAX_ANSWER)
        answer = self._wire.ask(request, self._call)
        if answer.status != 200:
            raise failures.of_answer(self._endpoint, answer.status, answer.body)
        try:
            return msgspec.json.decode(answer.body, type=kind)
        except unreadable.JSON as error:
            raise _no_answer(self._endpoint) from error


def full(endpoint: Endpoint, call: Call) -> list[str]:
    """The members of an etcd that have raised the alarm of a database that has reached its quota; empty: none has.

    Args:
        endpoint: An etcd, as its client.
        call: Gives it up.

    Raises:
        NixletError: etcd can't be asked, or refuses.
    """
    with connections.Connections(endpoint) as wire:
        found = _Gateway(endpoint, wire, call).ask("/v3/maintenance/alarm", {"action": "GET"}, _Alarms).alarms
        return [each.member for each in found if each.alarm == _NO_SPACE]


def relieve(endpoint: Endpoint, members: Iterable[str], call: Call) -> tuple[int, int]:
    """Take the alarm away that a full database has raised: what objects were before is forgotten, and the database written anew without it.

    Where that gains nothing, etcd raises the alarm again with the next write.

    Args:
        endpoint: An etcd, as its client.
        members: Those that have raised it, as ``full`` gives them.
        call: Gives it up.

    Returns:
        The database's size before and after (bytes).

    Raises:
        NixletError: etcd can't be asked, or refuses: it needs as much room on the disk once more, for one.
    """
    with connections.Connections(endpoint) as wire:
        ask = _Gateway(endpoint, wire, call).ask
        before = ask("/v3/maintenance/status", {}, _Status)
        # (it may have been done already)
        with contextlib.suppress(errors.InvalidArgumentError):
            ask("/v3/kv/compaction", {"revision": before.header.revision, "physical": True}, _Empty, _REWRITTEN)
        ask("/v3/maintenance/defragment", {}, _Empty, _REWRITTEN)
        after = ask("/v3/maintenance/status", {}, _Status)
        for each in members:
            ask("/v3/maintenance/alarm", {"action": "DEACTIVATE", "memberID": each, "alarm": _NO_SPACE}, _Alarms)
        try:
            return int(before.dbSize), int(after.dbSize)
        except ValueError as error:
            raise _no_answer(endpoint) from error
