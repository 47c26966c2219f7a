"""How the programs do that a node keeps running, by the word of the node that runs here."""

import contextlib
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

from nixlet import errors
from nixlet.host import unixsocket
from nixlet.node.doctor import machine
from nixlet.node.settings import config
from nixlet.services import nodeaddress
from nixlet.varlink import client

#: Seconds that the node gets to answer.
_ANSWER = 5.0

#: Seconds after which a child that was started again is well again.
_RECOVERED = 3600.0


def looks(layout: config.Layout) -> Mapping[str, machine.Look]:
    """A look at each child of the node that runs here, by name; none where no node runs. It asks the node (blocking)."""
    path = layout.control_socket
    if not unixsocket.is_served(path):
        return {}
    try:
        with client.Connection(path, peer=f"the node at {path}") as node:
            node.send(f"{nodeaddress.INTERFACE}.GetChildren")
            reply, _ = node.receive(_ANSWER)
            remarks = _remarks(node)
    except TimeoutError:
        return {"node": functools.partial(_silent, path)}
    except errors.NixletError as error:
        return {"node": functools.partial(_untold, error)}
    children = {child["name"]: functools.partial(_look, child) for child in reply["children"]}
    return children | {each["about"]: functools.partial(_told, each["text"]) for each in remarks}


def _remarks(node: client.Connection) -> Sequence[Mapping[str, str]]:
    """What is not as somebody wants it; nothing of an earlier node than this command line, which doesn't tell."""
    with contextlib.suppress(errors.NixletError):
        node.send(f"{nodeaddress.INTERFACE}.GetRemarks")
        reply, _ = node.receive(_ANSWER)
        remarks: Sequence[Mapping[str, str]] = reply["remarks"]
        return remarks
    return []


def _told(text: str) -> str:
    raise machine.Worse(text, "the node's log says more")


def _silent(path: str) -> str:
    raise errors.UnavailableError(f"the node at {path} does not answer within {_ANSWER:g} s", hint="restart it")


def _untold(error: errors.NixletError) -> str:
    """An earlier node than this command line doesn't tell, which is no reason to fail."""
    raise machine.Worse(error.message, error.hint or "restart the node")


def _look(child: Mapping[str, Any]) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(child["since"]))
    state, log = f"{child['state']} since {since}", f"see {child['log']}"
    well = f"process {child['pid']}, {state}"
    if child["state"] == "ready" and not child["restarts"]:
        return well
    times = "once" if child["restarts"] == 1 else f"{child['restarts']} times"
    why = f": {child['failure']}" if child["failure"] else ""
    if child["state"] == "ready":
        again = f"{well}, was started again {times}"
        if time.time() - child["since"] > _RECOVERED:
            return again
        raise machine.Worse(f"{again}{why}", log)
    if child["state"] in {"waiting", "starting", "stopping"}:
        raise machine.Worse(f"{state}{why}", log)
    raise errors.UnavailableError(f"{state}{why}", hint=log)
