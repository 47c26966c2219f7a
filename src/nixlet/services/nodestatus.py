"""What the node says of itself: the method GetStatus."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence

import nixlet
from nixlet.services.node import ChildStatus, NodeStatus
from nixlet.snapshots import snapshotter as snapshotter_module
from nixlet.varlink import server


class StatusService:
    """Answers for one node."""

    def __init__(
        self,
        status: NodeStatus,
        children: Callable[[], Sequence[ChildStatus]],
        snapshotter: snapshotter_module.Snapshotter | None,
    ) -> None:
        self._status = status
        self._children = children
        self._snapshotter = snapshotter

    def methods(self) -> Mapping[str, server.Method]:
        """Its methods."""
        return {"GetStatus": server.Method(server.Nothing, self._get)}

    async def _get(self, _: server.Call[server.Nothing]) -> Mapping[str, object]:
        return {
            "version": nixlet.__version__,
            "pid": os.getpid(),
            "strategy": "" if self._snapshotter is None else (await self._snapshotter.strategy()).value,
            "children": [dataclasses.asdict(child) for child in self._children()],
            **dataclasses.asdict(self._status),
        }
