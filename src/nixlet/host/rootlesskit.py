"""Ports of the machine that lead into rootlesskit's network namespace, by its API (rootlesskit, pkg/api/openapi.yaml: version 1).

All functions here block: call them in a thread.
"""

import http.client
import json
import socket

from nixlet import errors

#: Where its API's socket is in its state directory.
SOCKET = "api.sock"

#: Seconds for an answer: it has a socket to open, and no more.
_TIMEOUT = 30.0


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("rootlesskit", timeout=_TIMEOUT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.sock.settimeout(_TIMEOUT)
        self.sock.connect(self._path)


def add_port(api: str, *, protocol: str, outside: tuple[str, int], inside: tuple[str, int]) -> int:
    """Have what comes to an address and port of the machine go to one of the namespace.

    Args:
        api: The API's socket.
        protocol: "tcp" or "udp".
        outside: The address and port of the machine.
        inside: Those in the namespace.

    Returns:
        The number by which it is ended.

    Raises:
        FailedPreconditionError: rootlesskit refuses, in its words: the port is somebody's, for one, or below 1024.
        UnavailableError: It doesn't answer.
    """
    wanted = {
        "proto": protocol,
        "parentIP": outside[0],
        "parentPort": outside[1],
        "childIP": inside[0],
        "childPort": inside[1],
    }
    answer = _ask(api, "POST", "/v1/ports", json.dumps(wanted))
    return int(json.loads(answer)["id"])


def remove_port(api: str, number: int) -> None:
    """End that; raises as ``add_port``."""
    _ask(api, "DELETE", f"/v1/ports/{number}")


def _ask(api: str, method: str, path: str, body: str | None = None) -> bytes:
    connection = _Connection(api)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
        answer = connection.getresponse()
        content = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise errors.UnavailableError(
            f"rootlesskit at {api} does not answer: {error}", hint="restart the node"
        ) from error
    finally:
        connection.close()
    if answer.status >= 400:
        raise errors.FailedPreconditionError(_said(content) or f"rootlesskit answers {answer.status}")
    return content


def _said(content: bytes) -> str:
    try:
        return str(json.loads(content)["message"])
    except (ValueError, LookupError, TypeError):
        return content.decode(errors="replace").strip()[:200]
