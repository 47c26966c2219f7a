"""What is found when a host is looked at: the words that the checks and those who print them share."""

import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal, NamedTuple

from nixlet.node import config as node_config
from nixlet.rpc.gen import node_pb2

#: "warning": it works, with a consequence; "missing": a node can't work so; "unknown": we were not able to look.
Status = Literal["ok", "warning", "missing", "unknown"]


@dataclasses.dataclass(frozen=True, slots=True)
class Subject:
    """What is looked at: the node that these settings would make, on this host.

    Attributes:
        settings: Its settings, checked.
        layout: Its places.
        running: What that node says of itself, if it runs.
    """

    settings: node_config.Settings
    layout: node_config.Layout
    running: node_pb2.StatusResponse | None = None

    @property
    def has_own_containerd(self) -> bool:
        """Whether the node starts its containerd itself."""
        return not self.settings.container_runtime_endpoint


class Finding(NamedTuple):
    """What a check found.

    Attributes:
        status: How that is.
        evidence: What was seen.
        remedy: What to do about it, or an empty string.
        name: What the line is called, where a check finds several things; else empty.
    """

    status: Status
    evidence: str
    remedy: str = ""
    name: str = ""


#: None: it doesn't concern this node.
Found = Finding | Sequence[Finding] | None


class Check(NamedTuple):
    """Something to look at.

    Attributes:
        group: What it belongs to.
        name: What it is called.
        look: Looks; a ``NixletError`` that it raises says what is missing.
        needs_root: Others than root can't look.
        at_start: It is quick, and worth a warning in the log of a node that starts.
    """

    group: str
    name: str
    look: Callable[[Subject], Found | Awaitable[Found]]
    needs_root: bool = False
    at_start: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """A finding for a person: its group and name, and as in ``Finding``."""

    group: str
    name: str
    status: Status
    evidence: str
    remedy: str
