"""How programs of a cluster are, as they say it themselves over HTTP.

Where: the API server at its own port (``/livez``, ``/readyz``), the controller manager and the scheduler at theirs (``/healthz``), the kubelet
and kube-proxy at a port of the loopback address (``/healthz``), etcd where its metrics are (``/health``, ``/readyz`` from 3.5.11 on).
"""

import msgspec

from nixlet import errors
from nixlet.encoding import unreadable
from nixlet.kubeclient import failures
from nixlet.kubeclient.endpoint import Endpoint

#: An answer is no longer than this (bytes).
MAX_ANSWER = 1 << 20

#: How many of the checks that failed are named.
_MAX_NAMED = 5


class _Etcd(msgspec.Struct):
    """etcd's answer."""

    health: str
    reason: str = ""


def judge(endpoint: Endpoint, status: int, body: bytes) -> None:
    """Check an answer.

    Raises:
        UnavailableError: The program isn't well.
        NixletError: It wouldn't say, as in ``failures.of_answer``.
    """
    text = body.decode(errors="replace")
    try:
        etcd = msgspec.json.decode(body, type=_Etcd) if body.startswith(b"{") else None
    except unreadable.JSON:
        etcd = None
    if status == 200 and (etcd is None or etcd.health == "true"):
        return
    if etcd is not None:
        raise errors.UnavailableError(
            f"{endpoint.shown} isn't well: {failures.words(etcd.reason) or 'it says no more'}"
        )
    # Of a check that failed there is a line: [-]etcd failed: reason withheld
    failed = [line[3:].split(" ", 1)[0] for line in text.splitlines() if line.startswith("[-]")]
    if failed:
        more = f" and {len(failed) - _MAX_NAMED} more" if len(failed) > _MAX_NAMED else ""
        named = failures.words(", ".join(failed[:_MAX_NAMED]))
        raise errors.UnavailableError(f"{endpoint.shown} isn't ready: {named}{more}")
    raise failures.of_answer(endpoint, status, body)
