"""What the node says of itself."""

import asyncio
import dataclasses
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence

import msgspec

import nixlet
from nixlet import errors
from nixlet.host import keptchild
from nixlet.snapshots import snapshotter as snapshotter_module
from nixlet.varlink import server

#: Seconds in which a program answers that can.
_ANSWER = 2.0


@dataclasses.dataclass(frozen=True, slots=True)
class ChildStatus:
    """A program behind the node that runs."""

    name: str
    pid: int
    version: str


@dataclasses.dataclass(frozen=True, slots=True)
class NodeStatus:
    """What the node is; see GetStatus in the interface's description."""

    snapshotter: str
    data_dir: str
    state_dir: str
    containerd_address: str
    containerd_config_version: int
    pod_log_dir: str
    resolv_conf: str


class StatusService:
    """Answers for one node: the methods GetStatus, GetChildren, GetRemarks and GetSilent."""

    def __init__(
        self,
        status: NodeStatus,
        children: Callable[[], Sequence[ChildStatus]],
        kept: Callable[[], Sequence[keptchild.Status]],
        snapshotter: snapshotter_module.Snapshotter | None,
        ask_containerd: Callable[[], Awaitable[object]],
        remarks: Mapping[str, Callable[[], str]],
    ) -> None:
        """Answer for a node.

        Args:
            status: What it is.
            children: Which programs are behind it, once it is ready.
            kept: How those do that it keeps running.
            snapshotter: Its own one, if it has one.
            ask_containerd: Asks its containerd for any answer.
            remarks: Tell what is not as somebody wants it, by what it is about; empty where all is.
        """
        self._status = status
        self._children = children
        self._kept = kept
        self._snapshotter = snapshotter
        self._ask_containerd = ask_containerd
        self._remarks = remarks

    def methods(self) -> Mapping[str, server.Method]:
        """Its methods."""
        return {
            "GetStatus": server.Method(server.Nothing, self._get_status),
            "GetChildren": server.Method(server.Nothing, self._get_children),
            "GetRemarks": server.Method(server.Nothing, self._get_remarks),
            "GetSilent": server.Method(server.Nothing, self._get_silent),
        }

    async def _get_status(self, _: server.Call[server.Nothing]) -> Mapping[str, object]:
        return {
            "version": nixlet.__version__,
            "pid": os.getpid(),
            "strategy": "" if self._snapshotter is None else (await self._snapshotter.strategy()).value,
            "children": [dataclasses.asdict(child) for child in self._children()],
            **dataclasses.asdict(self._status),
        }

    async def _get_children(self, _: server.Call[server.Nothing]) -> Mapping[str, object]:
        return {"children": [msgspec.structs.asdict(child) for child in self._kept()]}

    async def _get_remarks(self, _: server.Call[server.Nothing]) -> Mapping[str, object]:
        told = [(about, tell()) for about, tell in self._remarks.items()]
        return {"remarks": [{"about": about, "text": text} for about, text in told if text]}

    async def _get_silent(self, _: server.Call[server.Nothing]) -> Mapping[str, object]:
        silent = []
        try:
            async with asyncio.timeout(_ANSWER):
                await self._ask_containerd()
        except TimeoutError:
            silent.append(f"containerd at {self._status.containerd_address}")
        except errors.NixletError:
            # It is not there: whoever needs it is told so, and waits for nothing.
            pass
        return {"programs": silent}
