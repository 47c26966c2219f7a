"""How verbs ask a running node. It imports nothing that takes time."""

import os
import sys

from nixlet import errors
from nixlet.services import nodeaddress
from nixlet.varlink import client

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

#: Seconds that a reply may take before it is looked who is waited for, and seconds in which everybody answers who can.
PATIENCE = 3.0
_ANSWER = 5.0


class Node(client.Connection):
    """A connection to a running node, whose methods are called by their names without the interface's.

    A person whose verb takes long is told once who doesn't answer, if somebody doesn't.
    """

    def __init__(self, path: str) -> None:
        """Connect to the node's socket; as ``client.Connection``."""
        super().__init__(path, peer=f"the node at {path}")
        self._path = path
        self._patient = True

    def send(
        self,
        method: str,
        parameters: "Mapping[str, Any] | None" = None,
        descriptors: "Sequence[int]" = (),
        *,
        more: bool = False,
    ) -> None:
        """Send a call of a method of the node's."""
        super().send(f"{nodeaddress.INTERFACE}.{method}", parameters, descriptors, more=more)

    def receive(self, timeout: float | None = None) -> "tuple[client.Reply, bool]":
        """Wait for the next reply; as ``client.Connection.receive``."""
        if timeout is None and self._patient:
            try:
                return super().receive(PATIENCE)
            except TimeoutError:
                self._patient = False
                self.tell_who_is_silent()
        return super().receive(timeout)

    def tell_who_is_silent(self) -> None:
        """Tell the person who is waited for, if somebody doesn't answer: the node, or its containerd."""
        try:
            with Node(self._path) as asking:
                asking.send("GetSilent")
                silent = asking.receive(_ANSWER)[0]["programs"]
        except TimeoutError:
            silent = [self.peer]
        except errors.NixletError:
            # The verb itself learns of that.
            return
        for each in silent:
            print(f"waiting for {each}, which does not answer", file=sys.stderr)


def connected(state_dir: str) -> Node:
    """Connect to a node by its state directory; a context manager.

    Raises:
        UnavailableError: None runs there.
        PermissionDeniedError: It isn't for us.
    """
    place = os.path.abspath(state_dir)
    path = os.path.join(place, nodeaddress.SOCKET)
    if not os.path.exists(path):
        raise errors.UnavailableError(
            f"no node runs at {place}", hint="start one (nixlet server) or say where it is: --state-dir"
        )
    return Node(path)
